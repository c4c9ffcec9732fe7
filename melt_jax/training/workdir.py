"""The folder of a run: one run at a time uses it, and it has room for what the run writes."""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator

from melt_jax.config import ConfigError, InputError, ModelConfig, TrainConfig
from melt_jax.files import Path, folder_bytes
from melt_jax.training.plan import disk_bytes
from melt_jax.training.processes import text_from_process_0

LOCK = "workdir.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks


@contextlib.contextmanager
def claim_workdir(config: TrainConfig, model: ModelConfig, workdir: Path) -> Iterator[None]:
    """Creates the workdir and keeps other runs out of it until the end of the block, or of the process.

    Process 0 holds a lock of the operating system on `workdir.lock`, which names its host and process. It ends with the
    process, however that ends, so nothing needs to be cleaned up. A bucket has no locks: there, nothing keeps a second
    run out. Every process of the run must enter the block.

    Args:
      config: the run's config.
      model: the trained model's config.
      workdir: the folder.

    Raises:
      ConfigError: in every process: another run uses the folder, it cannot be written, or the disk has too little room.
    """
    with contextlib.ExitStack() as stack:
        if error := text_from_process_0(_claim_error, stack, config, model, workdir):
            raise ConfigError(error)
        yield


def _claim_error(stack, config, model, workdir):
    """Locks the workdir until the stack is closed; a message if it cannot be used, else an empty one."""
    if not isinstance(workdir, pathlib.Path):
        return ""
    try:
        stack.enter_context(_locked(workdir))
        return disk_error(config, model, workdir)
    except OSError as problem:
        return f"{workdir}: expected a folder that can be written, found {problem.strerror}; use another workdir"
    except InputError as problem:
        return str(problem)


def disk_error(config: TrainConfig, model: ModelConfig, workdir: pathlib.Path) -> str:
    """A message if the disk has too little room for the run's checkpoints and models; empty otherwise."""
    if (workdir / config.phases[-1] / "model").exists():  # the run has ended
        return ""
    folders = [workdir / name / part for name in config.phases for part in ("checkpoints", "model")]
    written = sum(folder_bytes(folder) for folder in folders if folder.exists())
    needed, free = disk_bytes(config, model) - written, shutil.disk_usage(workdir).free
    if needed <= free:
        return ""
    return (
        f"{workdir}: expected {needed / 1e9:,.3f} GB of free disk space for checkpoints and models, found"
        f" {free / 1e9:,.3f} GB; free some, use another workdir, or lower checkpoints_kept"
    )


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _in_use(workdir, file) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _in_use(workdir, file):
    file.seek(0)
    owner = file.read(200).strip() or "another process"
    return InputError(
        f"{workdir}: expected a workdir that no other run uses, found {owner}; wait for it or stop it, or use another"
        " workdir"
    )
