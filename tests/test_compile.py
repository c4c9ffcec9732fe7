"""Programs compiled for TPU topologies: gathers, FLOPs, memory, and errors of one line."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from melt_jax import compile as command
from melt_jax.analysis.topology import describe_devices
from melt_jax.command_line import load_config
from melt_jax.config import InputError, ModelConfig, freeze
from melt_jax.sharding import ShardingError, make_mesh
from tests.helpers.topology import topology_devices

# With a compilation cache, JAX tries and fails to load programs for devices that are only described.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning")

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ModelConfig(vocab=512, width=256, layers=3, heads=4, kv_heads=4, head_width=64, feed_forward=512)
SETTINGS = {
    "data.length": 512, "data.batch": 4, "mesh.tensor": 2, "micro_batches": 1, "chunk_size": 128,
    "attention_block": 128, "teacher": "none-such",
}  # fmt: skip


def compile_small(phase="alignment", model=MODEL, **changes):
    """Returns the report of a small model's program on four v5e chips, fsdp 2 × tensor 2."""
    overrides = [(key, str(value)) for key, value in (SETTINGS | changes).items()]
    config = freeze(load_config("configs/ouro_1_4b.py", overrides))
    return command.compile_phase(config, model, make_mesh(config.mesh, topology_devices("v5e:2x2")), phase)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "chunk"), [("alignment", 128), ("transition", 64)])
def test_weights_are_gathered_once_per_step(phase, chunk):
    """With gather "step" one copy of both models moves, in bfloat16, for any chunk size."""
    report = compile_small(phase, chunk_size=chunk)
    assert report.gathered_ratio == pytest.approx(1, abs=0.05)
    assert report.record()["unknown_gathers"] == 0 and not report.program.unknown_loops
    assert 1 < report.flops_ratio < 2 and report.fits and report.steps > 0


@pytest.mark.slow
def test_attention_kernel_moves_less():
    """The kernel compiles under a mesh that splits sequences and heads, and has about the FLOPs of XLA's loop."""
    model = dataclasses.replace(MODEL, head_width=128)
    kernel, blocks = (compile_small(model=model, attention=attention) for attention in ("pallas", "blocks"))
    assert kernel.program.custom_calls == {} and kernel.gathered_ratio == pytest.approx(1, abs=0.05)
    assert sum(product.op_name.endswith("pallas_call") for product in kernel.program.products) >= 3
    assert kernel.program.flops == pytest.approx(blocks.program.flops, rel=0.1)
    assert kernel.program.memory_bytes < blocks.program.memory_bytes


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "evaluate"])
def test_inference_compiles_with_the_kernel(phase):
    """A run that trains with the kernel also generates, without it."""
    model = dataclasses.replace(MODEL, head_width=128)
    report = compile_small(phase, model=model, attention="pallas")
    kernels = [product for product in report.program.products if product.op_name.endswith("pallas_call")]
    assert report.fits and bool(kernels) == (phase == "evaluate")


@pytest.mark.slow
def test_gathering_at_each_use_moves_more():
    report = compile_small(gather="layer")
    assert report.gathered_ratio > 10 and report.record()["unknown_gathers"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("gather", "gathered"), [("step", False), ("layer", True)])
def test_evaluation_scores_a_micro_batch(gather, gathered):
    """With gather "step" weights are whole during the evaluation; with "layer" they are gathered at each use."""
    report = compile_small("evaluate", gather=gather, **{"data.batch": 8, "micro_batches": 2})
    assert report.title.splitlines()[1].startswith("4 sequences of 512 tokens")
    assert 0.9 < report.flops_ratio < 1.5 and report.fits and report.steps == 0
    assert (report.gathered_ratio is not None) == gathered


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_serving_counts_all_groups(phase):
    """Both groups run all sequences, so the computed and the necessary FLOPs are both twice those of one group."""
    report = compile_small(phase)
    assert report.fits and report.gathered_ratio is None and report.steps == 0
    assert 0.5 < report.flops_ratio < 1.5 and not report.program.unknown_loops
    assert "in each of 2 group(s)" in report.title and "remat" not in report.title


@pytest.mark.slow
def test_decoding_keeps_no_copy_of_the_cache():
    # Heads as wide as Ouro's: the compiler copies narrower ones to another layout.
    model = dataclasses.replace(MODEL, head_width=128)
    memory = compile_small("decode", model, **{"data.length": 8192}).memory
    cache = 2 * 3 * 4 * 8192 * 4 * 128 * 2 / 2  # keys and values, L, B, S, K, E, bytes; over tensor
    assert memory.arguments > cache and 0 < memory.temporaries < cache / 4
    assert memory.total < 1.5 * memory.arguments


def test_lack_of_memory_is_bad_input(monkeypatch):
    def refuse(lowered):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, 24.4G of 15.8G.\nBuffers: …")

    monkeypatch.setattr(command, "_compile", refuse)
    with pytest.raises(InputError, match=r"decode on 4 × TPU v5 lite DOES NOT FIT: RESOURCE_EXHAUSTED.*15.8G.$"):
        compile_small("decode")


def test_indivisible_batch_is_refused():
    with pytest.raises(ShardingError, match=r"data.batch: expected a multiple of 2 .*found 3"):
        compile_small(**{"data.batch": 3})


def test_unknown_topologies_are_refused():
    with pytest.raises(
        InputError, match="topology: expected one such as v5e:4x4 or v5p:2x2x2, found 'v9:1x1'"
    ) as error:
        describe_devices("v9:1x1")
    assert "\n" not in str(error.value)


def run_command(*flags, path=ROOT):
    """Runs the command; returns the finished process."""
    line = [sys.executable, "-m", "melt_jax.compile", "--config=configs/ouro_1_4b.py", "--topology=v5e:2x2", *flags]
    return subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True)


@pytest.mark.slow
def test_command_prints_a_record():
    model = {f"model.{field}": value for field, value in dataclasses.asdict(MODEL).items() if field in SMALL_FIELDS}
    done = run_command(
        "--json", "--phase=prefill", *(f"--config.{key}={value}" for key, value in (SETTINGS | model).items())
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert record["fits"] and record["gather_group"] == 1 and record["temporaries"] > 0


SMALL_FIELDS = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "feed_forward")


def test_missing_libtpu_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nf = u.find_spec\nu.find_spec = lambda n, *a: None if n == 'libtpu' else f(n, *a)\n"
    )
    done = run_command(path=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("melt_jax.compile: libtpu: expected")
    assert done.stderr.rstrip().endswith("pip install 'jax[tpu]'")
