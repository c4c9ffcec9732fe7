"""SIGTERM handling: the run saves a checkpoint and exits with a status that makes launchers restart it.

The exit statuses of `melt_jax.train`, besides 0 (the run is complete) and 1 (an error that a restart would repeat):

    75  PREEMPTED   SIGTERM; a checkpoint was saved; rerun the command to resume from it
    76  STALLED     the watchdog ended a run that made no progress; rerun the command to resume from the last checkpoint

Launchers restart the run after both. If one of several processes dies, JAX prints its index and aborts the others after
`run.lost_seconds` (SIGABRT, 134 in a shell): restart the run then too.
"""

import itertools
import signal
import sys
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
STALLED = 76
# Numbers the calls to JAX's preemption service. Every process makes the same calls in the same order.
_questions = itertools.count(1)


def exit_on_sigterm() -> None:
    """Makes SIGTERM end the process with status PREEMPTED, except while a `PreemptionNotice` is active.

    Under `jax.distributed` JAX's preemption service handles SIGTERM and this does nothing: the processes exit together,
    at `PreemptionNotice.reached` or `exit_if_preempted`.
    """
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))


def exit_if_preempted() -> None:
    """Ends all processes with status PREEMPTED if one of them has received SIGTERM.

    Every process must call it at the same point, before work that saves nothing, such as an evaluation. A single
    process exits in `exit_on_sigterm` instead.
    """
    if jax.distributed.is_initialized() and _all_reached():
        sys.exit(PREEMPTED)


class PreemptionNotice:
    """Listens for SIGTERM during the steps of a phase, as a context manager.

    A single process installs a signal handler. Under `jax.distributed`, JAX's preemption service receives the signal
    of any process, and all processes agree on the step after which they stop.

    Attributes:
      came: whether SIGTERM was received; with several processes, whether all have agreed to stop.
    """

    came: bool

    def __init__(self) -> None:
        self.came, self._previous = False, None

    def __enter__(self) -> Self:
        # Python allows signal handlers in the main thread only.
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self) -> bool:
        """Whether to stop after this step. Every process must call it after each step; all stop after the same one."""
        if jax.distributed.is_initialized():
            self.came |= _all_reached()
        return self.came

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.came = True


def _all_reached() -> bool:
    """Whether all processes stop at this call, the first one that none of them had made when SIGTERM was received."""
    return multihost_utils.reached_preemption_sync_point(next(_questions))
