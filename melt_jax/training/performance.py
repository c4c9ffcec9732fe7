"""Time, throughput, MFU and memory of a run's steps, and profiles of chosen steps.

Measuring does not delay any step; profiling does, at its first step and after its last.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

import jax

from melt_jax.analysis.chips import find_chip
from melt_jax.config import RunConfig
from melt_jax.files import Path, folder_on_disk
from melt_jax.training.attempts import COMPILE_EVENT, spent

T = TypeVar("T")


class Performance:
    """Measures the steps between two readings, as a context manager.

    Args:
      tokens: tokens in a step's global batch, including padding.
      flops: FLOPs that one step needs on all devices together (`StepFlops.mfu_flops` of `melt_jax.analysis.flops`).
      peak: peak FLOP/s of all devices together; None if unknown; MFU is then not reported.
    """

    def __init__(self, tokens: int, flops: float, peak: float | None = None) -> None:
        self._tokens, self._flops, self._peak = tokens, flops, peak
        self._waiting = self._compiling = 0.0
        self._read = time.perf_counter()

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._event)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches and measures how long the loop waits for them."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                with spent("waiting"):
                    batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting += time.perf_counter() - start
            yield batch

    def read(self, steps: int) -> dict[str, float]:
        """The measurements since the last reading. Call it when the device has finished these steps.

        Returns:
          {name: number}:
          `seconds_per_step`: from reading to reading, including data and checkpoints, without compilation;
          `tokens_per_second`: of all devices, computed from that time;
          `mfu`: FLOPs that a step needs (the teacher's included, recomputation not, each document counted as a
            full sequence), divided by that time and the devices' bf16 peak;
          `data_seconds`: how long the loop waited for batches;
          `compile_seconds`: how long XLA compiled, if it did; normally in the first step of a phase only;
          `memory_bytes`: the peak of this process's fullest device so far, if the device reports it.
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

    def _event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            self._compiling += duration_secs


def peak_flops() -> float | None:
    """The peak bf16 FLOP/s of all devices together; None if the chip is unknown, such as a CPU."""
    chip = find_chip(jax.devices()[0].device_kind)
    return chip.device_flops * jax.device_count() if chip else None


class StepProfiler:
    """Traces chosen steps for xprof and TensorBoard, as a context manager.

    Args:
      folder: the phase's folder, to which traces are written.
      run: `profile_start`, the first step, counted from 1 (0: none), and `profile_steps` are used.
    """

    def __init__(self, folder: Path, run: RunConfig) -> None:
        self._folder, self._contexts = folder, contextlib.ExitStack()
        self._steps = range(run.profile_start, run.profile_start + run.profile_steps) if run.profile_start else ()
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def annotate(self, step: int, state: Any) -> Iterator[None]:
        """The context in which a step is dispatched. `state` is the previous step's output."""
        if step in self._steps and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._contexts.enter_context(folder_on_disk(self._folder))))
            self._tracing = True
        elif self._tracing and step not in self._steps:
            jax.block_until_ready(state)
            self._stop()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._contexts.close()
            self._tracing = False


def _memory_stats() -> list[dict[str, Any]]:
    return [device.memory_stats() or {} for device in jax.local_devices()]
