"""Model folders in Orbax form and the convert command: round trips are bitwise identical, bad input is refused."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax.checkpoints.orbax import (
    OrbaxFolder,
    default_chunk,
    nest,
    open_model,
    save_model,
    weights_digest,
    write_params,
)
from melt_jax.checkpoints.published import load_model, to_hf_tensors
from melt_jax.config import InputError
from melt_jax.convert import Changes, convert
from melt_jax.model.model import abstract_model, module_leaves
from tests.helpers.devices import several_devices
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

ROOT = pathlib.Path(__file__).parent.parent
GATED = Changes("elementwise", "gated", seed=3)


def run_command(*flags):
    """Runs the command in its own process."""
    command = [sys.executable, "-m", "melt_jax.convert", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder of conversions: published Ouro to Orbax form and back, with gates added, and with them removed."""
    base = tmp_path_factory.mktemp("converted")
    write_published(base / "ouro", OURO, files=3, metadata=True)
    for source, target, form, changes in (
        ("ouro", "looplm", "orbax", Changes()),
        ("looplm", "ouro_again", "published", Changes()),
        ("ouro", "melt", "orbax", GATED),
        ("melt", "melt_published", "published", Changes()),
        ("melt_published", "ouro_from_melt", "published", Changes("none")),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            convert(base / source, base / target, form, changes)
        (base / f"{target}.txt").write_text(printed.getvalue())
    return base


def read_json(file):
    return json.loads(file.read_text())


def test_round_trip_is_bitwise_identical(converted):
    ouro, again = converted / "ouro", converted / "ouro_again"
    assert_same_bits(stored_tensors(ouro), stored_tensors(again))
    code = {"auto_map": read_json(again / "config.json")["auto_map"]}
    assert read_json(ouro / "config.json") | code == read_json(again / "config.json")
    for folder in ("looplm", "ouro_again", "melt", "melt_published"):
        for name, content in TOKENIZER_FILES.items():
            assert (converted / folder / name).read_bytes() == content


def test_adding_gates_changes_nothing_else(converted):
    ouro, melt = stored_tensors(converted / "ouro"), stored_tensors(converted / "melt_published")
    assert_same_bits(ouro, {name: melt[name] for name in ouro})
    gates = {name: melt[name].astype(np.float32) for name in sorted(set(melt) - set(ouro))}
    layers = [f"model.layers.{i}.self_attn.kv_gate." for i in range(OURO.layers)]
    assert set(gates) == {layer + name for layer in layers for name in ("w_z.weight", "w_z.bias", "u_z.weight")}
    drawn = [gates[layer + name] for layer in layers for name in ("w_z.weight", "u_z.weight")]
    assert all(0.015 < np.std(gate) < 0.025 and abs(np.mean(gate)) < 0.005 for gate in drawn)
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert not any(gates[layer + "w_z.bias"].any() for layer in layers)
    raw = read_json(converted / "melt_published" / "config.json")
    assert (raw["model_type"], raw["gate"], raw["first_loop"]) == ("melt", "elementwise", "gated")
    assert raw["auto_map"]["AutoModelForCausalLM"] == "modeling_melt.MeltForCausalLM"
    assert raw["initializer_range"] == 0.02
    assert_same_bits(ouro, stored_tensors(converted / "ouro_from_melt"))


def test_summary_states_the_output(converted):
    summary = (converted / "melt.txt").read_text()
    assert "elementwise" in summary and "bfloat16" in summary and "tokenizer.json" in summary
    count = sum(tensor.size for tensor in stored_tensors(converted / "melt_published").values())
    size = sum(file.stat().st_size for file in (converted / "melt").rglob("*") if file.is_file())
    assert f"{count:,} parameters, {size:,} bytes" in summary


def test_seed_determines_the_gates(converted, tmp_path):
    for seed in (3, 4):
        convert(converted / "looplm", tmp_path / str(seed), "published", dataclasses.replace(GATED, seed=seed))
    assert_same_bits(stored_tensors(converted / "melt_published"), stored_tensors(tmp_path / "3"))
    name = "model.layers.0.self_attn.kv_gate.w_z.weight"
    assert not np.array_equal(stored_tensors(tmp_path / "3")[name], stored_tensors(tmp_path / "4")[name])


@pytest.mark.parametrize(
    "source, output, changes, existing, message",
    [
        ("melt", "ouro_again", Changes(), "refuse", "ouro_again: expected a new folder"),
        ("nowhere", "new", Changes(), "refuse", "nowhere: expected a model checkpoint"),
        ("melt", "new", Changes("ema"), "refuse", "first_loop: expected 'copy' unless the gate is elementwise"),
        ("ouro", "new", Changes(first_loop="gated"), "refuse", "first_loop: expected none for a LoopLM"),
        ("ouro", "ouro", Changes(), "overwrite", "expected an output that neither is nor contains the input"),
        ("ouro", ".", Changes(), "overwrite", "expected an output that neither is nor contains the input"),
        ("ouro", "looplm", Changes(), "keep", "expected a model folder in published form, found orbax form"),
    ],
)
def test_bad_conversions_are_refused(converted, source, output, changes, existing, message):
    """Nothing is written or lost."""
    before = sorted(converted.rglob("*"))
    with pytest.raises((InputError, FileExistsError), match=message):
        convert(converted / source, converted / output, "published", changes, existing)
    with pytest.raises(InputError, match="form: expected one of orbax, published, found 'hf'"):
        convert(converted / "ouro", converted / "new", "hf")
    assert sorted(converted.rglob("*")) == before


def test_existing_outputs_are_kept_or_overwritten(converted, tmp_path, capsys):
    output = tmp_path / "output"
    convert(converted / "ouro", output, "published")
    convert(converted / "ouro", output, "published", existing="keep")
    assert "exists and is kept" in capsys.readouterr().out
    assert weights_digest(output) == weights_digest(converted / "ouro")
    with pytest.raises(InputError, match=f"{output}: expected gate elementwise, found none; remove it"):
        convert(converted / "melt", output, "published", existing="keep")
    with pytest.raises(InputError, match=f"{output}: expected float32 weights, found bfloat16; remove it"):
        convert(converted / "ouro", output, "published", Changes(dtype="float32"), "keep")
    widened = tmp_path / "widened"
    convert(converted / "ouro", widened, "published", Changes(dtype="float32"))
    convert(converted / "ouro", widened, "published", Changes(dtype="float32"), "keep")
    other = tmp_path / "other"
    shutil.copytree(converted / "ouro", other)
    edit_tensors(sorted(other.glob("*.safetensors"))[0], lambda x: x.update({name: 2 * x[name] for name in x}))
    kept = weights_digest(output)
    with pytest.raises(InputError, match=f"{output}: expected the weights of {other}, found others; remove it"):
        convert(other, output, "published", existing="keep")
    with pytest.raises(InputError, match=f"{widened}: expected the weights of {other}, found others; remove it"):
        convert(other, widened, "published", Changes(dtype="float32"), "keep")
    assert weights_digest(output) == kept
    convert(converted / "melt", output, "published", existing="overwrite")
    assert weights_digest(output) == weights_digest(converted / "melt")


def test_command_converts_and_reports_errors(converted, tmp_path):
    """Flags reach the conversion; bad input is one line and status 1."""
    flags = [f"--input={converted / 'looplm'}", f"--output={tmp_path / 'new'}", "--to=published"]
    more = ["--gate=elementwise", "--first_loop=gated", "--seed=3", f"--dtype_of={converted / 'melt'}"]
    assert run_command(*flags, *more).returncode == 0
    assert weights_digest(tmp_path / "new") == weights_digest(converted / "melt")
    done = run_command(*flags)
    assert done.returncode == 1 and done.stderr.startswith("melt_jax.convert: ")
    assert "new: expected a new folder" in done.stderr and "Traceback" not in done.stderr


def test_both_forms_open_alike(converted):
    for names, options in (
        (("ouro", "looplm"), {}),
        (("melt", "melt_published"), {}),
        (("melt", "melt_published"), {"gate": "none", "dtype": "float32"}),
        (("ouro", "melt"), {"gate": "ema", "first_loop": "copy"}),
    ):
        first, second = (open_model(converted / name, **options) for name in names)
        assert first.config == second.config and first.dtype == second.dtype
        assert jax.tree.structure(first) == jax.tree.structure(second)
        assert_same_bits(to_hf_tensors(first), to_hf_tensors(second))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_saved_models_open_unchanged(tmp_path, dtype):
    config = dataclasses.replace(MELT, tied=True, first_loop="gated")
    source = write_published(tmp_path / "source", config)
    model = load_model(source, dtype)
    save_model(tmp_path / "saved", model, tokenizer_from=source)
    opened = open_model(tmp_path / "saved")
    assert opened.config == config and opened.dtype == dtype
    assert_same_bits(to_hf_tensors(model), to_hf_tensors(opened))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    assert read_json(tmp_path / "saved" / "config.json")["torch_dtype"] == dtype


def test_training_chunk_is_the_default_chunk(tmp_path):
    """Both forms keep it; for a LoopLM and for a folder without it the default is 512."""
    model = load_model(write_published(tmp_path / "source", MELT))
    save_model(tmp_path / "melt", model, chunk_size=7)
    convert(tmp_path / "melt", tmp_path / "published", "published")
    convert(tmp_path / "published", tmp_path / "again", "orbax")
    convert(tmp_path / "again", tmp_path / "ouro", "published", Changes("none"))
    for name in ("melt", "published", "again"):
        config = open_model(tmp_path / name).config
        assert config == MELT and default_chunk(tmp_path / name, config) == 7
        assert default_chunk(tmp_path / name, OURO) == 512
    assert default_chunk(tmp_path / "source", MELT) == 512
    assert "chunk_size" not in read_json(tmp_path / "ouro" / "config.json")


def test_given_dtype_casts_to_nearest(tmp_path):
    model = load_model(write_published(tmp_path / "source", OURO, dtype="float32"))
    save_model(tmp_path / "saved", model)
    expected = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), model)
    assert_same_bits(to_hf_tensors(expected), to_hf_tensors(open_model(tmp_path / "saved", dtype="bfloat16")))


