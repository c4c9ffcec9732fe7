"""Trains with several processes on this machine and compares the results. Not part of the test suite.

    JAX_PLATFORMS=cpu python -m tests.long.processes [--folder=/tmp/processes]

Trains a small configs/nano.py with launch/local_processes.sh: on one device, and on four devices of one, two and four
processes. Some runs also receive SIGTERM in each phase, must exit with status 75, and resume with other processes. On
the mesh of the reference run every loss, weight, moment and score must be bitwise equal. Prints a table and exits with
status 1 if one is not. Takes about ten minutes on two cores.

Runs on other meshes round sums differently, and many float32 steps amplify rounding without a derived bound, so their
differences are printed but not judged. `tests.helpers.mesh_steps` tests in float64 that a step does not depend on the
mesh; tests/test_sharding.py runs it.
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
from tests.helpers.runs import differing, last_step, leaves

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = {"transition": 24, "alignment": 16}  # steps
MOMENTS = {"transition": 5, "alignment": 4}  # SIGTERM is sent when the log shows that step
OVERRIDES = {
    "chunk_size": 36,
    "data.batch": 8,
    "student.window": 0,
    "alignment.reduction": "sum",
    "alignment.beta": 0.001,
    "log_every": 1,
    "checkpoint_every": 4,
    "evaluation.problems": 4,
    "evaluation.sequences": 4,
    "evaluation.sample": False,
    **{f"{phase}.steps": steps for phase, steps in PHASES.items()},
    **{f"{phase}.warmup_steps": 2 for phase in PHASES},
    # The paper's rates: those of nano.py amplify rounding more.
    **{f"{phase}.learning_rate": 8e-6 for phase in PHASES},
    **{f"{phase}.gate_learning_rate": 5e-4 for phase in PHASES},
}
# Overrides of runs of several parts, most of whose time evaluation would take.
UNMEASURED = {"evaluation.problems": 0, "evaluation.sequences": 0}


@dataclasses.dataclass(frozen=True)
class Part:
    """One start of a run: the number of processes, the devices of each, and the mesh unless it is fsdp alone."""

    processes: int
    devices: int
    mesh: tuple = ()  # ((key, value), …)

    def __str__(self):
        return f"{self.processes}×{self.devices}" + "".join(f" {axis} {size}" for axis, size in self.mesh)


ONE, FOUR = Part(1, 1), Part(1, 4)
REFERENCE = (FOUR,)
SPLIT = Part(2, 2, (("tensor", 2),))
ALL_AXES = Part(2, 4, (("replica", 2), ("tensor", 2)))
# Runs, and whether they use the reference's mesh and so must equal it bitwise. A run of several parts receives SIGTERM
# in each phase.
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
    """Trains to the end, with SIGTERM between the parts; returns the seconds it took."""
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
        raise SystemExit(f"{workdir}: {parts[-1]} exited with status {status}; see its .log")
    return time.monotonic() - begin


def losses(workdir):
    """The logged losses of both phases, one per step."""
    lines = [line for phase in PHASES for line in (workdir / phase / "metrics.jsonl").read_text().splitlines()]
    return np.array([json.loads(line)["loss"] for line in lines])


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a run is from the reference."""

    loss: float  # the largest of any step, nats
    weight: float  # the largest of any weight, relative to the largest number of its array
    leaves: int  # arrays that are not bitwise equal
    compared: int  # arrays
    same_results: bool  # results.json, if the run has one

    @property
    def bitwise_equal(self) -> bool:
        """False also if both runs have the same nan: its differences are nan, not 0."""
        return self.loss == 0 and self.weight == 0 and self.leaves == 0 and self.same_results


def compare(workdir, reference):
    """The `Difference` of two runs."""
    found, wanted = leaves(workdir, PHASES), leaves(reference, PHASES)
    # NumPy's maximum keeps nan; Python's may not.
    loss = np.max(np.abs(losses(workdir) - losses(reference)))
    weight = np.max([relative(found[name], x) for name, x in wanted.items() if ".model." in name])
    measured = [folder / "results.json" for folder in (workdir, reference) if (workdir / "results.json").exists()]
    same_results = len({path.read_text() for path in measured}) <= 1
    return Difference(loss, weight, len(differing(found, wanted)), len(wanted), same_results)


def main():
    """Runs everything and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/processes", type=pathlib.Path, help="replaced if it exists")
    logging.set_verbosity(logging.ERROR)  # Orbax warns if a checkpoint is read without its manager
    folder = parser.parse_args().folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    looplm = "melt_jax/assets/ouro_nano"
    save_model(folder / "teacher", open_model(ROOT / looplm), ROOT / looplm)  # Orbax form: all processes read it

    reference, failed = folder / "reference", False
    seconds = train(reference, folder / "teacher", REFERENCE)
    print(f"processes × devices of each; compared with 1×4, which took {seconds:.0f} s")
    print(f"{'run':<48} {'losses':>8} {'weights':>8}  leaves that differ")
    for number, (parts, exact) in enumerate(RUNS):
        workdir = folder / f"run{number}"
        seconds = train(workdir, folder / "teacher", parts)
        difference = compare(workdir, reference)
        failed |= exact and not difference.bitwise_equal
        if exact:
            verdict = "bitwise equal" if difference.bitwise_equal else "FAIL, expected bitwise equal"
        else:
            verdict = "other mesh, not judged"
        columns = f"{' → '.join(map(str, parts)):<48} {difference.loss:8.1e} {difference.weight:8.1e}"
        count = f"{difference.leaves} of {difference.compared}"
        print(f"{columns}  {count}: {verdict}, {seconds:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
