"""Published checkpoints: every tensor and every config value accounted for, and written back as they were."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from melt_jax.checkpoints.published import (
    abstract_model,
    load_model,
    published_tensors,
    read_config,
    safetensors_header,
    save_published,
    to_hf_tensors,
)
from melt_jax.config import ModelConfig
from melt_jax.model.model import parameter_count
from tests.helpers.synthetic import TOKENIZER_FILES, write_published

OURO = ModelConfig(
    vocab=29, width=16, layers=3, loops=2, heads=4, kv_heads=2, head_width=6, feed_forward=20, bos=1, eos=2
)
MELT = dataclasses.replace(OURO, gate="elementwise")


def stored_tensors(folder):
    """{name: array} of all files of a folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit_config(folder, remove=(), **changes):
    """Rewrites config.json with some keys changed."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in (raw | changes).items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(file, edit):
    """Rewrites a safetensors file with `edit` applied to its {name: array}."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def refusal(folder, **options):
    """The lines of the error with which a folder is refused."""
    with pytest.raises(ValueError) as error:
        load_model(folder, **options)
    return str(error.value).splitlines()


def assert_same_bits(tensors, others):
    assert sorted(tensors) == sorted(others)
    for name, tensor in tensors.items():
        other = np.asarray(others[name])
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.tobytes() == other.tobytes(), name


@pytest.mark.parametrize(
    "config, parameters, file_bytes",
    [
        (ModelConfig(), 1_434_652_673, 2_869_336_434),
        (ModelConfig(layers=48), 2_667_974_657, 5_336_011_242),
        (ModelConfig(gate="elementwise"), 1_636_028_417, None),
    ],
)
def test_parameters_and_file_sizes_are_the_published_ones(config, parameters, file_bytes):
    abstract = abstract_model(config)
    table = published_tensors(abstract)
    assert len(table) == (14 if config.gate == "elementwise" else 11) * config.layers + 5
    assert parameter_count(abstract) == parameters == sum(math.prod(shape) for *_, shape in table.values())
    header, _ = safetensors_header({name: shape for name, (*_, shape) in table.items()}, jnp.dtype("bfloat16"))
    if file_bytes:
        assert len(header) + 2 * parameters == file_bytes


@pytest.mark.parametrize("config", [OURO, MELT, dataclasses.replace(OURO, tied=True)], ids=["ouro", "melt", "tied"])
@pytest.mark.parametrize("files, metadata", [(1, False), (3, True)])
def test_reading_gives_every_published_tensor(tmp_path, config, files, metadata):
    folder = write_published(tmp_path / "a", config, files, metadata)
    model = load_model(folder, dtype=None)
    assert model.config == config
    assert_same_bits(stored_tensors(folder), to_hf_tensors(model))
    wide = to_hf_tensors(load_model(folder))
    for name, tensor in stored_tensors(folder).items():
        np.testing.assert_array_equal(wide[name], tensor.astype(np.float32))
        assert wide[name].dtype == np.float32


def test_matrices_are_out_by_in_and_heads_are_rows(tmp_path):
    """y = W x of a published matrix is the module's einsum, head h reading rows h·E to (h + 1)·E."""
    folder = write_published(tmp_path / "a", OURO, dtype="float32")
    model, tensors = load_model(folder), stored_tensors(folder)
    x = np.random.default_rng(0).standard_normal(OURO.width, np.float32)
    query = tensors["model.layers.1.self_attn.q_proj.weight"] @ x
    module = np.einsum("d,dkge->kge", x, np.asarray(model.layers.q_proj[...])[1])
    np.testing.assert_allclose(module.reshape(OURO.heads, -1), query.reshape(OURO.heads, -1), rtol=1e-5, atol=1e-6)
    heads = np.random.default_rng(1).standard_normal(module.shape).astype(np.float32)
    mixed = np.einsum("kge,kged->d", heads, np.asarray(model.layers.o_proj[...])[2])
    np.testing.assert_allclose(
        mixed, tensors["model.layers.2.self_attn.o_proj.weight"] @ heads.reshape(-1), rtol=1e-4, atol=1e-5
    )


