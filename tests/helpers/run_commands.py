"""Imports commands once and runs each in a fork with its own flags, which is faster than many interpreters.

    python -m tests.helpers.run_commands <<<'[["melt_jax.train", "--config=missing.py"]]'

Reads a JSON list of command lines and prints a JSON list of [status, stdout, stderr]. A program that imports this
module must not use JAX itself, only in forks.
"""

import atexit
import importlib
import json
import os
import pathlib
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

COMMANDS = ("train", "prepare", "convert", "generate", "evaluate", "compile", "memory", "plot")


class Fork:
    """A fork of this process that runs `work()`, whose integer is its exit status.

    Args:
      work: the function.
      stdout: a file to which standard output is appended.
      stderr: the same for standard error.
      environment: changes of environment variables.
    """

    def __init__(
        self,
        work: Callable[[], int],
        stdout: pathlib.Path,
        stderr: pathlib.Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.status: int | None = None  # negative: the number of the signal that ended the fork
        self._processor_seconds = 0.0
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 2
        try:
            for number, path in enumerate((stdout, stderr), 1):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            os.environ.update(environment or {})
            status = work()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, or None while the fork runs."""
        if self.status is None:
            if (stat := pathlib.Path(f"/proc/{self.pid}/stat")).exists():  # Linux only
                words = stat.read_text().rpartition(")")[2].split()
                self._processor_seconds = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def processor_seconds(self) -> float:
        """The time that processors have worked for the fork, not for its children, whatever else the machine does."""
        self.poll()
        return self._processor_seconds

    def wait(self, seconds: float = float("inf")) -> int | None:
        """Waits for the end, at most that many seconds; returns the exit status, or None if the fork still runs."""
        end = time.monotonic() + seconds
        while self.poll() is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.02))
        return self.status

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the fork has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def start_command(
    module: str, arguments: list[str], log: pathlib.Path, environment: Mapping[str, str] | None = None
) -> Fork:
    """Starts an imported command as `python -m module` would; it appends all output to `log`."""

    def work() -> int:
        status = _run(module, arguments)
        getattr(threading, "_shutdown")()  # noqa: B009, as at the end of an interpreter: JAX leaves the other processes
        getattr(atexit, "_run_exitfuncs")()  # noqa: B009
        return status

    return Fork(work, log, log, environment)


def run_forked(module: str, arguments: list[str]) -> tuple[int, str, str]:
    """Runs an imported command as `python -m module` would; returns status, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = (pathlib.Path(folder) / name for name in ("stdout", "stderr"))
        status = Fork(lambda: _run(module, arguments), stdout, stderr).wait()
        assert status is not None
        return status, stdout.read_text(), stderr.read_text()


def in_fork(work: Callable[..., Any], *args: object) -> Any:
    """`work(*args)`, computed in a fork, so that this process does not use JAX. The result must be picklable."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = pathlib.Path(folder) / "result", pathlib.Path(folder) / "log"

        def store() -> int:
            result.write_bytes(pickle.dumps(work(*args)))
            return 0

        if status := Fork(store, log, log).wait():
            raise RuntimeError(f"{work.__name__}: status {status}\n{log.read_text()[-5000:]}")
        return pickle.loads(result.read_bytes())


def kill(forks: list[Fork], number: int = signal.SIGKILL) -> None:
    """Sends a signal to forks, and does not wait."""
    for fork in forks:
        fork.send_signal(number)


def _run(module, arguments):
    from melt_jax import command_line

    command = sys.modules[module]
    sys.modules["__main__"].__spec__ = command.__spec__
    sys.argv = [module, *arguments]
    status = 0
    try:
        command.define_flags()
        command_line.run(command.main)
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 2
    return status or 0


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    for name in sorted({module for module, *_ in cases}):
        importlib.import_module(name)
    json.dump([run_forked(module, arguments) for module, *arguments in cases], sys.stdout)
