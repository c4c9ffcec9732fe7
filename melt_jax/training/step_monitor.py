"""Log, performance, watchdog, profile and SIGTERM handling of a phase's steps; none affects the results."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import jax
from rich.console import Console

from melt_jax.analysis.flops import step_flops
from melt_jax.config import ModelConfig, TrainConfig
from melt_jax.files import Path
from melt_jax.training import attempts
from melt_jax.training.checkpoints import Checkpoints
from melt_jax.training.log import RunLog, StepMetrics
from melt_jax.training.performance import Performance, StepProfiler, peak_flops
from melt_jax.training.preemption import PreemptionNotice
from melt_jax.training.skipped import SkippedSteps
from melt_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class PhaseStart:
    """Where a phase starts or resumes.

    Attributes:
      step: steps of the phase taken so far.
      skipped: consecutive skipped steps up to the last one.
      first_step: steps of the run before the phase.
    """

    step: int = 0
    skipped: int = 0
    first_step: int = 0


class StepMonitor:
    """Monitors the steps of one phase, as a context manager.

    The host is never more than one step ahead: before step n + 1 is dispatched, step n − 1 has finished. So the run
    stops within about two steps of SIGTERM, and the device, which still has step n to run, does not wait for the host.

    Args:
      name: the phase's name.
      config: the run's config.
      model: the trained model's config.
      folder: the phase's folder.
      start: where the phase starts.
      checkpoints: the phase's checkpoints.
      console: where lines are printed.
    """

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        model: ModelConfig,
        folder: Path,
        start: PhaseStart,
        checkpoints: Checkpoints,
        console: Console | None,
    ) -> None:
        self._steps, self._log_every = config.phase(name).steps, config.log_every
        self._name, self._start, self._checkpoints = name, start.step, checkpoints
        self._log = RunLog(folder, name, start.step, self._steps, console)
        batch, length = config.data.batch, config.data.length
        flops = step_flops(model, name, batch, length, config.chunk_size).mfu_flops
        self._performance = Performance(batch * length, flops, peak_flops())
        self._profiler = StepProfiler(folder, config.run)
        self._watchdog = Watchdog(name, folder, config.run)
        self._preemption = PreemptionNotice()
        self._skipped = SkippedSteps(
            name, start.first_step, config.run.skipped_limit, start.step, start.skipped, self._log.console.print
        )
        self._weights: Callable[[], list[str]] = list
        self._contexts = contextlib.ExitStack()
        self._interval: list[StepMetrics] = []  # of the steps since the last line of the log
        self._unread: tuple[int, list[StepMetrics]] | None = None  # a whole interval and its last step
        self._running: jax.Array | None = None  # an output of the latest step

    def __enter__(self) -> Self:
        with self._contexts as contexts:
            for part in (self._log, self._performance, self._profiler, self._watchdog, self._preemption):
                contexts.enter_context(part)
            contexts.enter_context(attempts.spent("training"))
            attempts.record(self._name, self._start)
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    @property
    def preempted(self) -> bool:
        """Whether SIGTERM was received, before or during the last step; the same in every process."""
        return self._preemption.came

    def enumerate(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yields (step, batch), with steps counted from 1 at the phase's start."""
        return enumerate(self._performance.timed(batches), self._start + 1)

    @contextlib.contextmanager
    def annotate(self, step: int, state: Any) -> Iterator[None]:
        """The context in which a step is dispatched. `state` is the previous step's output.

        Inside it, implicit transfers between host and device raise, because they would make the step wait.
        """
        with self._profiler.annotate(step, state), jax.transfer_guard("disallow"):
            yield

    def after_dispatch(self, step: int, metrics: StepMetrics, weights: Callable[[], list[str]] = list) -> bool:
        """Takes a dispatched step's metrics, waits for the step before it, and returns whether this step is the last.

        If a step was skipped, `weights` is called for the names of the weights that are not finite.

        Raises:
          NonFiniteError: too many steps in a row were skipped.
        """
        loss, self._weights = metrics["loss"][0], weights
        self._watchdog.after_dispatch(step, loss)
        if self._running is not None:
            self._running.block_until_ready()
        self._running = loss
        self._read()
        self._log.advance()
        self._interval.append(metrics)
        last = self._preemption.reached() or step == self._steps
        if step == 1 or step % self._log_every == 0 or last:
            self._interval, self._unread = [], (step, self._interval)
        return last

    def write_log(self) -> None:
        """Writes the line of the log that is due. Call it before a step is saved: a resumed run writes only later ones.

        It waits for the step, as saving it does.
        """
        self._read()

    def finish(self) -> None:
        """Reads the remaining metrics and waits for checkpoints being saved. Call it after the loop.

        Meanwhile SIGTERM is only recorded, so that it does not interrupt a save.
        """
        self._read()
        self._checkpoints.wait_until_finished()

    def _read(self) -> None:
        if self._unread is None:
            return
        step, interval = self._unread
        self._unread, interval = None, jax.device_get(interval)
        numbers = self._performance.read(len(interval))
        attempts.record(self._name, step)
        if step == self._steps:
            numbers |= attempts.goodput_numbers()
        self._log.write(step, interval, **numbers)
        self._skipped.read(step, interval, latest=self._checkpoints.wait_until_finished, weights=self._weights)
