"""Steps skipped because the loss or a gradient was not finite: a few are tolerated, many in a row stop the run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from melt_jax.config import InputError
from melt_jax.training.log import NOT_FINITE


class NonFiniteError(InputError):
    """The loss or a gradient was not finite in too many steps in a row."""


class SkippedSteps:
    """Counts skipped steps in a row from the metrics, which are read some steps later.

    Args:
      phase: its name, for messages.
      first_step: the run's step at which the phase begins.
      limit: skipped steps in a row that stop the run.
      start: the phase's step from which the run resumes.
      row: steps skipped in a row up to `start`, from the checkpoint.
      report: called with a line for each skipped step.

    Raises:
      NonFiniteError: the checkpoint already reaches the limit, so resuming would ignore the cause of the stop.
    """

    def __init__(
        self,
        phase: str,
        first_step: int,
        limit: int,
        start: int = 0,
        row: int = 0,
        report: Callable[[str], object] = print,
    ):
        self._report = report
        self._phase, self._first_step, self._limit = phase, first_step, limit
        self._row = row
        self._check(start, lambda: start)

    def read(
        self,
        step: int,
        interval: Sequence[Mapping[str, tuple[Any, Any]]],
        latest: Callable[[], int | None],
        weights: Callable[[], list[str]] = list,
    ) -> None:
        """Reads the metrics of consecutive steps that end with `step`.

        Args:
          step: the phase's step.
          interval: [{name: (sum, count)}] on the host, each with "skipped": (0 or 1, 1).
          latest: returns the step of the newest complete checkpoint, or None.
          weights: returns the names of the weights that are not finite; called if a step was skipped.

        Raises:
          NonFiniteError: the limit is reached; the message names the batches and the checkpoint to resume from.
        """
        for at, metrics in enumerate(interval, step - len(interval) + 1):
            self._row = self._row + 1 if metrics["skipped"][0] else 0
            if self._row:
                self._report(self._line(at, metrics, weights()))
            self._check(at, latest)

    def _line(self, at, metrics, weights):
        """What was not finite in a skipped step."""
        causes = [name.removeprefix(NOT_FINITE) for name in metrics if name.startswith(NOT_FINITE) and metrics[name][0]]
        shown = ", ".join(weights[:3]) + (f" and {len(weights) - 3} more" if len(weights) > 3 else "")
        found = f"{', '.join(causes) or 'the loss or a gradient'} not finite"
        where = f"; so are the weights {shown}, and no later step can be" if weights else ""
        return (
            f"warning: {self._phase}: step {at} (batch {self._first_step + at - 1} of the run) skipped: {found}{where}"
        )

    def _check(self, at, latest):
        if self._row < self._limit:
            return
        first, batch = at - self._row + 1, self._first_step + at - 1
        raise NonFiniteError(
            f"{self._phase}: the loss or a gradient was not finite in {self._row} steps in a row, {first} to {at}"
            f" (batches {batch - self._row + 1} to {batch} of the run); they were skipped, so the weights are those of"
            f" step {first - 1}. The same command would resume from {_place(latest())} and count the steps skipped"
            " before it; inspect those batches, or use a lower learning rate in another workdir"
        )


def _place(checkpoint):
    return "the phase's beginning" if checkpoint is None else f"checkpoint {checkpoint}"
