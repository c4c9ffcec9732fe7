"""A step compiled for TPUs that are not here: what it gathers, what it computes, whether it fits."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from melt_jax.analysis.chips import find_chip
from melt_jax.analysis.hlo import Program, innermost
from melt_jax.compile import SCOPES, Report

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
    "model.vocab": 512, "model.width": 256, "model.layers": 3, "model.heads": 4, "model.kv_heads": 4,
    "model.head_width": 64, "model.feed_forward": 512, "data.length": 512, "data.batch": 4, "mesh.tensor": 2,
    "micro_batches": 1, "chunk_size": 128, "attention_block": 128, "teacher": "none-such",
}  # fmt: skip


def record(**changes):
    """What `python -m melt_jax.compile --json` says of a small model on four v5e chips."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: nothing can be compiled for a TPU")
    phase = changes.pop("phase", "alignment")
    overrides = [f"--config.{key}={value}" for key, value in (SMALL | changes).items()]
    command = [sys.executable, "-m", "melt_jax.compile", "--json", "--config=configs/ouro_1_4b.py"]
    command += ["--topology=v5e:2x2", f"--phase={phase}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def test_weights_are_gathered_once_whatever_the_chunks():
    """With gather "step" one copy of both models moves, in bfloat16, in both phases; with "layer" many do."""
    once = [record(), record(phase="transition", chunk_size=64)]
    assert [entry["gathered_ratio"] for entry in once] == pytest.approx([1, 1], abs=0.2)
    assert all(1 < entry["flops_ratio"] < 2 and entry["fits"] for entry in once)
    at_use = record(gather="layer")
    moved = [sum(size for _, size in entry["collectives"].values()) for entry in (at_use, once[0])]
    assert moved[0] > 2 * moved[1]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_serving_counts_what_every_group_of_devices_computes(phase):
    """Two groups run the same sequences: what is computed and what is necessary are both twice one group's."""
    entry = record(phase=phase)
    assert entry["fits"] and entry["gathered_ratio"] is None and entry["steps"] == 0
    assert 0.5 < entry["flops_ratio"] < 1.5
    assert "in each of 2 group(s)" in entry["title"] and "remat" not in entry["title"]


def test_decoding_several_sequences_keeps_no_copy_of_their_cache():
    # Heads as wide as Ouro's: narrower ones are laid out anew, whatever writes them.
    entry = record(phase="decode", **{"data.length": 8192, "model.head_width": 128})
    cache = 2 * 3 * 4 * 8192 * 4 * 128 * 2 / 2  # keys and values, layers, sequences, slots, heads, width, bytes; tensor
    assert entry["arguments"] > cache and 0 < entry["temporaries"] < cache / 4
    assert entry["total"] < 1.5 * entry["arguments"]


def small_report(kind):
    return Report("a step", find_chip(kind), 4, 1.0, 5, 6, 7, 6, Program((), (), {}, ()), 1.0, 1, 1.0, 300)


def test_what_exceeds_the_chip_does_not_fit():
    report = small_report("TPU v5 lite")
    assert report.fits and report.total == 18 and "fits" in report.text()
    large = dataclasses.replace(report, temporaries=report.chip.device_memory)
    assert not large.fits and "DOES NOT FIT" in large.text()


def test_a_chip_without_figures_is_reported_without_them():
    known, unknown = (small_report(kind) for kind in ("TPU v5 lite", "TPU v3"))
    assert "peak rates" in known.text() and "peak rates" not in unknown.text()
    missing = {"chip", "chips", "memory", "compute_seconds", "collective_seconds", "chip_hours"}
    assert known.record().keys() - unknown.record().keys() == missing and unknown.record()["total"] == 18


def test_a_scope_is_not_taken_for_the_primitive_of_a_like_name():
    assert innermost("jit(train_step)/jit(_take)/gather", SCOPES) is None
    assert innermost("jit(train_step)/gather_weights/reshard", SCOPES) == "gather_weights"


def test_without_libtpu_it_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nf = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'libtpu' else f(n, *a)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "melt_jax.compile", "--config=configs/ouro_1_4b.py", "--topology=v5e:2x2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'jax[tpu]'" in done.stderr
