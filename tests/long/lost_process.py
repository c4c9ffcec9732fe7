"""Kills one of four processes in a step, a save and an evaluation; the others must end and name it. Not in the suite.

    python -m tests.long.lost_process [--seed=0]

A small run of four processes is started again and again; each time a random process, in one case process 0, which
serves the others, is killed with SIGKILL at one of these moments. The other processes must end by themselves within
`run.lost_seconds` and a margin, with a status that launchers restart, and a message that names the lost process. At
last the run ends undisturbed and must equal an undisturbed run, bitwise.
"""

import argparse
import pathlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable

import numpy as np

from tests.helpers.run_commands import Fork, kill
from tests.helpers.runs import contents, differing, last_step, log_of, prepare, start
from tests.helpers.trial import Trial, print_trials
from tests.long.kill_and_resume import PATIENCE, run_to_end, wait_for

PROCESSES, LOST_SECONDS = 4, 20
MARGIN = 60  # seconds for the machine, which may be busy


def moments(rng: np.random.Generator, workdir: pathlib.Path) -> dict[str, tuple[int, Callable[[], object]]]:
    """{name: (the process that dies, whether the moment has come)}."""
    step, process = int(rng.integers(1, 6)), lambda: int(rng.integers(1, PROCESSES))
    return {
        f"transition step {step + 1}": (process(), lambda: last_step(workdir, "transition") >= step),
        "save": (process(), lambda: [*(workdir / "transition/checkpoints").glob("*tmp*")]),
        "evaluation": (process(), lambda: "after transition" in log_of(workdir).read_text()),
        "alignment step 2, process 0": (0, lambda: last_step(workdir, "alignment") >= 1),
    }


def lose(workdir: pathlib.Path, process: int, came: Callable[[], object]) -> tuple[str, float]:
    """Runs until the moment has come, kills one process and waits for the others.

    Returns:
      (what was wrong, seconds until all had ended).
    """
    sizes = [log.stat().st_size if (log := log_of(workdir, i)).exists() else 0 for i in range(PROCESSES)]
    started: list[Fork] = start(workdir, PROCESSES, run__lost_seconds=LOST_SECONDS)
    deadline = time.monotonic() + PATIENCE
    while not came():
        if any(fork.poll() is not None for fork in started) or time.monotonic() > deadline:
            kill(started)
            return f"statuses {[fork.wait() for fork in started]} before the moment", 0.0
        time.sleep(0.01)
    kill([started[process]])
    begin = time.monotonic()
    statuses = wait_for(started, LOST_SECONDS + MARGIN)
    seconds = time.monotonic() - begin
    kill(started)
    for i, status in enumerate(statuses):
        text = log_of(workdir, i).read_text()[sizes[i] :]
        if i != process and status != -signal.SIGABRT:
            return f"process {i}: status {status} after {seconds:.0f} s", seconds
        named = rf"stopped sending heartbeats\):\s*{process}\s" + ("|leader task was" if process == 0 else "")
        if i != process and not re.search(named, text):
            return f"process {i} does not name process {process}: {text[-600:]}", seconds
    return "", seconds


def lose_processes(folder: pathlib.Path, seed: int = 0) -> Trial:
    """The trial of the module, in a folder with `teacher`."""
    trial, longest = Trial("one of 4 processes lost"), 0.0
    run_to_end(folder / "undisturbed4", PROCESSES)
    wanted, workdir = contents(folder / "undisturbed4"), folder / "lost"
    shutil.rmtree(workdir, ignore_errors=True)
    log_of(workdir).write_text("")
    for name, (process, came) in moments(np.random.default_rng(seed), workdir).items():
        error, seconds = lose(workdir, process, came)
        longest = max(longest, seconds)
        trial.case(f"process {process}, {name}", error)
        print(f"    {trial.name}: process {process}, {name}: {seconds:.1f} s; {error[:200] or 'ended'}", flush=True)
    run_to_end(workdir, PROCESSES)
    different = differing(contents(workdir), wanted)
    trial.case("resumed", different and f"{len(different)} values differ: {different[:3]}")
    trial.worst = f"{longest:.1f} s until all had ended, run.lost_seconds {LOST_SECONDS}"
    return trial


def main() -> int:
    """Runs the trial and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/lost_process", type=pathlib.Path, help="replaced if it exists")
    parser.add_argument("--seed", default=0, type=int)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    prepare(folder, anew=True)
    return print_trials([(lose_processes, folder, arguments.seed)])


if __name__ == "__main__":
    sys.exit(main())
