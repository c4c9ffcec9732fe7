"""Files and folders that are written completely or not at all, and the files that accompany a model's weights."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from melt_jax.config import InputError
from melt_jax.digests import check_replaceable, write_digests

# Tokenizer files and generation defaults.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template*", "generation_config.json"),
)


@contextlib.contextmanager
def atomic_folder(
    folder: str | pathlib.Path, kind: str, overwrite: bool = False, inputs: Iterable[str | pathlib.Path] = ()
) -> Iterator[pathlib.Path]:
    """Yields a new, empty folder, which is renamed to `folder` at the end of the block and removed if the block fails.

    Until then it is a hidden sibling, `.{name}.incomplete`, so that an interrupted writer leaves nothing that looks
    complete. Its record (`melt_jax.digests`) is written last. For a single process; several processes use
    `collective_atomic_folder`.

    Args:
      folder: the folder to write.
      kind: what it is, for its record.
      overwrite: replace a folder of the same kind that melt_jax wrote.
      inputs: files and folders that the block reads.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is false.
      InputError: `folder` must not be replaced; see `digests.check_replaceable`.
    """
    folder = pathlib.Path(folder).absolute()
    _check_output(folder, kind, overwrite, inputs)
    temporary, replaced = _sibling(folder, "incomplete"), _sibling(folder, "replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_digests(temporary, kind)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def collective_atomic_folder(
    folder: str | pathlib.Path, kind: str, overwrite: bool = False, inputs: Iterable[str | pathlib.Path] = ()
) -> Iterator[pathlib.Path]:
    """`atomic_folder` for a folder that all processes of a run fill together: each yields the same path.

    Process 0 decides whether the folder exists, creates it, and renames or removes it.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is false; in every process.
      InputError: as `atomic_folder`.
    """
    folder = pathlib.Path(folder).absolute()
    if multihost_utils.broadcast_one_to_all(np.int32(folder.exists())) and not overwrite:
        raise _exists(folder)
    with contextlib.ExitStack() as stack:
        temporary = _sibling(folder, "incomplete")
        if jax.process_index() == 0:
            stack.enter_context(atomic_folder(folder, kind, overwrite, inputs))
        _wait_for_all("created")
        yield temporary
        _wait_for_all("filled")
    _wait_for_all("renamed")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file completely or not at all: a reader sees the old or the new text, even if the writer is killed."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text)
    temporary.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: the file holds something else.
    """
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, place: object) -> dict[str, Any]:
    """The JSON object in a text of UTF-8; `place` names it in errors.

    Raises:
      InputError: the text is something else.
    """
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected a JSON object, found {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a JSON object, found {value!r:.60}")
    return value


def copy_companions(source: str | pathlib.Path, target: str | pathlib.Path) -> list[str]:
    """Copies the `COMPANIONS` of one model folder into another; returns their names."""
    files = sorted({file for pattern in COMPANIONS for file in pathlib.Path(source).glob(pattern) if file.is_file()})
    for file in files:
        shutil.copyfile(file, pathlib.Path(target) / file.name)
    return [file.name for file in files]


def folder_bytes(folder: str | pathlib.Path) -> int:
    """The size of all files in a folder and its subfolders, in bytes."""
    return sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())


def _check_output(folder, kind, overwrite, inputs):
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise _exists(folder)
    check_replaceable(folder, kind, inputs)


def _exists(folder):
    return FileExistsError(f"{folder}: expected a new folder, found one that exists; remove it or overwrite it")


def _sibling(folder, word):
    return folder.with_name(f".{folder.name}.{word}")


def _wait_for_all(stage):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"melt_jax folder {stage}")
