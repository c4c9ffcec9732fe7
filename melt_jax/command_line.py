"""Code that all commands share: flag parsing, the `--config` flag of train and compile, and error exits.

A command ends with its results on standard output and status 0, or with one message on standard error and status 1:

    if __name__ == "__main__":
        define_flags()
        command_line.run(main)
"""

import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from melt_jax import digests
from melt_jax.config import KEYS, InputError
from melt_jax.files import absolute, as_path, storage_errors

flags.disclaim_key_flags()  # --help lists the flags defined here with those of the command

# Holds each `--config.seed=3` as "seed=3". Shown by --help.
_OVERRIDE = "config.KEY"


def run(main: Callable[[list[str]], object], positional: bool = False) -> None:
    """Parses the flags, runs `main(argv)` and exits. Positional arguments are errors unless `positional`.

    A flag that cannot be parsed, `InputError`, `OSError`, the errors of buckets and too little memory are bad input:
    the message is printed after the command's name, without a traceback, and the status is 1. Any other exception is
    a defect of this package and keeps its traceback.
    """
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(_without_traceback)
    if "check_digests" not in flags.FLAGS:
        flags.DEFINE_boolean("check_digests", True, "Compare folders that are read with their digests.json.")

    def guarded(argv: list[str]) -> None:
        try:
            if len(argv) > 1 and not positional:
                raise InputError(f"arguments: expected flags only, found {' '.join(argv[1:])!r}; quote patterns")
            if not flags.FLAGS["check_digests"].value:
                os.environ[digests.SKIP] = "1"
            main(argv)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
            sys.exit(f"{_name()}: {reason}")
        except InputError as error:
            sys.exit(f"{_name()}: {error}")
        except MemoryError as error:
            sys.exit(f"{_name()}: memory: expected enough for the given sizes, found too little ({error}); lower them")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = " ".join(str(error).split())[:200]
            sys.exit(f"{_name()}: memory: expected enough for the given sizes, found {reason}; lower them")
        except storage_errors() as error:
            sys.exit(f"{_name()}: bucket: expected access, found {type(error).__name__}: {_text(error)}")

    app.run(guarded, flags_parser=_parse_flags)


