"""A watchdog over the steps of a phase: it notices when the device no longer finishes them."""

import collections
import faulthandler
import os
import sys
import threading
import time

import jax

from melt_jax.training.preemption import STALLED


class Watchdog:
    """Reports a stall, and by the config ends the process, as a context manager around the steps of a phase.

    A step has finished when the device has computed its metrics; that it was dispatched proves nothing. A daemon thread
    looks, so the steps wait for nothing. Whatever keeps steps from finishing counts: a collective that waits for a lost
    host, data that does not come, a checkpoint that cannot be written.

    Args:
      phase: its name, for the report.
      folder: of the phase; a stall's stacks are kept there, in `stall-process<i>.txt`.
      run: `melt_jax.config.RunConfig`: `stall_seconds` (0: no watchdog), `stall_first_seconds`, `stall_exits`.
    """

    def __init__(self, phase, folder, run):
        self._phase, self._run = phase, run
        self._file = folder / f"stall-process{jax.process_index()}.txt"
        self._steps = collections.deque()  # (step, a scalar that it computes), dispatched and not seen finished
        self._finished, self._since = None, time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        self._since = time.monotonic()
        if self._run.stall_seconds:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._closed.set()
        if self._run.stall_seconds:
            self._thread.join()

    def after_dispatch(self, step, scalar):
        """A step was handed to the device; `scalar` is an array that it computes."""
        if self._run.stall_seconds:
            self._steps.append((step, scalar))

    def _watch(self):
        reported = None
        while not self._closed.wait(min(self._run.stall_seconds / 10, 1.0)):
            while self._steps and self._steps[0][1].is_ready():
                self._finished, self._since = self._steps.popleft()[0], time.monotonic()
            # Until the first step has finished it compiles, after a restart in the middle of a phase too.
            first = self._finished is None
            allowed = max(self._run.stall_first_seconds, self._run.stall_seconds) if first else self._run.stall_seconds
            if time.monotonic() - self._since > allowed and reported != self._since:
                reported = self._since  # once a stall, however long it lasts
                self._report(allowed)

    def _report(self, allowed):
        last = "none has" if self._finished is None else f"the last was step {self._finished}"
        pending = [step for step, _ in list(self._steps)]
        under_way = f"the device has step {pending[0]} to finish" if pending else "no later one was dispatched"
        message = (
            f"{self._phase}: no step has finished for {allowed:g} s ({last}; {under_way}), process"
            f" {jax.process_index()}. Stacks of all threads, also in {self._file}:"
        )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        with self._file.open("a") as file:
            print(message, file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
        if self._run.stall_exits:
            print(f"leaving with status {STALLED}: a launcher starts the run again", file=sys.stderr, flush=True)
            os._exit(STALLED)  # nothing that would wait for the device or for other processes