def test_all_wrong_tensors_are_listed_at_once(tmp_path):
    folder = write_published(tmp_path / "a", OURO, files=2)
    first, second = sorted(folder.glob("*.safetensors"))
    moved = {}

    def spoil(tensors):
        moved["doubled"] = next(iter(load_file(second)))
        tensors[moved["doubled"]] = load_file(second)[moved["doubled"]]
        moved["missing"], moved["flat"], moved["integer"], *_ = sorted(set(tensors) - {moved["doubled"]})
        del tensors[moved["missing"]]
        tensors[moved["flat"]] = tensors[moved["flat"]].reshape(-1)[:3]
        tensors[moved["integer"]] = np.zeros(tensors[moved["integer"]].shape, np.int8)
        tensors["model.layers.3.extra.weight"] = np.zeros(2, np.float32)

    edit_tensors(first, spoil)
    lines = refusal(folder)
    says = lambda name, *words: any(name in line and all(word in line for word in words) for line in lines)
    assert says(moved["missing"], "is missing")
    assert says(moved["missing"], "should be in", "no file")
    assert says(moved["doubled"], "doubled", first.name, second.name)
    assert says(moved["flat"], "has shape (3,)", "expected")
    assert says(moved["integer"], "dtype I8")
    assert says("model.layers.3.extra.weight", "unknown")
    assert says("model.layers.3.extra.weight", "not in model.safetensors.index.json")
    assert "7 errors" in lines[0] and len(lines) == 8


