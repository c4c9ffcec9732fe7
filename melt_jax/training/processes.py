"""The processes of one run: how they join and how they agree on a value."""

import concurrent.futures
import glob
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from melt_jax.config import InputError

VARIABLES = ("MELT_COORDINATOR", "MELT_PROCESSES", "MELT_PROCESS")
ADDRESS = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?|\[[0-9A-Fa-f:.%]+\]"  # a host name, IPv4, or IPv6 in brackets
WAIT_SECONDS = 24 * 3600  # how long others wait for process 0; if it dies, JAX ends them after `run.lost_seconds`
LOST_SECONDS = 100  # JAX's own default
# Statuses of failed communication, with which JAX's errors begin; those of bad input and of too little memory differ.
BROKEN = r"(UNKNOWN|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): "
FAILURE_SECONDS = 10  # between the same error in the first and in the last process
VERDICT_SECONDS = 30  # how much longer than `run.lost_seconds` JAX may take to end a process


def initialize_distributed(lost_seconds: int = LOST_SECONDS) -> None:
    """Joins the run's other processes through `jax.distributed`, if there are any. Call it before any other use of JAX.

    `MELT_COORDINATOR` (address:port of process 0), `MELT_PROCESSES` (their number) and `MELT_PROCESS` (the index of
    this one, from 0) decide if they are set; `MELT_PROCESSES=1` alone forces a single process. Otherwise JAX finds the
    hosts of a TPU slice and the tasks of a Slurm step by itself; everything else is a single process.

    Args:
      lost_seconds: if a process shows no sign of life for so long, JAX aborts the others.

    Raises:
      InputError: some of the variables are missing or invalid, or JAX does not find the other processes.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given == {"MELT_PROCESSES": "1"}:
        return
    if given:
        jax.distributed.initialize(*_explicit(given), heartbeat_timeout_seconds=lost_seconds)
    elif _several_slurm_tasks() or _tpu_machine():
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=lost_seconds)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"jax.distributed: expected the other processes of the run, found none: {error}. Set"
                f" {', '.join(VARIABLES)}, or MELT_PROCESSES=1 for a run of one process"
            ) from error


def is_communication_error(error: BaseException) -> bool:
    """Whether the error comes from a computation or an agreement of several processes: one of them may be lost.

    JAX raises such errors as JaxRuntimeError or ValueError. TensorStore, whose errors have the same statuses, reads and
    writes files.
    """
    if jax.process_count() == 1:
        return False
    causes: list[BaseException] = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    return any(re.match(BROKEN, str(cause)) and "tensorstore" not in str(cause) for cause in causes)


def wait_for_abort(error: BaseException, lost_seconds: int) -> None:
    """Waits until JAX aborts this process because another one is lost, which takes it `lost_seconds`.

    JAX prints the index of the lost process and ends this one with status 134, so that launchers restart the run. If
    this process ended at once instead, it would count as lost too. Returns if none is lost.
    """
    reason = " ".join(str(error).split())[:300]
    print(
        f"process {jax.process_index()}: expected all {jax.process_count()} processes of the run, found {reason}; waits"
        f" up to {lost_seconds + VERDICT_SECONDS} s for JAX to list the lost ones",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(lost_seconds + VERDICT_SECONDS)


def broadcast_from_process_0(flag: bool) -> bool:
    """Process 0's flag, in every process. Every process must call it at the same point.

    It is for decisions based on files: on a shared disk, a process may not yet see a file that another has written.
    """
    return bool(multihost_utils.broadcast_one_to_all(np.int32(flag)))


def broadcast_text_from_process_0(text: str) -> str:
    """Process 0's text, in every process. Every process must call it at the same point."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    if size == 0:
        return ""
    if jax.process_index() > 0:
        data = np.zeros(size, np.uint8)  # the shape of process 0's array
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes().decode()


def record_failure(error: BaseException) -> None:
    """Adds an error that a restart would repeat to the file `MELT_FAILED`, if that variable is set.

    When a process ends, JAX aborts the others, so a launcher cannot see by their statuses that the run failed.
    """
    if path := os.environ.get("MELT_FAILED"):
        try:
            with open(path, "a") as file:
                file.write(f"process {jax.process_index()}: {type(error).__name__}: {error}\n")
        except OSError as problem:  # the disk may be full; the error itself must still be reported
            print(f"{path}: expected a file that can be written, found {problem.strerror}", file=sys.stderr)


def all_processes_fail() -> bool:
    """Whether every process of the run calls this within `FAILURE_SECONDS`, because all have the same error."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key="melt_jax failure", timeout_ms=FAILURE_SECONDS * 1000)
    except Exception:
        return False
    return True


def text_from_process_0(work: Callable[..., str], *args: object) -> str:
    """The text `work(*args)` of process 0, in every process; the others wait. Every process must call it.

    Raises:
      InputError: in every process, if the work raised an InputError or OSError.
    """
    text, error = "", ""
    if jax.process_index() == 0:
        try:
            text = work(*args)
        except (InputError, OSError) as problem:  # the other processes wait for this one
            error = str(problem)
    wait_for_process_0()
    if error := broadcast_text_from_process_0(error):
        raise InputError(error)
    return broadcast_text_from_process_0(text)


def run_on_process_0(work: Callable[..., None], *args: object) -> None:
    """Runs `work(*args)` in process 0 through `run_outside`, while the run's other processes wait for it.

    Raises:
      InputError: in the other processes, if the work failed. Process 0 raises the work's own exception.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            run_outside(work, *args)
        except Exception as error:
            failure = error
    failed = failure is not None
    try:
        wait_for_process_0()
        failed = broadcast_from_process_0(failed)
    finally:
        if failure is not None:
            raise failure
    if failed:
        raise InputError("process 0: expected it to finish, found that it failed; see its output")


def run_outside(work: Callable[..., Any], *args: object) -> Any:
    """Runs `work(*args)` in one process of a run; if it has several, in a child process on the CPU, outside the run.

    Orbax coordinates its reads and writes among the processes of a run, so one of them cannot use it alone. The
    function, its arguments and its result must be picklable.
    """
    if jax.process_count() == 1:
        return work(*args)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _use_cpu) as pool:
        return pool.submit(work, *args).result()


def wait_for_process_0() -> None:
    """Waits until all processes are here. A device collective would time out if process 0 worked for minutes."""
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key="melt_jax process 0", timeout_ms=WAIT_SECONDS * 1000)


def _use_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")


def _explicit(given: dict[str, str]) -> tuple[str, int, int]:
    """(coordinator, processes, process) from the variables."""
    if missing := [name for name in VARIABLES if name not in given]:
        raise InputError(f"{', '.join(missing)}: expected a value with {', '.join(given)}, found none; set all three")
    coordinator, processes, process = (given[name] for name in VARIABLES)
    if not (processes.isdecimal() and process.isdecimal() and int(process) < int(processes)):
        raise InputError(
            f"MELT_PROCESS, MELT_PROCESSES: expected 0 <= process < processes, found {process!r} and {processes!r}"
        )
    address, _, port = coordinator.rpartition(":")
    if not (re.fullmatch(ADDRESS, address) and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise InputError(
            f"MELT_COORDINATOR: expected address:port of process 0, such as host:8476, found {coordinator!r}"
        )
    return coordinator, int(processes), int(process)


def _several_slurm_tasks() -> bool:
    # srun sets this for its tasks only; a batch script sees the variables of its job instead.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def _tpu_machine() -> bool:
    platforms = getattr(jax.config, "jax_platforms") or "tpu"  # noqa: B009, unknown to type checkers
    return "tpu" in platforms and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
