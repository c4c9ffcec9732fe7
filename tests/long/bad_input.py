"""Runs every command over generated bad input: each case must end with one clear message, or be accepted and right.

    python -m tests.long.bad_input                      # all trials
    python -m tests.long.bad_input --trial=data --show  # one, with every message

A case survives if the command ends in time with status 0, or with status 1, a message on standard error, no traceback
and no output folder. A case marked `refused` must not end with status 0, and its message must contain the marked words.
Prints a table (trial, cases, survived, slowest case in seconds) and exits with status 1 if a case fails. Commands run
in this process, because starting one takes seconds.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import os
import pathlib
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

from absl import flags

from melt_jax import command_line
from tests.long.bad_input_cases import TRIALS, Case

LIMIT = 600  # seconds; a case that takes longer counts as hanging, on a machine of any speed
MEMORY = 24 * 2**30  # bytes of address space


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case ended: status ("hangs" if it did not), output, seconds, and why it failed (empty if it survived)."""

    status: int | str
    stdout: str
    stderr: str
    seconds: float
    failure: str


def run_here(command: str, arguments: list[str]) -> tuple[int | str, str, str]:
    """Runs a command as `python -m melt_jax.command` would, in this process; returns status, stdout and stderr."""
    module = importlib.import_module(f"melt_jax.{command}")
    values = flags.FLAGS
    values.remove_flag_values([name for name in values if name in values and _is_ours(values, name)])
    values.unparse_flags()
    sys.modules["__main__"].__spec__ = module.__spec__
    out, err, argv, environment = io.StringIO(), io.StringIO(), sys.argv, dict(os.environ)
    sys.argv = [module.__name__, *arguments]
    status: int | str = 0
    signal.signal(signal.SIGALRM, _interrupt)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.define_flags()
                command_line.run(module.main)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1 if end.code else 0
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except _Hangs:
                status = "hangs"
                traceback.print_exc(limit=-4)
            except BaseException:
                status = 2
                traceback.print_exc()
    finally:
        signal.alarm(0)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    return status, out.getvalue(), err.getvalue()


class _Hangs(BaseException):
    """A case runs longer than `LIMIT`."""


def _interrupt(*_):
    raise _Hangs


def _is_ours(values, name):
    module = values.find_module_defining_flag(name) or ""
    return "absl" not in module


def judge(case: Case, folder: pathlib.Path) -> Outcome:
    """Runs a case in an empty folder."""
    case.make(folder)
    arguments = [argument.replace("{}", str(folder)) for argument in case.arguments]
    start = time.perf_counter()
    with environment(case.environment):
        status, stdout, stderr = run_here(case.command, arguments)
    seconds, failure = time.perf_counter() - start, ""
    if status == "hangs":
        failure = "hangs"
    elif "Traceback (most recent" in stderr or status not in (0, 1):
        failure = "traceback"
    elif status == 0 and case.refused is not None:
        failure = "accepted"
    elif status and not stderr.strip():
        failure = "no message"
    elif status and case.refused and case.refused not in stderr:
        failure = f"the message lacks {case.refused!r}"
    elif status and (folder / "out").exists():
        failure = "leaves an output"
    return Outcome(status, stdout, stderr, seconds, failure)


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables of a block."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    """Runs the trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", choices=TRIALS, action="append", help="a trial to run; by default all")
    parser.add_argument("--case", default="", help="run only cases whose name matches this regular expression")
    parser.add_argument("--every", type=int, default=1, help="run every N-th case of a trial")
    parser.add_argument("--show", action="store_true", help="print every message, not only those of failed cases")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    table, failed = [], 0
    for trial in arguments.trial or TRIALS:
        cases = [case for case in TRIALS[trial]() if re.search(arguments.case, case.name)][:: arguments.every]
        slowest = survived = 0
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                outcome = judge(case, pathlib.Path(folder))
            survived += not outcome.failure
            slowest = max(slowest, outcome.seconds)
            if outcome.failure or arguments.show:
                print(
                    f"{trial}: {case.command} {case.name}: {outcome.failure or outcome.status}, {outcome.seconds:.1f} s"
                )
                print("    " + "\n    ".join(outcome.stderr.strip().splitlines()[-12:]), flush=True)
        failed += len(cases) - survived
        table.append(f"{trial:10s} {len(cases):6d} {survived:9d} {slowest:13.1f}")
    print("\n".join([f"{'trial':10s} {'cases':>6s} {'survived':>9s} {'slowest, s':>13s}", *table]))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
