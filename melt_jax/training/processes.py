"""Several processes, one run: who they are, and when they wait for each other."""

import glob
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLES = ("MELT_COORDINATOR", "MELT_PROCESSES", "MELT_PROCESS")


def initialize_distributed():
    """Joins the run's other processes by `jax.distributed`, if there are any; the first thing a command does with JAX.

    Where `MELT_COORDINATOR` (address:port of process 0), `MELT_PROCESSES` (their number) and `MELT_PROCESS` (this one's
    index, from 0) are set, they decide; `MELT_PROCESSES=1` alone is a single process anywhere. Otherwise a TPU machine
    and a Slurm step of several tasks are joined as JAX finds them, and everything else is a single process.

    Raises:
      ValueError: some of the variables are missing or wrong, or JAX does not find the others.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given == {"MELT_PROCESSES": "1"}:
        return
    if given:
        jax.distributed.initialize(*_explicit(given))
    elif _several_slurm_tasks() or _tpu_machine():
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the other processes of the run were not found: {error}. Set {', '.join(VARIABLES)},"
                " or MELT_PROCESSES=1 where this process is the whole run"
            ) from error


def broadcast_from_process_0(flag):
    """The flag of process 0, in every process: what a process reads off a shared disk may be older than what it wrote.

    Every process calls it, at the same place.
    """
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def _explicit(given):
    """(coordinator, processes, process) from the variables."""
    if missing := [name for name in VARIABLES if name not in given]:
        raise ValueError(f"{', '.join(missing)}: expected with {', '.join(given)}, found nothing")
    coordinator, processes, process = (given[name] for name in VARIABLES)
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise ValueError(
            f"MELT_PROCESS, MELT_PROCESSES: expected 0 <= process < processes, found {process!r} and {processes!r}"
        )
    if not coordinator.rpartition(":")[0]:
        raise ValueError(f"MELT_COORDINATOR: expected address:port, found {coordinator!r}")
    return coordinator, int(processes), int(process)


def _several_slurm_tasks():
    # Set by srun for its tasks alone; a batch script has the variables of its job instead.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _tpu_machine():
    platforms = jax.config.jax_platforms or "tpu"
    return "tpu" in platforms and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
