"""What attends the steps of a phase and changes none of them: log, performance, watchdog, profile, SIGTERM."""

import contextlib

import jax

from melt_jax.analysis.flops import step_flops
from melt_jax.training.log import RunLog
from melt_jax.training.performance import Performance, StepProfiler, peak_flops
from melt_jax.training.preemption import PreemptionNotice
from melt_jax.training.skipped import SkippedSteps
from melt_jax.training.watchdog import Watchdog


class StepMonitor:
    """Attends the steps of one phase, as a context manager. The metrics of a step are read while a later one runs.

    Args:
      name: of the phase.
      config: `TrainConfig`.
      model: `ModelConfig` of what is trained.
      folder: the phase's.
      start: steps of the phase that have been made.
      skipped: how many of them, counted back from the last, were skipped in a row.
      first_step: the run's step at which the phase begins.
      checkpoints: `Checkpoints` of the phase.
      console: where lines are printed.
    """

    def __init__(self, name, config, model, folder, start, skipped, first_step, checkpoints, console):
        self._steps, self._log_every = config.phase(name).steps, config.log_every
        self._start, self._checkpoints = start, checkpoints
        self._log = RunLog(folder, name, start, self._steps, console)
        batch, length = config.data.batch, config.data.length
        self._performance = Performance(batch * length, step_flops(model, name, batch, length).mfu_flops, peak_flops())
        self._profiler = StepProfiler(folder, config.run)
        self._watchdog = Watchdog(name, folder, config.run)
        self._preemption = PreemptionNotice()
        self._skipped = SkippedSteps(name, first_step, config.run.skipped_limit, start, skipped)
        self._contexts = contextlib.ExitStack()
        self._interval, self._ready = [], None

    def __enter__(self):
        with self._contexts as contexts:
            for part in (self._log, self._performance, self._profiler, self._watchdog, self._preemption):
                contexts.enter_context(part)
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *error):
        return self._contexts.__exit__(*error)

    @property
    def preempted(self):
        """Whether SIGTERM ended the steps, or came while they were ending; on every process the same."""
        return self._preemption.came

    def enumerate(self, batches):
        """(step, batch), counted on from the phase's start."""
        return enumerate(self._performance.timed(batches), self._start + 1)

    def annotate(self, step, state):
        """The context in which a step is dispatched; `state` is what the step before it computed."""
        return self._profiler.annotate(step, state)

    def after_dispatch(self, step, metrics):
        """Takes the metrics of a step under way, {name: (sum, count)}. Returns whether the loop ends with that step.

        Raises:
          NonFiniteError: too many steps in a row were skipped.
        """
        self._watchdog.after_dispatch(step, metrics["loss"][0])
        self._log.advance()
        self._read()  # the device has this step to do meanwhile
        self._interval.append(metrics)
        last = self._preemption.reached() or step == self._steps
        if step % self._log_every == 0 or last:
            self._interval, self._ready = [], (step, self._interval)
        return last

    def finish(self):
        """When the loop has ended: reads what is left and waits for the saves, which no SIGTERM must disturb."""
        self._read()
        self._checkpoints.wait_until_finished()

    def _read(self):
        if self._ready is None:
            return
        step, interval = self._ready
        self._ready, interval = None, jax.device_get(interval)
        self._log.write(step, interval, **self._performance.read(len(interval)))
        self._skipped.read(step, interval, latest=self._checkpoints.wait_until_finished)
