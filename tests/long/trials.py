"""Faults, load, bad input and determinism: runs all trials and prints one table. The suite runs its --short form.

    python -m tests.long.trials [--folder=/tmp/trials] [--only=load] [--short]

The trials are those of `tests.long.kill_and_resume`, `.lost_process`, `.damage`, `.load`, `.determinism` and
`.bad_input`. The outcome of a finished trial is stored in the folder, and a trial whose outcome is there is not run
again; remove the folder to start anew. Exits with status 1 if a case failed. --short runs a small part of each.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

from tests.helpers.runs import ROOT, prepare
from tests.helpers.trial import HEADING, Trial
from tests.long import damage, determinism, kill_and_resume, load, lost_process

Function = Callable[[pathlib.Path, bool], Trial]


def _bad_input(folder: pathlib.Path, short: bool) -> Trial:
    """`tests.long.bad_input` in a process of its own, which uses JAX."""
    command = [sys.executable, "-m", "tests.long.bad_input", *(["--every=200"] if short else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, flush=True)
    rows = re.findall(r"^(\w+) +(\d+) +(\d+) +([\d.]+)$", done.stdout, re.MULTILINE)
    trial = Trial("bad input", sum(int(cases) for _, cases, _, _ in rows))
    failed = trial.cases - sum(int(survived) for _, _, survived, _ in rows)
    trial.failures = [done.stdout[-2000:] + done.stderr[-2000:]] * max(failed, int(done.returncode != 0))
    trial.worst = f"slowest case {max((float(seconds) for *_, seconds in rows), default=0):.1f} s"
    return trial


def _kill(processes: int, number: int, kills: int, few: int) -> Function:
    return lambda folder, short: kill_and_resume.kill_at_random(folder, processes, number, few if short else kills, 0)


def _damage(processes: int, every: int, rarely: int) -> Function:
    return lambda folder, short: damage.damage_each_file(folder, processes, rarely if short else every)


TRIALS: dict[str, Function] = {
    "killed_1": _kill(1, signal.SIGKILL, 25, 2),
    "killed_2": _kill(2, signal.SIGKILL, 25, 1),
    "stopped_1": _kill(1, signal.SIGTERM, 10, 1),
    "lost_process": lambda folder, short: lost_process.lose_processes(folder),
    "damaged_1": _damage(1, 1, 19),
    "damaged_2": _damage(2, 3, 99),  # each file, and each damage as often
    "load_prompts": lambda folder, short: load.many_prompts(4 if short else 64),
    "load_tokens": lambda folder, short: load.long_generations(300 if short else 10_000),
    "load_steps": lambda folder, short: load.many_steps(folder, 500 if short else 2000),
    "equal_bits": lambda folder, short: determinism.equal_runs(folder),
    "rounded_steps": lambda folder, short: determinism.rounded_steps(short),
    "rounded_runs": lambda folder, short: determinism.rounded_runs(folder),
    "bad_input": _bad_input,
}
SHORT = ("killed_1", "damaged_1")  # other tests of the suite state what the other trials state


def run_trial(name: str, folder: pathlib.Path, short: bool) -> tuple[Trial, float]:
    """The outcome and the seconds of a trial: those of an earlier run, if the folder has them."""
    path = folder / f"{name}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        return Trial(**stored["trial"]), stored["seconds"]
    begin = time.monotonic()
    try:
        trial = TRIALS[name](folder, short)
    except Exception as error:
        traceback.print_exc()
        trial = Trial(name, 1, [str(error)], "the trial itself failed")
    seconds = time.monotonic() - begin
    if trial.survived == trial.cases:  # others run again
        path.write_text(json.dumps({"trial": dataclasses.asdict(trial), "seconds": seconds}, indent=1))
    return trial, seconds


def main() -> int:
    """Runs the trials and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/trials", type=pathlib.Path, help="kept; has the outcomes")
    parser.add_argument("--only", choices=TRIALS, action="append", help="a trial to run; by default all")
    parser.add_argument("--short", action="store_true", help="a small part, in a folder of its own")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if (folder / "teacher").exists() and (folder / "short").exists() != arguments.short:
        raise SystemExit(f"{folder}: has outcomes of another length; remove it or use another --folder")
    prepare(folder)
    if arguments.short:
        (folder / "short").touch()
    outcomes = []
    for name in arguments.only or (SHORT if arguments.short else TRIALS):
        outcomes.append(run_trial(name, folder, arguments.short))
        print(outcomes[-1][0].row(outcomes[-1][1]), flush=True)
    print("\n".join([HEADING, *(trial.row(seconds) for trial, seconds in outcomes)]))
    return int(any(trial.survived < trial.cases for trial, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