def test_weights_have_the_given_shardings(converted):
    device = jax.local_devices()[-1]
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",), devices=[device]), jax.P())
    for name in ("looplm", "ouro"):
        shardings = jax.tree.map(lambda _: sharding, abstract_model(OURO))
        opened = open_model(converted / name, shardings=shardings)
        assert all(weight.sharding == sharding for weight in jax.tree.leaves(opened))
        assert_same_bits(to_hf_tensors(open_model(converted / name)), to_hf_tensors(opened))


@pytest.mark.slow
def test_sharded_models_are_restored_in_place(tmp_path):
    environment = several_devices(4) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.shard_round_trip", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "same weights, same shardings" in done.stdout, done.stderr


def test_writing_copies_no_weights(tmp_path):
    """A dimension of 1 would make TensorStore copy the array; the peak resident set must not grow by a copy."""
    code = f"""
import resource
import numpy as np
from melt_jax.checkpoints.orbax import write_params

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
write_params({str(tmp_path / "small")!r}, {{"a": np.ones((2, 1), np.float32)}})
weight = np.ones((8, 1, 1024, 1, 4096), np.float32)
before = peak()
write_params({str(tmp_path / "large")!r}, {{"a": weight}})
print((peak() - before) / weight.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25


def test_all_weight_errors_are_listed(tmp_path):
    model = load_model(write_published(tmp_path / "source", OURO))
    save_model(tmp_path / "saved", model)
    edit_config(tmp_path / "saved", num_hidden_layers=2, tie_word_embeddings=True, model_type="melt")
    with pytest.raises(InputError) as error:
        open_model(tmp_path / "saved")
    lines = str(error.value).splitlines()
    stacked = [path for path, _ in module_leaves(model) if path.startswith("layers.")]
    for path in stacked:
        assert any(f"{path}: expected shape (2," in line and "found (3," in line for line in lines), path
    assert any("lm_head: expected no such weight" in line for line in lines)
    assert sum("kv_gate" in line and line.endswith("found none") for line in lines) == 3
    assert len(lines) == 1 + len(stacked) + 1 + 3


def test_incomplete_and_integer_checkpoints_are_refused(tmp_path):
    model = load_model(write_published(tmp_path / "source", OURO))
    save_model(tmp_path / "saved", model)
    weights = dict(module_leaves(model)) | {"norm": np.ones(OURO.width, np.int32)}
    (tmp_path / "saved" / "params").rename(tmp_path / "aside")
    write_params(tmp_path / "saved" / "params", weights)
    with pytest.raises(InputError, match="norm: expected dtype bfloat16, float16, float32, found int32"):
        OrbaxFolder(tmp_path / "saved")
    (tmp_path / "half" / "params").mkdir(parents=True)
    (tmp_path / "half" / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
    with pytest.raises(InputError, match="expected a complete Orbax checkpoint"):
        open_model(tmp_path / "half")
    with pytest.raises(InputError, match="found no such folder"):
        open_model(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    """Each tensor is named, in either form; converting refuses them too and leaves no output."""
    folder = write_published(tmp_path / "a", OURO)
    model = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[2, 0, 0].set(value) if "q_proj" in jax.tree_util.keystr(path) else x, load_model(folder)
    )
    save_model(tmp_path / "b", model)

    def spoil(tensors):
        tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] = value
        tensors["model.norm.weight"][3] = value

    edit_tensors(folder / "model.safetensors", spoil)
    with pytest.raises(InputError) as error:
        open_model(folder)
    found = "expected finite numbers, found NaN or infinity"
    names = ("model.layers.2.self_attn.q_proj.weight", "model.norm.weight")
    assert set(str(error.value).splitlines()[1:]) == {f"  - {name}: {found}" for name in names}
    with pytest.raises(InputError, match=f"layers.q_proj of layer 2: {found}"):
        open_model(tmp_path / "b")
    for source in ("a", "b"):
        with pytest.raises(InputError, match=found):
            convert(tmp_path / source, tmp_path / "out", "orbax")
    assert not list(tmp_path.glob("*out*"))


def test_damaged_folders_are_refused(tmp_path):
    """A changed byte, wherever it is; also for the digest that identifies a teacher."""
    convert(write_published(tmp_path / "a", OURO), tmp_path / "b", "published")
    convert(tmp_path / "a", tmp_path / "c", "orbax")
    for folder in (tmp_path / "b", tmp_path / "c"):
        file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        for read in (open_model, weights_digest, lambda folder: convert(folder, tmp_path / "out", "orbax")):
            with pytest.raises(InputError, match=f"{file}: expected CRC-32"):
                read(folder)


def test_interrupted_saves_leave_no_folder(tmp_path, monkeypatch):
    model = load_model(write_published(tmp_path / "source", OURO))

    def interrupted(folder, weights):
        write_params(folder, weights)
        raise KeyboardInterrupt

    monkeypatch.setattr("melt_jax.checkpoints.orbax.write_params", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "saved", model)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    # A killed process leaves a hidden folder without config.json: it cannot be opened, and the next save replaces it.
    write_params(tmp_path / ".saved.incomplete" / "params", dict(module_leaves(model)))
    with pytest.raises(InputError, match=r"config.json: expected a model checkpoint"):
        open_model(tmp_path / ".saved.incomplete")
    save_model(tmp_path / "saved", model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved", "source"]


def test_digest_identifies_weights_in_either_form(converted, tmp_path):
    """It does not depend on form, folder, files or config; one changed bit or another dtype changes it."""
    ouro = weights_digest(converted / "ouro")
    assert len(ouro) == 64
    assert {weights_digest(converted / name) for name in ("looplm", "ouro_again", "ouro_from_melt")} == {ouro}
    assert weights_digest(converted / "melt") == weights_digest(converted / "melt_published") != ouro
    changed = shutil.copytree(converted / "ouro_again", tmp_path / "changed")
    (changed / "digests.json").unlink()
    edit_config(changed, eos_token_id=3)
    assert weights_digest(changed) == ouro

    def flip(tensors):
        tensors["lm_head.weight"].view(np.uint16)[0, 0] ^= 1

    edit_tensors(changed / "model.safetensors", flip)
    save_model(tmp_path / "wide", open_model(converted / "ouro", dtype="float32"))
    assert len({ouro, weights_digest(changed), weights_digest(tmp_path / "wide")}) == 3


def test_digest_reads_mixed_dtypes(tmp_path):
    folder = write_published(tmp_path / "a", OURO)
    before = weights_digest(folder)
    name = "model.layers.1.input_layernorm.weight"
    edit_tensors(folder / "model.safetensors", lambda x: x.update({name: x[name].astype(np.float32)}))
    assert weights_digest(folder) != before


def test_nest_makes_a_tree_of_paths():
    assert nest({"a": 1, "b.c": 2, "b.d.e": 3}) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
