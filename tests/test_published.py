"""Published checkpoints: every tensor and config value is checked, and written back unchanged."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from melt_jax.checkpoints.published import (
    load_model,
    published_tensors,
    read_config,
    safetensors_header,
    save_published,
    to_hf_tensors,
)
from melt_jax.config import InputError, ModelConfig
from melt_jax.model.model import abstract_model, parameter_count
from tests.helpers.synthetic import (
    MELT,
    OURO,
    TOKENIZER_FILES,
    assert_same_bits,
    edit_config,
    edit_tensors,
    stored_tensors,
    write_published,
)

ASSETS = pathlib.Path(__file__).parent.parent / "melt_jax/assets"


def refusal(folder, **options):
    """The lines of the error that opening a folder raises."""
    with pytest.raises(InputError) as error:
        load_model(folder, **options)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    "config, parameters, file_bytes",
    [
        (ModelConfig(), 1_434_652_673, 2_869_336_434),
        (ModelConfig(layers=48), 2_667_974_657, 5_336_011_242),
        (ModelConfig(gate="elementwise"), 1_636_028_417, None),
    ],
)
def test_published_parameters_and_file_sizes(config, parameters, file_bytes):
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


def test_matrices_are_out_by_in_grouped_by_head(tmp_path):
    """y = W x with a published matrix equals the module's einsum; head h uses rows h·E to (h + 1)·E − 1 of W."""
    folder = write_published(tmp_path / "a", OURO, dtype="float32")
    model, tensors = load_model(folder), stored_tensors(folder)
    weight = lambda array, layer: np.asarray(array[...], np.float64)[layer]
    published = lambda layer, name: tensors[f"model.layers.{layer}.self_attn.{name}.weight"].astype(np.float64)
    x = np.random.default_rng(0).standard_normal(OURO.width)
    query = np.einsum("d,dkge->kge", x, weight(model.layers.q_proj, 1))
    np.testing.assert_allclose(query.reshape(-1), published(1, "q_proj") @ x, atol=1e-12)
    heads = np.random.default_rng(1).standard_normal(query.shape)
    mixed = np.einsum("kge,kged->d", heads, weight(model.layers.o_proj, 2))
    np.testing.assert_allclose(mixed, published(2, "o_proj") @ heads.reshape(-1), atol=1e-12)


def test_all_tensor_errors_are_listed_together(tmp_path):
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
    assert says(moved["missing"], "found no such tensor")
    assert says(moved["missing"], "according to", "no file")
    assert says(moved["doubled"], "expected once", first.name, second.name)
    assert says(moved["flat"], "expected shape (", "found (3,)")
    assert says(moved["integer"], "expected dtype", "found I8")
    assert says("model.layers.3.extra.weight", "expected no such tensor")
    assert says("model.layers.3.extra.weight", "expected in model.safetensors.index.json")
    assert "7 errors" in lines[0] and len(lines) == 8


