"""Equal runs are the same bits; other layouts differ by rounding that is bounded. Not in the test suite.

    python -m tests.long.determinism

- Two runs of one config, and runs on as many devices of one or two processes, must be bitwise equal.
- A step with other micro-batches or on another mesh adds the same numbers in another order. The result is then the
  exact one of weights that differ by some eps of themselves, and to first order differs by K·eps, where K is the
  condition number of the step. K is measured in float64: how much more a metric or moment changes (relative to the
  largest number of its array) than weights that are changed at random by up to one float32 eps. In float32 the
  difference must be at most `MARGIN`·K·eps: a product of a few hundred numbers rounds that often.
- Over a whole run no bound is known for losses. A weight can move by at most its learning rate in a step of AdamW with
  1 − b1 ≤ √(1 − b2), plus its decay, so weights of two runs differ by at most 2 Σ (rate · (1 + decay·|weight|)).
"""

import argparse
import os
import pathlib
import shutil
import sys

import jax
import numpy as np

from configs import nano
from melt_jax.config import MeshConfig
from melt_jax.sharding import make_mesh
from tests.helpers.mesh_steps import MESHES, gap, one_step
from tests.helpers.mesh_steps import PHASES as STEP_PHASES
from tests.helpers.run_commands import in_fork
from tests.helpers.runs import PHASES, contents, differing, prepare
from tests.helpers.trial import Trial, print_trials
from tests.helpers.xla_flags import QUICK
from tests.long.kill_and_resume import run_to_end

MARGIN = 16
ONE = MeshConfig()
# {variant: (mesh, micro-batches)} of a step, compared with one device and one micro-batch
VARIANTS = {"2 micro-batches": (ONE, 2), "4 micro-batches": (ONE, 4)} | {
    f"mesh {name}": (MeshConfig(*shape), 1) for name, shape in MESHES.items()
}


def equal_runs(folder: pathlib.Path) -> Trial:
    """Two runs of one config, and the same mesh of other processes; in a folder with `teacher`."""
    trial = Trial("equal bits")
    layouts = {"a": {}, "b": {}, "two": {"processes": 2}, "two again": {"processes": 2}, "one": {"devices": 2}}
    found = {}
    for name, layout in layouts.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        run_to_end(folder / name, joined=name == "one", **layout)
        found[name] = contents(folder / name)
    for name, other in (("a", "b"), ("two", "two again"), ("two", "one")):
        different = differing(found[name], found[other])
        trial.case(f"{name}, {other}", different and f"{len(different)} values differ: {different[:3]}")
    trial.worst = f"{len(found['a'])} values each: arrays, numbers of logs, scores"
    return trial


def rounded_steps(short: bool = False) -> Trial:
    """Steps with other micro-batches and on other meshes."""
    trial, worst, largest = Trial("rounding of a step"), 0.0, 0.0
    names = ["2 micro-batches", "mesh mixed"] if short else list(VARIANTS)
    condition = in_fork(_conditions)
    for name, found in in_fork(_gaps, names).items():
        k = condition[name.split(",")[0]]
        worst, largest = max(worst, found / k), max(largest, found)
        text = f"{found:.0f} eps, condition number {k:.0f}"
        print(f"    {trial.name}: {name}: {text}", flush=True)
        trial.case(name, (not found <= MARGIN * k) and text)
    trial.worst = f"{largest:.0f} eps of float32; at most {worst:.1f} times the condition number (bound {MARGIN})"
    return trial


def _conditions() -> dict[str, float]:
    """{phase: the condition number of a step}, measured in float64."""
    eps, mesh = float(np.finfo("float32").eps), make_mesh(ONE, jax.devices()[:1])
    with jax.enable_x64(True):
        return {
            phase: gap(one_step(phase, mesh, "step", 1, noise=eps), one_step(phase, mesh, "step", 1)) / eps
            for phase in STEP_PHASES
        }


def _gaps(names: list[str]) -> dict[str, float]:
    """{phase and variant: the largest difference of a metric or moment in float32, in units of eps}."""
    os.environ["XLA_FLAGS"] = f"{QUICK} --xla_force_host_platform_device_count=8"
    eps, one = np.finfo("float32").eps, jax.devices()[:1]
    out = {}
    for phase in STEP_PHASES:
        wanted = one_step(phase, make_mesh(ONE, one), "step", 1, dtype="float32")
        for name in names:
            shape, parts = VARIANTS[name]
            mesh = make_mesh(shape, one if shape == ONE else jax.devices())
            out[f"{phase}, {name}"] = gap(one_step(phase, mesh, "step", parts, dtype="float32"), wanted) / eps
    return out


def rounded_runs(folder: pathlib.Path) -> Trial:
    """Whole runs with other micro-batches and on other meshes, compared with `equal_runs`' first."""
    trial, figures = Trial("rounding of a run"), []
    if not (folder / "a").exists():
        run_to_end(folder / "a")
    wanted = contents(folder / "a")
    for name, layout in {
        "2 micro-batches": {"micro_batches": 2},
        "2 devices": {"devices": 2},
        "tensor 2": {"devices": 2, "mesh__fsdp": 1, "mesh__tensor": 2},
    }.items():
        shutil.rmtree(folder / "other", ignore_errors=True)
        run_to_end(folder / "other", **layout)
        found = contents(folder / "other")
        weights = [key for key in wanted if ".model." in key]
        losses = [key for key in wanted if key.endswith(" loss")]
        weight = max(float(np.max(np.abs(found[key] - wanted[key]))) for key in weights)
        loss = max(abs(found[key] - wanted[key]) for key in losses)
        bound = _weight_bound(max(float(np.max(np.abs(wanted[key]))) for key in weights))
        figures.append(f"{name}: losses {loss:.1e} nats, weights {weight:.1e}")
        trial.case(name, (not weight <= bound) and f"weights differ by {weight:.1e}, more than {bound:.1e}")
        trial.worst = f"{'; '.join(figures)} (bound {bound:.2f})"
    return trial


def _weight_bound(largest: float) -> float:
    """2 Σ (rate · (1 + decay·|weight|)) of a small run, at the peak of the larger rate."""
    config, total = nano.get_config(), 0.0
    for phase, steps in PHASES.items():
        rate = max(config[phase].learning_rate, config[phase].gate_learning_rate)
        total += 2 * steps * rate * (1 + config.optimizer.weight_decay * (largest + steps * rate))
    return total


def main() -> int:
    """Runs the trials and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/determinism", type=pathlib.Path, help="replaced if it exists")
    folder = parser.parse_args().folder.absolute()
    prepare(folder, anew=True)
    return print_trials([(rounded_steps,), (equal_runs, folder), (rounded_runs, folder)])


if __name__ == "__main__":
    sys.exit(main())
