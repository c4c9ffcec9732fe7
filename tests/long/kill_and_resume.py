"""Kills runs at random moments, resumes them, and compares the results with an undisturbed run. Not in the test suite.

    python -m tests.long.kill_and_resume [--processes=2] [--signal=SIGTERM] [--kills=25] [--seed=0]

Takes the shortest time of an undisturbed run (two phases, saves, evaluations, models). Then starts a run and sends
SIGKILL to its processes at a moment drawn uniformly from that time; starts it again, draws another moment, and so on,
until it ends before its moment. The ended run must equal the undisturbed one: every leaf of every phase's model and of
the last checkpoint, every number of every line of the logs but times, and the scores, all bitwise. Then the next run
starts, until there were enough kills. With SIGTERM a run must also exit with status 75, or 0 if it has ended.

Times are those that a processor works for the first process, so that other load of the machine shifts no moment.
The interpreters' imports, during which a run touches nothing, are not part of the time: commands are forks of this one.
"""

import argparse
import collections
import contextlib
import pathlib
import shutil
import signal
import sys
import time

import numpy as np

from melt_jax.training.preemption import PREEMPTED
from tests.helpers.run_commands import Fork, kill
from tests.helpers.runs import PHASES, contents, differing, log_of, prepare, start
from tests.helpers.trial import Trial, print_trials

PATIENCE = 1800  # seconds that a run may take on a machine of any speed


def run_to_end(workdir: pathlib.Path, processes: int = 1, **changes: object) -> float:
    """Runs a small run to its end; returns the processor seconds of its first process.

    Raises:
      RuntimeError: a process failed.
    """
    statuses = wait_for(started := start(workdir, processes, **changes), PATIENCE)
    if statuses != [0] * processes:
        kill(started)
        logs = "\n".join(log_of(workdir, i).read_text()[-3000:] for i in range(processes))
        raise RuntimeError(f"{workdir}: expected status 0, found {statuses}\n{logs}")
    return started[0].processor_seconds()


def wait_for(started: list[Fork], seconds: float) -> list[int | None]:
    """Waits at most that long for all processes; returns their exit statuses, None for those that still run."""
    end = time.monotonic() + seconds
    return [fork.wait(max(end - time.monotonic(), 0)) for fork in started]


def place(workdir: pathlib.Path, started: float) -> str:
    """Where a run is that was started at that time, by its files: "start", a phase, "after" one; and "saving"."""
    names = [name for phase in PHASES for name in (phase, f"{phase}/model")]
    reached = [name for name in names if (workdir / name).exists()]
    saving, now = [*workdir.glob("*/checkpoints/*tmp*"), *workdir.glob("*/.model.incomplete")], False
    for path in saving:
        with contextlib.suppress(OSError):  # the save ends
            now |= path.stat().st_mtime > started  # others were left by an earlier kill
    last = reached[-1] if reached else "start"
    return (f"after {last[:-6]}" if last.endswith("/model") else last) + (", saving" if now else "")


def interrupt(workdir: pathlib.Path, processes: int, moment: float, number: int) -> tuple[str, list[int | None], float]:
    """Starts a run and sends all its processes a signal at that many processor seconds.

    Returns:
      (where it was, empty if it had ended before; exit statuses; processor seconds of its first process).
    """
    begin, started = time.time(), start(workdir, processes)
    while started[0].processor_seconds() < moment and started[0].poll() is None:
        time.sleep(0.01)
    if started[0].poll() is not None:
        return "", wait_for(started, PATIENCE), started[0].processor_seconds()
    where = place(workdir, begin)
    kill(started, number)
    statuses = wait_for(started, PATIENCE)
    kill(started)
    ended = statuses == [0] * processes  # before the signal reached it
    return "" if ended else where, statuses, started[0].processor_seconds()


def kill_at_random(folder: pathlib.Path, processes: int, number: int, kills: int, seed: int) -> Trial:
    """The trial of the module; leaves the folders of failed runs behind.

    Args:
      folder: a folder with `teacher`.
      processes: of a run.
      number: SIGKILL or SIGTERM.
      kills: how many.
      seed: of the moments.
    """
    trial = Trial(f"{signal.Signals(number).name} anywhere, {processes} process{'es' * (processes > 1)}")
    reference, seconds = folder / f"undisturbed{processes}", float("inf")
    if not reference.exists():
        seconds = run_to_end(reference, processes)  # compiles
    timed = folder / f"{number}.{processes}.timed"
    shutil.rmtree(timed, ignore_errors=True)
    seconds, wanted = min(seconds, run_to_end(timed, processes)), contents(reference)
    if different := differing(contents(timed), wanted):
        raise RuntimeError(f"two undisturbed runs differ in {len(different)} values: {different[:5]}")
    rng, places, runs, most = np.random.default_rng((seed, processes, number)), collections.Counter(), 0, 0
    while trial.cases < kills:
        workdir, moments, error = folder / f"{number}.{processes}.{runs}", [], ""
        runs += 1
        shutil.rmtree(workdir, ignore_errors=True)
        while not error:
            moment = rng.uniform(0, seconds) if trial.cases + len(moments) < kills else PATIENCE
            where, statuses, used = interrupt(workdir, processes, moment, number)
            if not where:
                seconds = seconds if moments else min(seconds, used)  # waiting for another process takes time, too
                error = "" if statuses == [0] * processes else f"resumed run: statuses {statuses}"
                break
            allowed = {0, -number} if number == signal.SIGKILL else {0, PREEMPTED}
            moments.append(f"{moment:.2f} s ({where})")
            places[where] += 1
            if not set(statuses) <= allowed:
                error = f"statuses {statuses}"
        if not error and (different := differing(contents(workdir), wanted)):
            error = f"{len(different)} of {len(wanted)} values differ: {', '.join(different[:3])}"
        most = max(most, len(moments))
        text = ", ".join(moments) or "no moment"
        print(f"    {trial.name}: {workdir.name} of {seconds:.1f} s, {text}: {error or 'equal'}", flush=True)
        for name in moments[:-1]:
            trial.case(name)
        if moments or error:
            trial.case(str(workdir), error)
        if not error:
            shutil.rmtree(workdir)
    found = ", ".join(f"{count} {where}" for where, count in sorted(places.items()))
    trial.worst = f"{runs} runs of {seconds:.1f} processor seconds, at most {most} kills in one; {found}"
    return trial


def main() -> int:
    """Runs the trial and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/kill_and_resume", type=pathlib.Path, help="replaced if it exists")
    parser.add_argument("--processes", default=1, type=int)
    parser.add_argument("--signal", default="SIGKILL", choices=("SIGKILL", "SIGTERM"))
    parser.add_argument("--kills", default=25, type=int)
    parser.add_argument("--seed", default=0, type=int, help="of the moments")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    prepare(folder, anew=True)
    number = signal.Signals[arguments.signal]
    return print_trials([(kill_at_random, folder, arguments.processes, number, arguments.kills, arguments.seed)])


if __name__ == "__main__":
    sys.exit(main())
