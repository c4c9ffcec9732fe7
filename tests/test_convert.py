"""Model checkpoints in Orbax form, and the converting command: the same bits there and back, or a refusal."""

import dataclasses
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
from melt_jax.checkpoints.published import abstract_model, load_model, module_leaves, to_hf_tensors
from tests.helpers.synthetic import TOKENIZER_FILES, write_published
from tests.test_published import MELT, OURO, assert_same_bits, edit_config, edit_tensors, stored_tensors

TOP = pathlib.Path(__file__).parent.parent


def convert(source, target, form, *flags):
    """Runs the command; returns the finished process."""
    command = [sys.executable, "-m", "melt_jax.convert", f"--input={source}", f"--output={target}", f"--to={form}"]
    return subprocess.run([*command, *flags], cwd=TOP, env=os.environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folders: a published Ouro in three files; as Orbax; published again; with gates; that published; as Ouro."""
    base = tmp_path_factory.mktemp("converted")
    write_published(base / "ouro", OURO, files=3, metadata=True)
    for source, target, form, *flags in (
        ("ouro", "looplm", "orbax"),
        ("looplm", "ouro_again", "published"),
        ("ouro", "melt", "orbax", "--gate=elementwise", "--first_loop=gated", "--seed=3"),
        ("melt", "melt_published", "published"),
        ("melt_published", "ouro_at_last", "published", "--gate=none"),
    ):
        done = convert(base / source, base / target, form, *flags)
        assert done.returncode == 0, done.stderr
        (base / f"{target}.txt").write_text(done.stdout)
    return base


def read_json(file):
    return json.loads(file.read_text())


def test_there_and_back_is_the_same_bits(converted):
    ouro, again = converted / "ouro", converted / "ouro_again"
    assert_same_bits(stored_tensors(ouro), stored_tensors(again))
    assert read_json(ouro / "config.json") == read_json(again / "config.json")
    for folder in ("looplm", "ouro_again", "melt", "melt_published"):
        for name, content in TOKENIZER_FILES.items():
            assert (converted / folder / name).read_bytes() == content


def test_a_melt_adds_gates_and_changes_nothing_else(converted):
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
    assert "auto_map" not in raw and raw["initializer_range"] == 0.02
    assert_same_bits(ouro, stored_tensors(converted / "ouro_at_last"))


def test_the_command_says_what_it_wrote(converted):
    said = (converted / "melt.txt").read_text()
    assert "elementwise" in said and "bfloat16" in said and "tokenizer.json" in said
    count = sum(tensor.size for tensor in stored_tensors(converted / "melt_published").values())
    size = sum(file.stat().st_size for file in (converted / "melt").rglob("*") if file.is_file())
    assert f"{count:,} parameters, {size:,} bytes" in said


def test_the_seed_decides_the_gates(converted, tmp_path):
    for seed in (3, 4):
        flags = ("--gate=elementwise", "--first_loop=gated", f"--seed={seed}")
        assert convert(converted / "looplm", tmp_path / str(seed), "published", *flags).returncode == 0
    assert_same_bits(stored_tensors(converted / "melt_published"), stored_tensors(tmp_path / "3"))
    name = "model.layers.0.self_attn.kv_gate.w_z.weight"
    assert not np.array_equal(stored_tensors(tmp_path / "3")[name], stored_tensors(tmp_path / "4")[name])


REFUSED = {
    "ouro_again exists: expected a new folder": ("melt", "ouro_again"),
    "no such folder: expected a model checkpoint": ("nowhere", "new"),
    "first_loop: expected 'copy', unless the gate is elementwise, found 'gated'": ("melt", "new", "--gate=ema"),
    "the output is a LoopLM, which has no cache recurrence": ("ouro", "new", "--first_loop=gated"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_the_command_says_what_it_refuses_and_writes_nothing(converted, message):
    source, target, *flags = REFUSED[message]
    before = stored_tensors(converted / "ouro_again")
    done = convert(converted / source, converted / target, "published", *flags)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.startswith("melt_jax.convert: ") and "Traceback" not in done.stderr
    assert_same_bits(before, stored_tensors(converted / "ouro_again"))
    assert not (converted / "new").exists()


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
def test_saved_models_open_as_they_were(tmp_path, dtype):
    config = dataclasses.replace(MELT, tied=True, first_loop="gated")
    source = write_published(tmp_path / "source", config)
    model = load_model(source, dtype)
    save_model(tmp_path / "saved", model, tokenizer_from=source)
    opened = open_model(tmp_path / "saved")
    assert opened.config == config and opened.dtype == dtype
    assert_same_bits(to_hf_tensors(model), to_hf_tensors(opened))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    assert read_json(tmp_path / "saved" / "config.json")["torch_dtype"] == dtype


def test_the_chunk_of_training_is_kept_in_both_forms_and_is_the_default_to_run_with(tmp_path):
    model = load_model(write_published(tmp_path / "source", MELT))
    save_model(tmp_path / "melt", model, chunk_size=7)
    assert convert(tmp_path / "melt", tmp_path / "published", "published").returncode == 0
    assert convert(tmp_path / "published", tmp_path / "again", "orbax").returncode == 0
    assert convert(tmp_path / "again", tmp_path / "ouro", "published", "--gate=none").returncode == 0
    for name in ("melt", "published", "again"):
        config = open_model(tmp_path / name).config
        assert config == MELT and default_chunk(tmp_path / name, config) == 7
        assert default_chunk(tmp_path / name, OURO) == 512  # the LoopLM inside
    assert default_chunk(tmp_path / "source", MELT) == 512  # nothing recorded
    assert "chunk_size" not in read_json(tmp_path / "ouro" / "config.json")


def test_a_dtype_that_is_asked_for_casts_to_the_nearest(tmp_path):
    model = load_model(write_published(tmp_path / "source", OURO, dtype="float32"))
    save_model(tmp_path / "saved", model)
    expected = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), model)
    assert_same_bits(to_hf_tensors(expected), to_hf_tensors(open_model(tmp_path / "saved", dtype="bfloat16")))


def test_weights_go_where_their_shardings_say(converted):
    device = jax.local_devices()[-1]
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",), devices=[device]), jax.P())
    for name in ("looplm", "ouro"):
        shardings = jax.tree.map(lambda _: sharding, abstract_model(OURO))
        opened = open_model(converted / name, shardings=shardings)
        assert all(weight.sharding == sharding for weight in jax.tree.leaves(opened))
        assert_same_bits(to_hf_tensors(open_model(converted / name)), to_hf_tensors(opened))


def test_models_spread_over_devices_come_back_to_their_places(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-m", "tests.helpers.shard_round_trip", tmp_path]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0 and "the same weights in the same places" in done.stdout, done.stderr


def test_weights_are_written_from_where_they_lie(tmp_path):
    """A dimension of 1, which makes TensorStore copy, costs no memory: the largest resident set stays what it was."""
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
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.25


def test_every_weight_that_disagrees_with_config_json_is_listed(tmp_path):
    model = load_model(write_published(tmp_path / "source", OURO))
    save_model(tmp_path / "saved", model)
    edit_config(tmp_path / "saved", num_hidden_layers=2, tie_word_embeddings=True, model_type="melt")
    with pytest.raises(ValueError) as error:
        open_model(tmp_path / "saved")
    lines = str(error.value).splitlines()
    stacked = [path for path, _ in module_leaves(model) if path.startswith("layers.")]
    for path in stacked:
        assert any(f"{path} has shape (3," in line and "expected (2," in line for line in lines), path
    assert any("lm_head" in line and "unknown" in line for line in lines)
    assert sum("kv_gate" in line and "is missing" in line for line in lines) == 3
    assert len(lines) == 1 + len(stacked) + 1 + 3


def test_weights_of_integers_and_unfinished_checkpoints_are_refused(tmp_path):
    model = load_model(write_published(tmp_path / "source", OURO))
    save_model(tmp_path / "saved", model)
    weights = dict(module_leaves(model)) | {"norm": np.ones(OURO.width, np.int32)}
    (tmp_path / "saved" / "params").rename(tmp_path / "aside")
    write_params(tmp_path / "saved" / "params", weights)
    with pytest.raises(ValueError, match="norm has dtype int32: expected one of bfloat16"):
        OrbaxFolder(tmp_path / "saved")
    (tmp_path / "half" / "params").mkdir(parents=True)
    (tmp_path / "half" / "config.json").write_bytes((tmp_path / "saved" / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no complete Orbax checkpoint"):
        open_model(tmp_path / "half")
    with pytest.raises(ValueError, match="no such folder"):
        open_model(tmp_path / "nowhere")


def test_an_interrupted_save_leaves_nothing_that_opens(tmp_path, monkeypatch):
    model = load_model(write_published(tmp_path / "source", OURO))

    def interrupted(folder, weights):
        write_params(folder, weights)
        raise KeyboardInterrupt

    monkeypatch.setattr("melt_jax.checkpoints.orbax.write_params", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "saved", model)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    monkeypatch.undo()
    # What a killed process leaves, a hidden folder without config.json, does not open, and the next save replaces it.
    write_params(tmp_path / ".saved.incomplete" / "params", dict(module_leaves(model)))
    with pytest.raises(ValueError, match=r"config.json is missing"):
        open_model(tmp_path / ".saved.incomplete")
    save_model(tmp_path / "saved", model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved", "source"]


def test_nest_undoes_paths():
    assert nest({"a": 1, "b.c": 2, "b.d.e": 3}) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


def test_digest_identifies_weights_in_either_form(converted, tmp_path):
    """Form, folder, files and config do not change it; one changed bit and another dtype do."""
    ouro = weights_digest(converted / "ouro")
    assert len(ouro) == 64
    assert {weights_digest(converted / name) for name in ("looplm", "ouro_again", "ouro_at_last")} == {ouro}
    assert weights_digest(converted / "melt") == weights_digest(converted / "melt_published") != ouro
    changed = shutil.copytree(converted / "ouro_again", tmp_path / "changed")
    edit_config(changed, eos_token_id=3)
    assert weights_digest(changed) == ouro

    def flip(tensors):
        tensors["lm_head.weight"].view(np.uint16)[0, 0] ^= 1

    edit_tensors(changed / "model.safetensors", flip)
    save_model(tmp_path / "wide", open_model(converted / "ouro", dtype="float32"))
    assert len({ouro, weights_digest(changed), weights_digest(tmp_path / "wide")}) == 3