def exit_at_once(error: Exception) -> NoReturn:
    """Prints an error like `run` and ends the process with status 1, without waiting for anything.

    After a disk is full or gone, the threads of libraries would report the same error again, with tracebacks. The other
    processes of a run may be waiting for this one.
    """
    sys.stdout.flush()
    print(f"{_name()}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def define_config_flag() -> None:
    """Defines `--config=FILE` and `--config.KEY=VALUE`; `read_config` reads them."""
    flags.DEFINE_string(
        "config",
        None,
        "The recipe: a Python file with get_config(), such as those of configs/. FILE:TEXT calls get_config(TEXT).",
        required=True,
    )
    flags.DEFINE_multi_string(
        _OVERRIDE, [], "Overrides a key of the recipe, as in --config.seed=3; configs/base.py lists the keys."
    )


def read_config() -> ConfigDict:
    """The recipe named by `--config`, with the overrides of `--config.KEY`.

    Raises:
      InputError: the file is missing or fails.
    """
    return load_config(flags.FLAGS.config, config_overrides())


def config_overrides() -> list[tuple[str, str]]:
    """The (dotted key, text) pairs given by `--config.KEY=VALUE`, in order."""
    overrides: list[str] = flags.FLAGS.get_flag_value(_OVERRIDE, [])
    return [(key, text) for key, _, text in (override.partition("=") for override in overrides)]


def read_numbers(name: str) -> list[int]:
    """The values of a list flag whose elements are integers, at least 1.

    Raises:
      InputError: the list is empty or an element is something else.
    """
    words: list[str] = flags.FLAGS[name].value or []
    if not words or not all(re.fullmatch(r"0*[1-9]\d*", word) for word in words):
        raise InputError(f"--{name}: expected integers, at least 1, such as 1,2,4, found {','.join(words)!r}")
    return [int(word) for word in words]


def load_config(path: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """The ConfigDict of a recipe's `get_config()`, with overrides.

    Unknown keys and texts of the wrong type are kept, so that `freeze` reports them with all other errors.

    Args:
      path: a Python file, also in a bucket; "file:text" calls `get_config(text)`.
      overrides: (dotted key, text) pairs; if a key is repeated, the last one counts.

    Raises:
      InputError: the file is missing or fails.
    """
    config = _call_get_config(*re.split(":(?!//)", path, maxsplit=1)).unlock()
    with config.ignore_type():
        for name, text in overrides:
            set_key(config, name, KEYS[name].parse(text) if name in KEYS else text)
    return config.lock()


def set_key(config: ConfigDict, name: str, value: object) -> None:
    """Sets a key of an unlocked ConfigDict, given its dotted name; creates missing groups."""
    *groups, key = name.split(".")
    parent: Any = config
    for group in groups:
        if not isinstance(parent.get(group), ConfigDict):
            parent[group] = ConfigDict()
        parent = parent[group]
    parent[key] = value


def _call_get_config(file: str, *argument: str) -> ConfigDict:
    if not file or not as_path(file).is_file():
        raise InputError(f"--config: expected a Python file with get_config(), found no file {file!r}")
    loader = _RecipeLoader("melt_jax_recipe", file)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
        config = module.get_config(*argument)
    except Exception as error:  # a recipe is the user's program and may raise anything
        raise InputError(f"--config: {_place(error, file)}: {type(error).__name__}: {_text(error)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config: expected a ConfigDict from get_config() of {file}, found {config!r:.100}")
    return config


def _without_traceback(record: Any) -> bool:
    """Leaves the traceback out of a message of a library: the error itself follows."""
    record.exc_info = None
    return True


class _RecipeLoader(importlib.machinery.SourceFileLoader):
    """Reads the recipe, and no compiled form of it, from a disk or a bucket."""

    def path_stats(self, path: str) -> Any:
        raise OSError

    def get_data(self, path: str) -> bytes:
        return as_path(path).read_bytes()


def _place(error: Exception, file: str) -> str:
    """File and line of an error in a recipe: the innermost line in the recipe's folder."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    folder = absolute(file).parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if absolute(frame.filename).parent == folder]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else file


def _text(error: BaseException) -> str:
    """The message of an error on one line."""
    if isinstance(error, SyntaxError):
        return error.msg
    while error.args and isinstance(error.args[0], BaseException):  # ml_collections wraps errors this way
        error = error.args[0]
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())[:300]


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; returns the program's name and the positional arguments."""
    flags.FLAGS.set_gnu_getopt(True)
    try:
        argv = argv[:1] + flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=True)
        return flags.FLAGS(_collect_overrides(argv) if _OVERRIDE in flags.FLAGS else argv)
    except flags.Error as error:
        message = re.sub(r"flag --(\w+)=None: .*", r"--\1: expected a value, found none", str(error))
        sys.exit(f"{_name()}: {'; '.join(message.splitlines())}; --help lists the flags")


def _collect_overrides(argv: list[str]) -> list[str]:
    """Turns `--config.KEY=VALUE`, `--config.KEY VALUE` and `--[no]config.SWITCH` into values of one flag."""
    collected, rest = [], iter(argv)
    for argument in rest:
        match = re.fullmatch(r"--?(no)?config\.([^=]*)(=.*)?", argument, re.DOTALL)
        if argument == "--":
            return [*collected, argument, *rest]
        if not match:
            collected.append(argument)
            continue
        negated, key, value = match.groups()
        if value is None and key in KEYS and KEYS[key].type is bool:
            value = "=false" if negated else "=true"
        elif negated:
            raise flags.Error(f"{argument}: expected a key that is true or false")
        elif value is None:
            value = f"={next(rest, '--')}"
            if value.startswith("=--"):
                raise flags.Error(f"{argument}: expected a value, found none")
        collected.append(f"--{_OVERRIDE}={key}{value}")
    return collected


def _name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
