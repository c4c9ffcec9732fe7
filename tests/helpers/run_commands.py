"""Imports commands once and runs each in a fork with its own flags, which is faster than many interpreters.

    python -m tests.helpers.run_commands <<<'[["melt_jax.train", "--config=missing.py"]]'

Reads a JSON list of command lines and prints a JSON list of [status, stdout, stderr].
"""

import importlib
import json
import os
import pathlib
import sys
import tempfile
import traceback

COMMANDS = ("train", "prepare", "convert", "generate", "evaluate", "compile", "memory", "plot")


def run_forked(module: str, arguments: list[str]) -> tuple[int, str, str]:
    """Runs an imported command as `python -m module` would; returns status, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [pathlib.Path(folder) / name for name in ("stdout", "stderr")]
        if not (child := os.fork()):
            for number, path in enumerate(outputs, 1):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
            os._exit(_run(module, arguments))
        _, status = os.waitpid(child, 0)
        stdout, stderr = (path.read_text() for path in outputs)
    return os.waitstatus_to_exitcode(status), stdout, stderr


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
    sys.stdout.flush()
    sys.stderr.flush()
    return status or 0


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    for name in sorted({module for module, *_ in cases}):
        importlib.import_module(name)
    json.dump([run_forked(module, arguments) for module, *arguments in cases], sys.stdout)
