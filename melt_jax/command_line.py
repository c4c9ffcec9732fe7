"""How every command ends: results on standard output and status 0, or one message on standard error and status 1.

if __name__ == "__main__":
    command_line.run(main)
"""

import sys
from collections.abc import Callable

from absl import app, logging

from melt_jax.config import InputError


def run(main: Callable[[list[str]], object]) -> None:
    """Parses the flags, runs `main(argv)` and exits.

    `InputError` and `OSError` are bad input: their message is printed after the command's name, without a traceback,
    and the status is 1. Any other exception is a defect of this package and keeps its traceback.
    """
    logging.set_verbosity(logging.WARNING)

    def guarded(argv):
        try:
            if len(argv) > 1:
                raise InputError(f"arguments: expected flags only, found {' '.join(argv[1:])!r}; quote patterns")
            main(argv)
        except (InputError, OSError) as error:
            sys.exit(f"{_name()}: {error}")

    app.run(guarded)


def _name():
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
