"""Files and folders, on a disk or in a bucket, that are written completely or not at all.

`as_path` turns the text of a flag or config key into a `Path`: a `pathlib.Path`, or an `etils.epath.Path` for
`gs://bucket/…`, which has the same methods. No other module distinguishes the two, except to name the difference.

A file on a disk is written under another name and renamed; an object in a bucket is replaced as a whole by one upload.
Neither is ever appended to. A folder on a disk is filled under another name and renamed. A bucket cannot rename: a
folder there is filled in place and has the object `INCOMPLETE` in it until it is complete; readers refuse it.
"""

import contextlib
import glob
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from melt_jax.config import InputError
from melt_jax.digests import INCOMPLETE, check_replaceable, write_digests

Path: TypeAlias = pathlib.Path | epath.Path
PathLike: TypeAlias = str | os.PathLike

COPY_BYTES = 2**24  # of a file, copied at a time
# Tokenizer files and generation defaults.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template*", "generation_config.json"),
)


def as_path(path: PathLike, name: str = "path") -> Path:
    """The path as a `Path`; nothing is read.

    Args:
      path: a path, or the text of one.
      name: of the flag or key, for the error of an empty text.

    Raises:
      InputError: it is empty, has a scheme other than `gs://`, names no bucket, or the package gcsfs is missing.
    """
    if isinstance(path, epath.Path):
        return path
    text = os.fspath(path)
    if not text:
        raise InputError(f"{name}: expected a file or folder, or gs://BUCKET/PATH, found an empty text")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if scheme is None:
        return pathlib.Path(path)
    if not text.startswith(f"{scheme[1]}://"):
        raise InputError(f"{text}: expected two slashes after {scheme[1]}:, found one; keep gs:// paths as text")
    if scheme[1] != "gs":
        raise InputError(f"{text}: expected a path on a disk or gs://BUCKET/PATH, found the scheme {scheme[1]}://")
    if not re.match(r"gs://[^/]", text):
        raise InputError(f"{text}: expected gs://BUCKET/PATH, found no bucket")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(
            f"{text}: expected the package gcsfs, found none; run pip install -e '.[gcs]' in the repository"
        )
    _configure_gcsfs()
    return epath.Path(text)


def absolute(path: PathLike) -> Path:
    """The absolute path, with symbolic links of a disk resolved; `epath` would put a folder before `gs://`.

    Raises:
      InputError: as in `as_path`.
    """
    path = as_path(path)
    return path.resolve() if isinstance(path, pathlib.Path) else path


def in_bucket(path: Path) -> bool:
    """Whether the path is in a bucket."""
    return isinstance(path, epath.Path)


def storage_errors() -> tuple[type[Exception], ...]:
    """The exceptions besides OSError by which a bucket refuses a request or cannot be reached; use it in `except`."""
    names = {
        "gcsfs.retry": "HttpError",
        "google.auth.exceptions": "GoogleAuthError",
        "google.api_core.exceptions": "GoogleAPIError",
        "aiohttp.client_exceptions": "ClientError",
        "requests.exceptions": "RequestException",
    }
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


@contextlib.contextmanager
def atomic_folder(
    folder: PathLike,
    overwrite: bool = False,
    kind: str | None = None,
    inputs: Iterable[PathLike] = (),
    others: Iterable[str] = (),
) -> Iterator[Path]:
    """Yields a new, empty folder, which becomes `folder` at the end of the block and is removed if the block fails.

    On a disk it is a hidden sibling until then, `.{name}.incomplete`. In a bucket it is `folder` itself, with the
    object `INCOMPLETE` in it; a folder that is replaced is deleted at the start of the block. An interrupted writer
    leaves nothing that `is_complete`, and the next one removes what it left. The folder's record (`melt_jax.digests`)
    is written last. For a single process; several processes use `collective_atomic_folder`.

    Args:
      folder: the folder to write.
      overwrite: replace a folder that exists; with a kind, only one of the same kind that melt_jax wrote.
      kind: what it is, for its record; None: it gets no record.
      inputs: files and folders that the block reads.
      others: names of files that an existing folder may have besides those of its record; they are replaced, too.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is false.
      InputError: `folder` must not be replaced; see `digests.check_replaceable`.
    """
    folder = absolute(folder)
    if _refused(folder, overwrite):
        raise _exists(folder)
    if kind and not _is_new(folder):
        check_replaceable(folder, kind, file_sizes(folder), [absolute(source) for source in inputs], others)
    with _bucket_folder(folder) if in_bucket(folder) else _disk_folder(folder) as temporary:
        yield temporary
        if kind:
            write_digests(temporary, kind, file_sizes(temporary))


