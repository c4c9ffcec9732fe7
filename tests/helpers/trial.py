"""The outcome of a trial: a line of the table that `tests.long.trials` prints."""

import dataclasses
import time
from collections.abc import Iterable


@dataclasses.dataclass
class Trial:
    """Counts cases and keeps what failed.

    Attributes:
      name: of the trial.
      cases: how many there were.
      failures: one message for each case that failed.
      worst: the worst figure of all cases.
    """

    name: str
    cases: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    worst: str = ""

    def case(self, name: str, error: object = "") -> bool:
        """Counts a case, which failed if `error` is not empty; returns whether it survived."""
        self.cases += 1
        if error:
            self.failures.append(f"{name}: {error}")
            print(f"    {self.name}: {self.failures[-1]}", flush=True)
        return not error

    @property
    def survived(self) -> int:
        """Cases that did not fail."""
        return self.cases - len(self.failures)

    def row(self, seconds: float) -> str:
        """The line of the table."""
        return f"{self.name:34} {self.cases:6} {self.survived:9} {seconds:7.0f}  {self.worst}"


def print_trials(trials: Iterable[tuple]) -> int:
    """Runs trials, (function, *arguments) that return a `Trial`; prints the table, and returns the exit status."""
    print(HEADING, flush=True)
    failed = False
    for work, *arguments in trials:
        begin = time.monotonic()
        trial = work(*arguments)
        print(trial.row(time.monotonic() - begin), flush=True)
        failed |= trial.survived < trial.cases
    return int(failed)


HEADING = f"{'trial':34} {'cases':>6} {'survived':>9} {'time, s':>7}  worst figure"