def test_index_that_points_elsewhere_is_refused(tmp_path):
    folder = write_published(tmp_path / "a", OURO, files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    here = index["weight_map"]["lm_head.weight"]
    other = next(file for file in index["weight_map"].values() if file != here)
    index["weight_map"]["lm_head.weight"] = other
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = refusal(folder)
    assert len(lines) == 2 and all(word in lines[1] for word in ("lm_head.weight", here, other))


def test_truncated_and_absent_files_are_refused(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert any("model.safetensors is no readable safetensors file" in line for line in refusal(folder))
    file.unlink()
    assert any("no *.safetensors file" in line for line in refusal(folder))
    (folder / "config.json").unlink()
    assert "config.json is missing" in refusal(folder)[1]


def test_tied_head_has_no_tensor_of_its_own(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    edit_config(folder, tie_word_embeddings=True)
    lines = refusal(folder)
    assert len(lines) == 2 and "lm_head.weight" in lines[1] and "unknown" in lines[1]


def test_all_wrong_config_values_are_listed_at_once(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    wrong = {
        "model_type": "llama",
        "hidden_act": "gelu",
        "rope_scaling": {"rope_type": "yarn", "factor": 4},
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "attention_bias": True,
        "mlp_bias": True,
        "attention_dropout": 0.1,
        "torch_dtype": "int8",
        "num_key_value_heads": 0,
        "hidden_size": "16",
        "rms_norm_eps": 0,
        "num_experts": 8,
    }
    edit_config(folder, remove=["vocab_size"], **wrong)
    lines = refusal(folder)
    for key in (*wrong, "vocab_size"):
        assert any(line.startswith(f"  - {key} is") for line in lines), key


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3: expected a divisor of num_attention_heads, 4"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"eos_token_id": 29}, "eos_token_id is 29: outside the vocabulary of 29"),
        ({"gate": "mean"}, "model_type 'ouro' has no gates"),
        ({"chunk_size": 500}, "model_type 'ouro' has no gates"),
        ({"model_type": "melt", "chunk_size": 0}, "chunk_size is 0: expected an integer, 1 or more"),
        ({"model_type": "melt", "gate": "open"}, "gate is 'open': expected one of elementwise"),
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, "but dtype is 'float32'"),
        ({"sliding_window": 512, "use_sliding_window": True}, "use_sliding_window is True"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3': expected an integer"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention': expected full_attention for each"),
        ({"model_type": ["ouro"]}, "model_type is ['ouro']: expected 'ouro' or 'melt'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_parameters is {'rope_type': 'yarn', 'factor'"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters is {'rope_theta': 5.0}, but rope_theta is 10"),
    ],
)
def test_contradictory_config_values_are_refused(tmp_path, changes, words):
    folder = write_published(tmp_path / "a", OURO)
    edit_config(folder, **changes)
    assert any(words in line for line in refusal(folder))


def test_equivalent_configs_are_read_alike(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    edit_config(folder, remove=["torch_dtype"], dtype="bfloat16", sliding_window=4096)
    assert read_config(folder) == OURO
    edit_config(
        folder, remove=["rope_theta", "rope_scaling"], rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    assert read_config(folder) == dataclasses.replace(OURO, rope_theta=5e5)
    edit_config(folder, rope_parameters={"rope_theta": 5e5, "rope_type": "yarn", "factor": 2})
    _, line = refusal(folder)
    assert "rope_parameters is {" in line and "computes {'rope_type': 'default', 'rope_theta': …} only" in line
    edit_config(folder, rope_theta=5e5, rope_parameters={"rope_type": "default"})
    assert read_config(folder) == dataclasses.replace(OURO, rope_theta=5e5)


def test_a_melt_opens_with_any_gate_and_a_looplm_with_those_that_have_no_weights(tmp_path):
    melt, ouro = write_published(tmp_path / "melt", MELT), write_published(tmp_path / "ouro", OURO)
    for gate in ("none", "last", "mean", "ema", "scalar"):
        model = load_model(melt, dtype=None, gate=gate, first_loop="gated")
        assert (model.config.gate, model.config.first_loop) == (gate, "gated")
        assert set(to_hf_tensors(model)) <= set(stored_tensors(melt))
    assert load_model(ouro, gate="ema").config.gate == "ema"
    lines = refusal(ouro, gate="elementwise")
    assert sum("kv_gate" in line for line in lines) == 3 and "--gate=elementwise" in lines[-1]
    edit_config(melt, gate="mean")
    assert sum("kv_gate" in line and "unknown" in line for line in refusal(melt)) == 3 * OURO.layers


@pytest.mark.parametrize("config", [OURO, MELT, dataclasses.replace(MELT, tied=True, first_loop="gated")])
def test_saved_folders_have_the_same_bits(tmp_path, config):
    folder = write_published(tmp_path / "a", config, files=3)
    save_published(tmp_path / "b", load_model(folder, dtype=None), tokenizer_from=folder)
    assert_same_bits(stored_tensors(folder), stored_tensors(tmp_path / "b"))
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text())
    assert read("a") == read("b")
    for name, content in TOKENIZER_FILES.items():
        assert (tmp_path / "b" / name).read_bytes() == content
    with safe_open(tmp_path / "b" / "model.safetensors", framework="numpy") as tensors:
        assert len(tensors.keys()) == len(stored_tensors(folder))


def test_saving_without_a_source_and_after_a_change_of_config(tmp_path):
    folder = write_published(tmp_path / "a", MELT)
    looplm = load_model(folder, gate="none")
    save_published(tmp_path / "b", looplm, dtype="float32")
    assert read_config(tmp_path / "b") == OURO
    save_published(tmp_path / "c", looplm, tokenizer_from=folder)
    raw = json.loads((tmp_path / "c" / "config.json").read_text())
    assert read_config(tmp_path / "c") == OURO
    assert raw["model_type"] == "ouro" and "gate" not in raw and raw["initializer_range"] == 0.02
    np.testing.assert_array_equal(
        stored_tensors(tmp_path / "b")["lm_head.weight"], stored_tensors(folder)["lm_head.weight"].astype(np.float32)
    )


def test_without_a_tokenizer_nothing_of_the_working_directory_is_taken(tmp_path, monkeypatch):
    model = load_model(write_published(tmp_path / "a", OURO))
    monkeypatch.chdir(tmp_path / "a")
    for i, nothing in enumerate((None, "")):
        save_published(tmp_path / str(i), model, tokenizer_from=nothing)
        assert sorted(file.name for file in (tmp_path / str(i)).iterdir()) == ["config.json", "model.safetensors"]
        assert "initializer_range" not in json.loads((tmp_path / str(i) / "config.json").read_text())


def test_saving_refuses_an_existing_folder_and_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    folder = write_published(tmp_path / "a", OURO)
    model = load_model(folder)
    before = sorted(file.name for file in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="exists"):
        save_published(folder, model)
    interrupt = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr("melt_jax.checkpoints.published.write_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_published(tmp_path / "b", model)
    with pytest.raises(KeyboardInterrupt):
        save_published(folder, model, overwrite=True)
    assert sorted(file.name for file in tmp_path.rglob("*")) == before
    monkeypatch.undo()
    save_published(folder, load_model(shutil.copytree(folder, tmp_path / "c"), gate="last"), overwrite=True)
    assert read_config(folder).gate == "last" and not list(tmp_path.glob(".*"))


def test_mixed_dtypes_need_a_dtype(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    widen = lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].astype(np.float32)})
    edit_tensors(folder / "model.safetensors", widen)
    assert any("several dtypes" in line for line in refusal(folder, dtype=None))
    assert load_model(folder, dtype="float32").dtype == jnp.float32


def test_gradients_have_published_names(tmp_path):
    model = load_model(write_published(tmp_path / "a", dataclasses.replace(MELT, tied=True)))
    loss = lambda model: sum((w.astype(jnp.float32) ** 2).sum() for w in jax.tree.leaves(model))
    tensors, gradients = to_hf_tensors(model), to_hf_tensors(jax.grad(loss)(model))
    assert sorted(gradients) == sorted(tensors)
    for name in tensors:
        np.testing.assert_allclose(gradients[name], 2 * tensors[name])
