"""What a run costs: seconds, tokens, model FLOPs and memory of an interval; profiles of chosen steps.

Nothing here makes a step wait, except the two ends of a profile.
"""

import contextlib
import time

import jax

from melt_jax.analysis.chips import find_chip

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Performance:
    """Measures the steps between readings, as a context manager.

    Args:
      tokens: of one step's global batch, padding among them.
      flops: that one step needs, over all devices (`melt_jax.analysis.flops`, `StepFlops.mfu_flops`).
      peak: FLOP/s of all devices together, or None where it is not known, and then there is no MFU.
    """

    def __init__(self, tokens, flops, peak=None):
        self._tokens, self._flops, self._peak = tokens, flops, peak
        self._waiting = self._compiling = 0.0
        self._read = time.perf_counter()

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._event)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._event)

    def timed(self, batches):
        """The same batches; the time that they keep the loop waiting is measured."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waiting += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def read(self, steps):
        """The numbers of the steps since the last reading, called when the device has finished them.

        Returns:
          {name: number}:
          `seconds_per_step`: from reading to reading, saving and waiting included, compilation left out;
          `tokens_per_second`: of all devices, by that time;
          `mfu`: the FLOPs that a step needs, those of the teacher among them and nothing that is computed again, by
            that time and by the devices' bf16 peak; a document is taken to fill its sequence;
          `data_seconds`: how long the loop waited for batches;
          `compile_seconds`: how long XLA compiled, where it did: a phase's first step, and hopefully no other;
          `memory_bytes`: the most that one of this process's devices has had in use so far, where it tells.
        """
        now = time.perf_counter()
        seconds = max(now - self._read - self._compiling, 1e-9) / max(steps, 1)
        numbers = {
            "seconds_per_step": seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_seconds": self._waiting,
        }
        if self._peak:
            numbers["mfu"] = self._flops / seconds / self._peak
        if self._compiling:
            numbers["compile_seconds"] = self._compiling
        if memory := [stats["peak_bytes_in_use"] for stats in _memory_stats() if "peak_bytes_in_use" in stats]:
            numbers["memory_bytes"] = max(memory)
        self._read, self._waiting, self._compiling = now, 0.0, 0.0
        return numbers

    def _event(self, name, seconds, **_):
        if name == COMPILE_EVENT:
            self._compiling += seconds


def peak_flops():
    """The bf16 FLOP/s of all devices together, or None where the chip is not known (a CPU)."""
    chip = find_chip(jax.devices()[0].device_kind)
    return chip and chip.device_flops * jax.device_count()


class StepProfiler:
    """Traces chosen steps for xprof, into `folder`, as a context manager; TensorBoard shows them too.

    Args:
      folder: of the phase.
      run: `melt_jax.config.RunConfig`: `profile_start`, the first step, from 1 (0: none), and `profile_steps`.
    """

    def __init__(self, folder, run):
        self._folder = str(folder)
        self._steps = range(run.profile_start, run.profile_start + run.profile_steps) if run.profile_start else ()
        self._tracing = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    @contextlib.contextmanager
    def annotate(self, step, state):
        """Around the dispatch of a step; `state` is what the step before it computed."""
        if step in self._steps and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif self._tracing and step not in self._steps:
            jax.block_until_ready(state)
            self._stop()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _stop(self):
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def _memory_stats():
    return [device.memory_stats() or {} for device in jax.local_devices()]
