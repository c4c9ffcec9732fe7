"""Where a run's time goes, over all its attempts, and which code ran.

A run that is killed and resumed has several attempts. Process 0 keeps one file for each, `attempts/0001.json`, … in the
workdir, and rewrites it at every line of the log. The seconds of an attempt are those of process 0. They are split
without overlap:

    training    steps, including the host's work between them
    compiling   XLA's compilation, wherever it happens
    saving      checkpoints and models, as far as the run waits for them
    evaluating  measurements at the end of phases
    waiting     the loop waits for batches
    loading     everything else: the teacher, the restored state, the optimizer's state

A summary of several attempts adds two:

    repeated    training of steps after the checkpoint from which the next attempt resumed; they run again
    stopped     from an attempt's last record to the next attempt's start
"""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
from rich.console import Console

from melt_jax.config import InputError
from melt_jax.files import Path, make_folder, read_json, write_text

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CATEGORIES: tuple[str, ...] = ("training", "compiling", "saving", "evaluating", "waiting", "loading")
clock = time.time

_current: "Attempt | None" = None  # of this process


@contextlib.contextmanager
def spent(category: str) -> Iterator[None]:
    """Counts the time of a block, or of a function that it decorates, as one of `CATEGORIES`.

    Blocks nest: an inner block's time is not counted for the outer one. Without an `Attempt` nothing is counted.
    """
    if _current is None:
        yield
        return
    before = _current.switch(category)
    try:
        yield
    finally:
        if _current is not None:
            _current.switch(before)


def record(phase: str, step: int) -> None:
    """Notes that a phase has finished `step` steps, or starts after them, and rewrites the attempt's file."""
    if _current is not None:
        _current.record(phase, step)


def goodput_numbers() -> dict[str, float]:
    """{"goodput": …, "goodput/training_seconds": …, …} of all attempts up to the last record; empty without one."""
    if _current is None:
        return {}
    goodput = _current.goodput()
    seconds = {f"goodput/{name}_seconds": value for name, value in goodput.seconds.items()}
    return {"goodput": goodput.fraction, "goodput/attempts": float(goodput.attempts), **seconds}


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The seconds of a run's attempts.

    Attributes:
      attempts: their number.
      seconds: by category; their sum is the time from the first attempt's start to the last one's last record.
    """

    attempts: int
    seconds: dict[str, float]

    @property
    def fraction(self) -> float:
        """The share of training whose steps counted."""
        return self.seconds["training"] / max(sum(self.seconds.values()), 1e-9)

    def __str__(self) -> str:
        """One line."""
        parts = ", ".join(f"{name} {value:,.1f}" for name, value in self.seconds.items())
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        total = sum(self.seconds.values())
        return f"goodput {self.fraction:.1%} of {total:,.1f} s in {attempts}; seconds: {parts}"


def summarize(attempts: Sequence[dict[str, Any]]) -> Goodput:
    """Adds up attempts, the contents of their files in order."""
    seconds = {name: float(sum(attempt["seconds"][name] for attempt in attempts)) for name in CATEGORIES}
    repeated = stopped = 0.0
    for i, attempt in enumerate(attempts):
        later = attempts[i + 1 :]
        stopped += max(later[0]["started"] - attempt["updated"], 0.0) if later else 0.0
        for phase, steps in attempt["phases"].items():
            resumed = next((other["phases"][phase]["start"] for other in later if phase in other["phases"]), None)
            taken = steps["last"] - steps["start"]
            if resumed is not None and taken:
                repeated += steps["seconds"] * min(max(steps["last"] - resumed, 0), taken) / taken
    seconds["training"] -= repeated
    return Goodput(len(attempts), seconds | {"repeated": repeated, "stopped": stopped})


def read_attempts(workdir: Path) -> list[dict[str, Any]]:
    """The attempts of a workdir, in order."""
    folder = workdir / "attempts"
    files = sorted(folder.glob("*.json"), key=lambda path: path.name) if folder.exists() else []
    attempts = []
    for path in files:
        if not path.name.startswith("."):
            attempts.append(read_json(path))
            if missing := {"started", "updated", "seconds", "phases"} - set(attempts[-1]):
                raise InputError(f"{path}: expected {', '.join(sorted(missing))}, found none; remove the file")
    return attempts


def _next_number(folder: Path) -> int:
    """One more than the largest number in the name of a file; files may be missing."""
    names = [path.stem for path in folder.glob("*.json")] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0) + 1


class Attempt:
    """One attempt of a run, as a context manager. At its end it prints the goodput of all attempts.

    Args:
      workdir: the run's folder.
      console: where the line is printed; process 0 only.
    """

    def __init__(self, workdir: Path, console: Console) -> None:
        self._console, self._writes = console, jax.process_index() == 0
        self._earlier = read_attempts(workdir) if self._writes else []
        self._path = workdir / "attempts" / f"{_next_number(workdir / 'attempts'):04}.json"
        self._started = self._since = clock()
        self._category = "loading"
        self._seconds: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
        self._phases: dict[str, dict[str, float]] = {}
        self._trained = 0.0  # seconds of training before the current phase
        self._facts = {"git_commit": git_commit(), "devices": jax.device_count(), "processes": jax.process_count()}

    def __enter__(self) -> Self:
        global _current
        _current = self
        jax.monitoring.register_event_duration_secs_listener(self._event)
        if self._writes:
            make_folder(self._path.parent)
        self._write()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _current
        _current = None
        jax.monitoring.unregister_event_duration_listener(self._event)
        self.switch(self._category)
        self._write()
        if kind is None or issubclass(kind, SystemExit):
            self._console.print(str(self.goodput()), markup=False)

    def switch(self, category: str) -> str:
        """Counts the time from here on as this category; returns the one before."""
        now, before = clock(), self._category
        self._seconds[before] += now - self._since
        self._since, self._category = now, category
        return before

    def record(self, phase: str, step: int) -> None:
        """See `record`."""
        self.switch(self._category)
        if phase not in self._phases:
            self._phases[phase] = {"start": step, "last": step, "seconds": 0.0}
            self._trained = self._seconds["training"]
        self._phases[phase] |= {"last": step, "seconds": self._seconds["training"] - self._trained}
        self._write()

    def goodput(self) -> Goodput:
        """Of this attempt and the earlier ones."""
        return summarize([*self._earlier, self._contents()])

    def _contents(self) -> dict[str, Any]:
        times = {"started": self._started, "updated": self._since}
        return self._facts | times | {"seconds": dict(self._seconds), "phases": self._phases}

    def _write(self) -> None:
        if self._writes:
            write_text(self._path, json.dumps(self._contents(), indent=1))

    def _event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:  # it lies within the current block
            self._seconds["compiling"] += duration_secs
            self._seconds[self._category] -= duration_secs


def git_commit() -> str | None:
    """The commit of the source folder, with `-dirty` if tracked files differ from it; None outside a git repository."""
    folder = pathlib.Path(__file__).resolve().parent
    try:
        ask = lambda *words: subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        commit = ask("rev-parse", "HEAD")
        return commit + "-dirty" if ask("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None
