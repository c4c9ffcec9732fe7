"""Trains with several processes on this machine and compares the results. Not part of the test suite.

    JAX_PLATFORMS=cpu python -m tests.long.processes [--folder=/tmp/processes]

Trains a small configs/nano.py by launch/local_processes.sh: on one device, and on four devices of one, two and four
processes. On the same mesh every loss, weight, moment and score must be bitwise equal; on another mesh sums are rounded
differently. Then runs receive SIGTERM in each phase, exit with status 75 and resume with other processes: bitwise equal
to the undisturbed run on the same mesh, up to rounding on another. Prints a table and exits with status 1 if anything
else is found. Takes about ten minutes on two cores.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from absl import logging

from melt_jax.checkpoints.orbax import open_model, save_model
from melt_jax.training.preemption import PREEMPTED
from tests.helpers.mesh_steps import relative
from tests.long.kill_and_resume import differing, last_step, leaves

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = {"transition": 24, "alignment": 16}  # steps
MOMENTS = {"transition": 5, "alignment": 4}  # SIGTERM is sent when the log shows that step
OVERRIDES = {
    "chunk_size": 36,
    "data.batch": 8,
    "log_every": 1,
    "checkpoint_every": 4,
    "evaluation.problems": 4,
    "evaluation.sequences": 4,
    "evaluation.sample": False,
    **{f"{phase}.steps": steps for phase, steps in PHASES.items()},
    **{f"{phase}.warmup_steps": 2 for phase in PHASES},
    # The paper's rates: with those of nano.py, the steps amplify rounding.
    **{f"{phase}.learning_rate": 8e-6 for phase in PHASES},
    **{f"{phase}.gate_learning_rate": 5e-4 for phase in PHASES},
}
UNMEASURED = {
    "evaluation.problems": 0,
    "evaluation.sequences": 0,
}  # for runs of several parts: evaluation takes most of their time
# Generous bounds of what rounding may change over a run: a loss, in nats; a weight, relative to its array's largest.
# That meshes compute the same is tested in float64, step by step (tests/helpers/mesh_steps.py).
LOSSES, WEIGHTS = 1e-4, 1e-2


@dataclasses.dataclass(frozen=True)
class Part:
    """One start of a run: the number of processes, devices of each, and the mesh, if it is not fsdp alone."""

    processes: int
    devices: int
    mesh: tuple = ()  # ((key, value), …)

    def __str__(self):
        return f"{self.processes}×{self.devices}" + "".join(f" {axis} {size}" for axis, size in self.mesh)


ONE, FOUR = Part(1, 1), Part(1, 4)
REFERENCE = (FOUR,)
SPLIT = Part(2, 2, (("tensor", 2),))
ALL_AXES = Part(2, 4, (("replica", 2), ("tensor", 2)))
# Runs, and whether they are bitwise equal to the reference. A run of several parts gets SIGTERM in each phase.
RUNS = (
    ((ONE,), False),
    ((Part(2, 2),), True),
    ((Part(4, 1),), True),
    ((SPLIT,), False),
    ((Part(2, 2), FOUR, Part(4, 1)), True),
    ((SPLIT, ONE, ALL_AXES), False),
)


def start(workdir, teacher, part, changes):
    """Starts the training command in the background."""
    command = ["launch/local_processes.sh", str(part.processes), "--config=configs/nano.py", f"--workdir={workdir}"]
    overrides = OVERRIDES | changes | {"teacher": teacher} | {f"mesh.{axis}": size for axis, size in part.mesh}
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    environment = os.environ | {"PYTHON_RUN": sys.executable, "DEVICES": str(part.devices)}
    environment["LOGS"] = str(workdir.with_suffix(".logs"))
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def train(workdir, teacher, parts):
    """Trains to the end, with SIGTERM between the parts, and returns the seconds it took."""
    begin, moments = time.monotonic(), list(MOMENTS.items())
    changes = UNMEASURED if len(parts) > 1 else {}
    for part in parts[:-1]:
        process, (phase, step) = start(workdir, teacher, part, changes), moments.pop(0)
        while last_step(workdir, phase) < step and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        if (status := process.wait()) != PREEMPTED:
            raise SystemExit(f"{workdir}: {part} exited with status {status}, expected {PREEMPTED}; see its .log")
    if status := start(workdir, teacher, parts[-1], changes).wait():
        raise SystemExit(f"{workdir}: {parts[-1]} ended with status {status}; see its .log")
    return time.monotonic() - begin


def losses(workdir):
    """The logged losses of both phases, one per step."""
    lines = [line for phase in PHASES for line in (workdir / phase / "metrics.jsonl").read_text().splitlines()]
    return np.array([json.loads(line)["loss"] for line in lines])


def compare(workdir, reference, exact):
    """([largest difference of a loss, of a weight; leaves that differ; leaves], whether they are as expected)."""
    found, wanted = leaves(workdir, PHASES), leaves(reference, PHASES)
    # NumPy's maximum keeps nan, which is below no bound; Python's may not.
    loss = np.max(np.abs(losses(workdir) - losses(reference)))
    weight = np.max([relative(found[name], x) for name, x in wanted.items() if ".model." in name])
    wrong = differing(found, wanted)
    fine = found.keys() == wanted.keys() and loss < LOSSES and weight < WEIGHTS
    measured = [folder / "results.json" for folder in (workdir, reference) if (workdir / "results.json").exists()]
    if exact:
        fine &= not wrong and not loss and len({path.read_text() for path in measured}) <= 1
    return [loss, weight, len(wrong), len(wanted)], fine


def main():
    """Runs everything and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/processes", type=pathlib.Path, help="replaced if it exists")
    logging.set_verbosity(logging.ERROR)  # Orbax warns of reading a run's checkpoint alone
    folder = parser.parse_args().folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    looplm = "melt_jax/assets/ouro_nano"
    save_model(folder / "teacher", open_model(ROOT / looplm), ROOT / looplm)  # Orbax form: every process reads it

    reference, failed = folder / "reference", False
    seconds = train(reference, folder / "teacher", REFERENCE)
    print(f"processes × devices of each; compared with 1×4, {seconds:.0f} s")
    print(f"{'run':<48} {'losses':>8} {'weights':>8}  leaves that differ")
    for number, (parts, exact) in enumerate(RUNS):
        workdir = folder / f"run{number}"
        seconds = train(workdir, folder / "teacher", parts)
        (loss, weight, wrong, count), fine = compare(workdir, reference, exact)
        failed |= not fine
        name = " → ".join(map(str, parts))
        verdict = ("bitwise equal" if exact else "rounding") if fine else "WRONG"
        print(f"{name:<48} {loss:8.1e} {weight:8.1e}  {wrong} of {count}: {verdict}, {seconds:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
