"""A watchdog over the steps of a phase: it reports when the device stops finishing them."""

import collections
import faulthandler
import math
import os
import sys
import tempfile
import threading
import time
from typing import Any, Self

import jax

from melt_jax.config import RunConfig
from melt_jax.files import Path, append_text
from melt_jax.training.preemption import STALLED

WRITE_SECONDS = 10.0  # how long a report may take to be written


class Watchdog:
    """Reports a stall and, if configured, ends the process; a context manager around the steps of a phase.

    A step has finished when the device has computed its metrics. A daemon thread polls for that, so no step waits.
    Anything that keeps steps from finishing is a stall: a collective waiting for a lost host, missing data, a
    checkpoint that cannot be written.

    Args:
      phase: its name, for the report.
      folder: the phase's folder; the stacks of all threads are appended to `stall-process<i>.txt` in it.
      run: `stall_seconds` (0 disables the watchdog), `stall_first_seconds` and `stall_exits` are used.
    """

    def __init__(self, phase: str, folder: Path, run: RunConfig) -> None:
        self._phase, self._run = phase, run
        self._file = folder / f"stall-process{jax.process_index()}.txt"
        # (step, one of its outputs) of the dispatched steps that are not known to have finished
        self._steps: collections.deque[tuple[int, Any]] = collections.deque()
        self._finished: int | None = None
        self._reported: float | None = None
        self._since = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        if self._run.stall_seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._run.stall_seconds:
            self._thread.join()

    def after_dispatch(self, step: int, scalar: jax.Array) -> None:
        """Records that a step was dispatched; `scalar` is one of its outputs."""
        if self._run.stall_seconds:
            self._steps.append((step, scalar))

    def check(self) -> None:
        """Reports a stall if no step has finished for the configured time, once per stall."""
        while self._steps and self._steps[0][1].is_ready():
            self._finished, self._since = self._steps.popleft()[0], time.monotonic()
        # The first step after a start includes its compilation.
        allowed = self._run.stall_seconds
        if self._finished is None:
            allowed = max(allowed, self._run.stall_first_seconds or math.inf)
        if time.monotonic() - self._since > allowed and self._reported != self._since:
            self._reported = self._since
            self._report(allowed)

    def _poll(self) -> None:
        while not self._closed.wait(min(self._run.stall_seconds / 10, 1.0)):
            self.check()

    def _report(self, allowed: float) -> None:
        last = "none so far" if self._finished is None else f"the last was step {self._finished}"
        pending = [step for step, _ in list(self._steps)]
        running = f"step {pending[0]} is running" if pending else "no later step was dispatched"
        message = (
            f"{self._phase}: no step has finished for {allowed:g} s ({last}; {running}), process"
            f" {jax.process_index()}. Stacks of all threads, also in {self._file}:"
        )
        print(message, file=sys.stderr, flush=True)
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            report = f"{message}\n{stacks.read()}"
        # In a thread that is not waited for forever: a bucket that cannot be reached may be the cause of the stall.
        writer = threading.Thread(target=append_text, args=(self._file, report), daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)
        if self._run.stall_exits:
            print(f"exiting with status {STALLED}; rerun the command to resume", file=sys.stderr, flush=True)
            os._exit(STALLED)  # a normal exit would wait for the device and for other processes
