"""Trains with several processes on this machine, and compares: a command of its own, not part of the suite.

    JAX_PLATFORMS=cpu python -m tests.long.processes [--folder=/tmp/processes]

Trains configs/nano.py, made small, by launch/local_processes.sh: on one device, and on four as one process, two and
four have them. Where devices and mesh are the same, every loss, weight, moment and score must have the same bits; on
one device they may differ by how sums are rounded. Then runs that get SIGTERM in each phase, leave with status 75 and
go on with other processes: on the same mesh to the same bits as the undisturbed run, on other meshes to the rounding of
sums. Prints a table; exits with 1 where anything else is found. Takes some ten minutes on two cores.
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
MOMENTS = {"transition": 5, "alignment": 4}  # SIGTERM comes when the log shows that step
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
    # The paper's rates: those of nano.py are for few steps, and blow the rounding of a sum up from one to the next.
    **{f"{phase}.learning_rate": 8e-6 for phase in PHASES},
    **{f"{phase}.gate_learning_rate": 5e-4 for phase in PHASES},
}
UNMEASURED = {"evaluation.problems": 0, "evaluation.sequences": 0}  # runs of several parts: it takes most of their time
LOSSES, WEIGHTS = 1e-6, 1e-5  # how much rounding may change: a loss, nats; a weight, relative to its largest number


@dataclasses.dataclass(frozen=True)
class Part:
    """One start of a run: so many processes, devices of each, and the mesh, where it is not fsdp alone."""

    processes: int
    devices: int
    mesh: tuple = ()  # ((key, value), …)

    def __str__(self):
        return f"{self.processes}×{self.devices}" + "".join(f" {axis} {size}" for axis, size in self.mesh)


ONE, FOUR = Part(1, 1), Part(1, 4)
REFERENCE = (FOUR,)
SPLIT = Part(2, 2, (("tensor", 2),))
ALL_AXES = Part(2, 4, (("replica", 2), ("tensor", 2)))
# Each with whether it is to have the reference's bits. A run of several parts gets SIGTERM in each phase.
RUNS = (
    ((ONE,), False),
    ((Part(2, 2),), True),
    ((Part(4, 1),), True),
    ((SPLIT,), False),
    ((Part(2, 2), FOUR, Part(4, 1)), True),
    ((SPLIT, ONE, ALL_AXES), False),
)


def start(workdir, teacher, part, changes):
    """The training command on so many processes, in the background."""
    command = ["launch/local_processes.sh", str(part.processes), "--config=configs/nano.py", f"--workdir={workdir}"]
    overrides = OVERRIDES | changes | {"teacher": teacher} | {f"mesh.{axis}": size for axis, size in part.mesh}
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    environment = os.environ | {"PYTHON_RUN": sys.executable, "DEVICES": str(part.devices)}
    environment["LOGS"] = str(workdir.with_suffix(".logs"))
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def train(workdir, teacher, parts):
    """The run to its end: SIGTERM in each phase while there are parts to go on with. Returns the seconds it took."""
    begin, moments = time.monotonic(), list(MOMENTS.items())
    changes = UNMEASURED if len(parts) > 1 else {}
    for part in parts[:-1]:
        process, (phase, step) = start(workdir, teacher, part, changes), moments.pop(0)
        while last_step(workdir, phase) < step and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        if (status := process.wait()) != PREEMPTED:
            raise SystemExit(f"{workdir}: {part} left with status {status}, expected {PREEMPTED}; see its .log")
    if status := start(workdir, teacher, parts[-1], changes).wait():
        raise SystemExit(f"{workdir}: {parts[-1]} ended with status {status}; see its .log")
    return time.monotonic() - begin


def losses(workdir):
    """[steps of both phases] as the logs have them."""
    lines = [line for phase in PHASES for line in (workdir / phase / "metrics.jsonl").read_text().splitlines()]
    return np.array([json.loads(line)["loss"] for line in lines])


def compare(workdir, reference, exact):
    """([largest difference of a loss, of a weight; leaves that differ; leaves], whether that is as it should be)."""
    found, wanted = leaves(workdir, PHASES), leaves(reference, PHASES)
    # By NumPy, which keeps a nan, and nan is below no bound.
    loss = np.max(np.abs(losses(workdir) - losses(reference)))
    weight = np.max([relative(found[name], x) for name, x in wanted.items() if ".model." in name])
    wrong = differing(found, wanted)
    fine = found.keys() == wanted.keys() and loss < LOSSES and weight < WEIGHTS
    measured = [folder / "results.json" for folder in (workdir, reference) if (workdir / "results.json").exists()]
    if exact:
        fine &= not wrong and not loss and len({path.read_text() for path in measured}) <= 1
    return [loss, weight, len(wrong), len(wanted)], fine


def main():
    """Runs it all; the exit status says whether all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/processes", type=pathlib.Path, help="made anew")
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
        verdict = ("the same bits" if exact else "rounding") if fine else "WRONG"
        print(f"{name:<48} {loss:8.1e} {weight:8.1e}  {wrong} of {count}: {verdict}, {seconds:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
