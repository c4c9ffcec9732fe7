"""Kills and resumes runs, and compares their results with an uninterrupted run's. Not part of the test suite.

    JAX_PLATFORMS=cpu python -m tests.long.kill_and_resume [--folder=/tmp/kill_and_resume]

Trains a small configs/nano.py three times: uninterrupted; killed with SIGKILL once in each phase; and stopped with
SIGTERM once in each phase, which must save the running step and exit with status 75. The same command resumes a stopped
run. Every leaf of every phase's model and of the last checkpoint must then be bitwise equal to the uninterrupted run's.
Prints a table and exits with status 1 if anything differs. Takes some minutes.
"""

import argparse
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from melt_jax.checkpoints.orbax import open_model
from melt_jax.training.checkpoints import flatten
from melt_jax.training.preemption import PREEMPTED

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = {"transition": 40, "alignment": 30}  # steps
# The signal is sent that many seconds after the log shows that step, to interrupt an arbitrary part of a step or save.
MOMENTS = {"transition": (17, 0.037), "alignment": (11, 0.091)}
OVERRIDES = {
    "chunk_size": 24,
    "data.batch": 2,
    "log_every": 1,
    "checkpoint_every": 4,
    "evaluation.problems": 0,
    "evaluation.sequences": 0,
    "evaluation.sample": False,
    **{f"{phase}.steps": steps for phase, steps in PHASES.items()},
}


def start(workdir):
    """Starts the training command in the background."""
    command = [sys.executable, "-m", "melt_jax.train", "--config=configs/nano.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    with open(workdir.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def last_step(workdir, phase):
    """The last step in a phase's log; 0 if there is none."""
    path = workdir / phase / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def checkpoints(workdir, phase):
    """The steps of a phase's complete checkpoints."""
    return sorted(int(path.name) for path in (workdir / phase / "checkpoints").glob("*") if path.name.isdecimal())


def interrupt(workdir, phase, number):
    """Starts the run and sends the signal at the phase's moment; returns a line of the table."""
    process, (step, later) = start(workdir), MOMENTS[phase]
    while last_step(workdir, phase) < step:
        if process.poll() is not None:
            raise SystemExit(f"{workdir}: exited with status {process.returncode} before {phase} {step}; see its .log")
        time.sleep(0.002)
    time.sleep(later)
    process.send_signal(number)
    status, seen = process.wait(), last_step(workdir, phase)
    return [number.name, phase, f"log at {seen}", f"status {status}", f"checkpoints {checkpoints(workdir, phase)}"]


def finish(workdir):
    """Runs the command to its end."""
    if status := start(workdir).wait():
        raise SystemExit(f"{workdir}: exited with status {status}; see its .log")


def read_checkpoint(folder):
    """{name: NumPy array} of a checkpoint that any devices may have written."""
    reader = ocp.PyTreeCheckpointer()
    stored = reader.metadata(folder).item_metadata.tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    return reader.restore(folder, restore_args=on_host)


def leaves(workdir, phases=PHASES):
    """{name: array} of every phase's model and the last phase's last checkpoint; `phases`: {name: steps}."""
    out = {}
    for phase, steps in phases.items():
        if phase == list(phases)[-1]:  # earlier phases' checkpoints are deleted
            state = read_checkpoint(workdir / phase / "checkpoints" / str(steps) / "default")
            out |= {f"{phase}.checkpoint.{name}": leaf for name, leaf in state.items()}
        model = open_model(workdir / phase / "model", dtype="float32")
        out |= {f"{phase}.model.{name}": np.asarray(leaf) for name, leaf in flatten(model).items()}
    return out


def differing(found, wanted):
    """The names of leaves that are missing on one side or not bitwise equal."""
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return sorted(found.keys() ^ wanted.keys()) + [
        name for name in found.keys() & wanted.keys() if not same(found[name], wanted[name])
    ]


def main():
    """Runs everything and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/kill_and_resume", type=pathlib.Path, help="replaced if it exists")
    folder = parser.parse_args().folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    finish(folder / "uninterrupted")
    wanted, failed = leaves(folder / "uninterrupted"), False
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, PREEMPTED)):
        workdir = folder / number.name
        for phase in PHASES:
            line = interrupt(workdir, phase, number)
            failed |= line[3] != f"status {int(status)}"
            print("  ".join(f"{word:14}" for word in line), flush=True)
        finish(workdir)
        different = differing(leaves(workdir), wanted)
        failed |= bool(different)
        print(f"{number.name}: {len(different)} of {len(wanted)} leaves differ", *different[:5])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
