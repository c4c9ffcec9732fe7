"""Steps skipped because a loss or gradient was not finite: a few are passed over, many in a row stop the run."""


class NonFiniteError(RuntimeError):
    """Too many steps in a row whose loss or gradient was not finite."""


class SkippedSteps:
    """Counts skipped steps in a row as the metrics are read, some steps after they ran.

    Args:
      phase: its name.
      first_step: the run's step at which the phase begins.
      limit: skipped steps in a row that stop the run.
      start: the phase's step from which the run goes on.
      row: steps skipped in a row before that one and with it, as the checkpoint has them.

    Raises:
      NonFiniteError: the limit is reached already, so that a run does not pass over what stopped it before.
    """

    def __init__(self, phase, first_step, limit, start=0, row=0):
        self._phase, self._first_step, self._limit = phase, first_step, limit
        self._row = row
        self._check(start, lambda: start)

    def read(self, step, interval, latest):
        """Takes the metrics of the steps that end with `step`, each with "skipped": (0 or 1, 1).

        Args:
          step: of the phase.
          interval: [{name: (sum, count)}], numbers.
          latest: a function; the step of the newest whole checkpoint, or None.

        Raises:
          NonFiniteError: the limit is reached; says where, and where a run that is started again begins.
        """
        for at, metrics in enumerate(interval, step - len(interval) + 1):
            self._row = self._row + 1 if metrics["skipped"][0] else 0
            self._check(at, latest)

    def _check(self, at, latest):
        if self._row < self._limit:
            return
        first, batch = at - self._row + 1, self._first_step + at - 1
        raise NonFiniteError(
            f"{self._phase}: the loss or a gradient was not finite in {self._row} steps in a row, {first} to {at}"
            f" (batches {batch - self._row + 1} to {batch} of the run); they were skipped and the weights are those of"
            f" step {first - 1}. The same command begins at {_place(latest())}, with the steps skipped before it"
            " counted: look at those batches, or lower the learning rate in another workdir"
        )


def _place(checkpoint):
    return "the phase's beginning" if checkpoint is None else f"checkpoint {checkpoint}"