@contextlib.contextmanager
def collective_atomic_folder(
    folder: PathLike, overwrite: bool = False, kind: str | None = None, inputs: Iterable[PathLike] = ()
) -> Iterator[Path]:
    """`atomic_folder` for a folder that all processes of a run fill together: each yields the same path.

    Process 0 decides whether the folder exists, creates it, and completes or removes it.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is false; in every process.
    """
    folder = absolute(folder)
    if multihost_utils.broadcast_one_to_all(np.int32(_refused(folder, overwrite))):
        raise _exists(folder)
    with contextlib.ExitStack() as stack:
        temporary = folder if in_bucket(folder) else _sibling(folder, "incomplete")
        if jax.process_index() == 0:
            stack.enter_context(atomic_folder(folder, overwrite, kind, inputs))
        _wait_for_all("created")
        yield temporary
        _wait_for_all("filled")
    _wait_for_all("renamed")


def is_complete(folder: Path) -> bool:
    """Whether there is such a folder and its writer has finished."""
    return folder.is_dir() and not (in_bucket(folder) and (folder / INCOMPLETE).exists())


def completeness_errors(folder: Path) -> list[str]:
    """At most one message: the folder exists, but its writer has not finished."""
    if not folder.is_dir() or is_complete(folder):
        return []
    return [
        f"{folder}: expected a complete folder, found {INCOMPLETE} in it: its writer was interrupted; write it again"
    ]


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all: a reader sees the old or the new text, even if the writer is killed."""
    if in_bucket(path):
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text)
    temporary.replace(path)


def append_text(path: Path, text: str) -> None:
    """Adds text at the end of a file, which is created if it is missing; an object in a bucket is written anew.

    If the writer of a file on a disk is killed, an incomplete line may remain at its end.
    """
    if in_bucket(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, if they are missing. A bucket has no empty folders."""
    if not in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if there is one, with everything in it. In a bucket `INCOMPLETE` is removed last."""
    if isinstance(folder, pathlib.Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    _clear(folder)
    (folder / INCOMPLETE).unlink(missing_ok=True)


@contextlib.contextmanager
def written_on_disk(path: Path) -> Iterator[pathlib.Path]:
    """Yields the path of a file on a disk to be written in the block; a file in a bucket is uploaded after it.

    It is for writers that seek or that only know files on a disk. Nothing is uploaded if the block fails. A file on a
    disk is written in place.
    """
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="melt_jax_") as folder:
        local = pathlib.Path(folder) / path.name
        yield local
        copy_file(local, path)


@contextlib.contextmanager
def folder_on_disk(folder: Path) -> Iterator[pathlib.Path]:
    """`written_on_disk` for files that a block adds to a folder, and to its subfolders."""
    if isinstance(folder, pathlib.Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="melt_jax_") as local:
        yield pathlib.Path(local)
        for name in file_sizes(pathlib.Path(local)):
            copy_file(pathlib.Path(local) / name, folder / name)


@contextlib.contextmanager
def read_on_disk(folder: Path, patterns: tuple[str, ...]) -> Iterator[pathlib.Path]:
    """Yields a folder on a disk with those files of `folder`, for the block; it is `folder` itself if on a disk."""
    if isinstance(folder, pathlib.Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="melt_jax_") as local:
        for file in matching(folder, patterns):
            copy_file(file, pathlib.Path(local) / file.name)
        yield pathlib.Path(local)


def read_range(path: Path, start: int, stop: int) -> bytes:
    """The bytes from start to stop − 1 of a file, or as many of them as it has; nothing else is read."""
    if in_bucket(path):
        return _filesystem().cat_file(str(path), start, stop) if stop > start else b""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file; one in a bucket appears when it is complete."""
    if in_bucket(target) and isinstance(source, pathlib.Path):
        _filesystem().put_file(str(source), str(target))
    elif in_bucket(target):
        target.write_bytes(source.read_bytes())
    else:
        with source.open("rb") as from_file, target.open("wb") as to_file:
            shutil.copyfileobj(from_file, to_file, COPY_BYTES)


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files directly in a folder whose names match a pattern, each once, sorted."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def find_files(pattern: str) -> list[Path]:
    """The files that match a pattern, in which `**` stands for any folders, sorted.

    Raises:
      InputError: as in `as_path`.
    """
    if isinstance(as_path(pattern), pathlib.Path):
        return [pathlib.Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    return [as_path(f"gs://{name}") for name in sorted(_filesystem().glob(pattern))]


def file_bytes(file: Path) -> int:
    """The size of a file in bytes."""
    return file.stat().st_size if isinstance(file, pathlib.Path) else file.stat().length or 0


def file_sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of all files in a folder and its subfolders, whose names are relative to it."""
    if isinstance(folder, pathlib.Path):
        files = ((file, file.stat().st_size) for file in folder.rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): size for file, size in files}
    prefix = str(folder).removeprefix("gs://") + "/"
    found = _filesystem().find(str(folder), detail=True)
    return {name.removeprefix(prefix): entry["size"] for name, entry in found.items()}


def read_json(path: Path) -> dict[str, Any]:
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


def copy_companions(source: PathLike, target: PathLike) -> list[str]:
    """Copies the `COMPANIONS` of one model folder into another; returns their names."""
    files = matching(as_path(source), COMPANIONS)
    for file in files:
        copy_file(file, as_path(target) / file.name)
    return [file.name for file in files]


def folder_bytes(folder: PathLike) -> int:
    """The size of all files in a folder and its subfolders, in bytes; 0 if there is no such folder."""
    return sum(file_sizes(as_path(folder)).values())


@contextlib.contextmanager
def _disk_folder(folder: Path) -> Iterator[Path]:
    temporary, replaced = _sibling(folder, "incomplete"), _sibling(folder, "replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _bucket_folder(folder: Path) -> Iterator[Path]:
    write_text(folder / INCOMPLETE, "this folder is being written, or its writer was interrupted\n")
    _clear(folder)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(Exception):  # what is left stays marked
            remove_folder(folder)
        raise
    (folder / INCOMPLETE).unlink(missing_ok=True)  # missing: it was deleted, the answer lost, and the request repeated


def _refused(folder: Path, overwrite: bool) -> bool:
    """Whether a writer must leave the folder alone: it exists, and is not what an interrupted writer left."""
    return not overwrite and not _is_new(folder)


def _is_new(folder: Path) -> bool:
    """Whether there is no such folder, or only what an interrupted writer left."""
    return not folder.exists() or (in_bucket(folder) and (folder / INCOMPLETE).exists())


def _exists(folder):
    return FileExistsError(f"{folder}: expected a new folder, found one that exists; remove it or overwrite it")


def _sibling(folder, word):
    return folder.with_name(f".{folder.name}.{word}")


def _clear(folder):
    """Deletes all objects of a folder in a bucket but `INCOMPLETE`."""
    marker = str(folder / INCOMPLETE).removeprefix("gs://")
    while names := [name for name in _filesystem().find(str(folder)) if name != marker]:
        with contextlib.suppress(FileNotFoundError):  # deleted by a request whose answer was lost
            _filesystem().rm(names)


def _filesystem() -> Any:
    """The file system of buckets that `epath` uses too."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def _configure_gcsfs() -> None:
    """Turns off the cache of listings: another process may have written since."""
    import fsspec.config

    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def _wait_for_all(stage):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"melt_jax folder {stage}")
