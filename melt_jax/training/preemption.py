"""Leaving in good order: SIGTERM saves what is trained and ends the run with a status that launchers understand.

The exit statuses of `melt_jax.train`, beside 0 (the run has ended) and 1 (an error that a new start would meet again):

    75  PREEMPTED   SIGTERM came; a checkpoint was saved; the same command goes on from there
    76  STALLED     the watchdog ended a run that no longer moved; the same command goes on from the last checkpoint

A launcher starts the run again on both. Where one of several processes is lost without a word, JAX ends the others
(SIGABRT, 134 in a shell): that asks for a new start too.
"""

import itertools
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
STALLED = 76
_questions = itertools.count(1)  # put to JAX's preemption service by this process; every process puts them alike


def exit_on_sigterm():
    """SIGTERM ends the process with status PREEMPTED, wherever it is, except while a `PreemptionNotice` listens.

    Under `jax.distributed` SIGTERM belongs to JAX's preemption service, and nothing changes here: the processes leave
    together, where they ask (`PreemptionNotice.reached`, `exit_if_preempted`).
    """
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))


def exit_if_preempted():
    """Before a piece of work, such as a measurement: ends all of several processes with status PREEMPTED if SIGTERM
    came to one of them. Every process calls it, at the same place; what was done before is saved.

    A process of its own has left already (`exit_on_sigterm`).
    """
    if jax.distributed.is_initialized() and _agreed():
        sys.exit(PREEMPTED)


class PreemptionNotice:
    """Listens for SIGTERM during the steps of a phase, as a context manager.

    A process of its own takes the signal by a handler. Under `jax.distributed` one process's signal is everyone's:
    JAX's preemption service takes it, and agrees with all processes on the step after which they stop together.

    Attributes:
      came: whether SIGTERM came; of several processes, whether all have agreed to stop.
    """

    def __init__(self):
        self.came, self._previous = False, None

    def __enter__(self):
        # Python runs signal handlers in the main thread alone, and lets no other set them.
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self):
        """Whether to stop after this step: true at the same step on every process, for all ask after each step."""
        if jax.distributed.is_initialized():
            self.came |= _agreed()
        return self.came

    def _note(self, *_):
        self.came = True


def _agreed():
    """Whether all processes stop at this question. The service knows it by its number: the next one that no process
    has put yet when SIGTERM comes."""
    return multihost_utils.reached_preemption_sync_point(next(_questions))