def test_index_pointing_to_another_file_is_refused(tmp_path):
    folder = write_published(tmp_path / "a", OURO, files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    here = index["weight_map"]["lm_head.weight"]
    other = next(file for file in index["weight_map"].values() if file != here)
    index["weight_map"]["lm_head.weight"] = other
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = refusal(folder)
    assert len(lines) == 2 and all(word in lines[1] for word in ("lm_head.weight", here, other))


def test_truncated_and_missing_files_are_refused(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert any("model.safetensors: expected a safetensors file" in line for line in refusal(folder))
    file.unlink()
    assert any("*.safetensors: expected one file or several" in line for line in refusal(folder))
    (folder / "config.json").unlink()
    (line,) = refusal(folder)
    assert "config.json: expected a model checkpoint" in line


def test_tied_model_has_no_head_tensor(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    edit_config(folder, tie_word_embeddings=True)
    lines = refusal(folder)
    assert len(lines) == 2 and "lm_head.weight: expected no such tensor" in lines[1]


def test_all_config_errors_are_listed_together(tmp_path):
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
        assert any(line.startswith(f"  - {key}: expected ") for line in lines), key


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads, 4, found 3"),
        ({"head_dim": 5}, "head_dim: expected an even number"),
        ({"eos_token_id": 29}, "eos_token_id: expected an id below vocab_size, 29, found 29"),
        ({"gate": "mean"}, "gate: expected no such key with model_type 'ouro', found 'mean'"),
        ({"chunk_size": 500}, "chunk_size: expected no such key with model_type 'ouro'"),
        ({"model_type": "melt", "chunk_size": 0}, "chunk_size: expected an integer, 1 or more, found 0"),
        ({"model_type": "melt", "gate": "open"}, "gate: expected one of elementwise"),
        (
            {"torch_dtype": "bfloat16", "dtype": "float32"},
            "dtype: expected that of torch_dtype, 'bfloat16', found 'float32'",
        ),
        (
            {"sliding_window": 512, "use_sliding_window": True},
            "use_sliding_window: expected False, the only",
        ),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected an integer, 1 or more, found True"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers: expected an integer, 1 or more, found '3'"),
        ({"layer_types": "full_attention"}, "layer_types: expected full_attention for each"),
        ({"model_type": ["ouro"]}, "model_type: expected 'ouro' or 'melt', found ['ouro']"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_parameters: expected {'rope_type': 'default'"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters: expected rope_theta as in the key rope_theta, 10"),
    ],
)
def test_contradictory_config_values_are_refused(tmp_path, changes, words):
    folder = write_published(tmp_path / "a", OURO)
    edit_config(folder, **changes)
    assert any(words in line for line in refusal(folder))


def test_equivalent_configs_give_the_same_model(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    edit_config(folder, remove=["torch_dtype"], dtype="bfloat16", sliding_window=4096)
    assert read_config(folder) == OURO
    edit_config(
        folder, remove=["rope_theta", "rope_scaling"], rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    assert read_config(folder) == dataclasses.replace(OURO, rope_theta=5e5)
    edit_config(folder, rope_parameters={"rope_theta": 5e5, "rope_type": "yarn", "factor": 2})
    _, line = refusal(folder)
    assert "rope_parameters: expected {'rope_type': 'default', 'rope_theta': …}, found" in line
    edit_config(folder, rope_theta=5e5, rope_parameters={"rope_type": "default"})
    assert read_config(folder) == dataclasses.replace(OURO, rope_theta=5e5)


def test_gate_can_be_replaced_when_opening(tmp_path):
    """A MELT opens with any gate, a LoopLM only with gates that have no weights."""
    melt, ouro = write_published(tmp_path / "melt", MELT), write_published(tmp_path / "ouro", OURO)
    for gate in ("none", "last", "mean", "ema", "scalar"):
        model = load_model(melt, dtype=None, gate=gate, first_loop="gated")
        assert (model.config.gate, model.config.first_loop) == (gate, "gated")
        assert set(to_hf_tensors(model)) <= set(stored_tensors(melt))
    assert load_model(ouro, gate="ema").config.gate == "ema"
    lines = refusal(ouro, gate="elementwise")
    assert sum("kv_gate" in line for line in lines) == 3 and "--gate=elementwise" in lines[-1]
    edit_config(melt, gate="mean")
    assert sum("kv_gate" in line and "expected no such tensor" in line for line in refusal(melt)) == 3 * OURO.layers


@pytest.mark.parametrize("config", [OURO, MELT, dataclasses.replace(MELT, tied=True, first_loop="gated")])
def test_saved_folders_are_bitwise_identical(tmp_path, config):
    folder = write_published(tmp_path / "a", config, files=3)
    save_published(tmp_path / "b", load_model(folder, dtype=None), tokenizer_from=folder)
    assert_same_bits(stored_tensors(folder), stored_tensors(tmp_path / "b"))
    read = lambda name: json.loads((tmp_path / name / "config.json").read_text())
    code = read("b")["auto_map"]
    assert read("a") | {"auto_map": code} == read("b")
    for file in {value.split(".")[0] + ".py" for value in code.values()}:
        assert (tmp_path / "b" / file).read_bytes() == (ASSETS / file).read_bytes()
    for name, content in TOKENIZER_FILES.items():
        assert (tmp_path / "b" / name).read_bytes() == content
    with safe_open(tmp_path / "b" / "model.safetensors", framework="numpy") as tensors:
        assert len(tensors.keys()) == len(stored_tensors(folder))


def test_changed_config_is_saved(tmp_path):
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


def test_saving_copies_nothing_from_working_directory(tmp_path, monkeypatch):
    model = load_model(write_published(tmp_path / "a", OURO))
    monkeypatch.chdir(tmp_path / "a")
    for i, nothing in enumerate((None, "")):
        save_published(tmp_path / str(i), model, tokenizer_from=nothing)
        code = sorted(file.name for file in ASSETS.glob("*_melt.py"))
        files = sorted(file.name for file in (tmp_path / str(i)).iterdir())
        assert files == sorted([*code, "config.json", "digests.json", "model.safetensors"])
        assert "initializer_range" not in json.loads((tmp_path / str(i) / "config.json").read_text())


def test_failed_save_leaves_no_files(tmp_path, monkeypatch):
    model = load_model(write_published(tmp_path / "ouro", OURO))
    folder = tmp_path / "a"
    save_published(folder, model)
    before = sorted(file.name for file in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="expected a new folder"):
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


def test_index_cannot_name_files_elsewhere(tmp_path):
    """Tensors are read from the folder's own files, whatever path the index states."""
    folder = write_published(tmp_path / "a", OURO, files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / index["weight_map"]["model.norm.weight"]).rename(tmp_path / "out.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../out.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"expected in \.\./out.safetensors according to .*, found in no file"):
        load_model(folder)


def test_mixed_dtypes_need_an_explicit_dtype(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    widen = lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].astype(np.float32)})
    edit_tensors(folder / "model.safetensors", widen)
    assert any("expected weights of one dtype" in line for line in refusal(folder, dtype=None))
    assert load_model(folder, dtype="float32").dtype == jnp.float32


def test_gradients_have_published_names(tmp_path):
    model = load_model(write_published(tmp_path / "a", dataclasses.replace(MELT, tied=True)))
    loss = lambda model: sum((w.astype(jnp.float32) ** 2).sum() for w in jax.tree.leaves(model))
    tensors, gradients = (to_hf_tensors(jax.device_get(tree)) for tree in (model, jax.grad(loss)(model)))
    assert sorted(gradients) == sorted(tensors)
    for name in tensors:
        np.testing.assert_array_equal(gradients[name], 2 * tensors[name])
