"""The record of a finished folder: that melt_jax wrote it, of what kind it is, and the size and CRC-32 of each file.

`digests.json` is written last, before the folder gets its name. It decides what `--overwrite` may replace, and it is
compared with the files when a folder is read, so that damaged weights or data are never used. A CRC-32 detects every
changed byte and takes about a second per GB and thread. `--check_digests=false` skips the comparison.
"""

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping

from etils import epath

from melt_jax.config import InputError

Path = pathlib.Path | epath.Path

DIGESTS = "digests.json"
INCOMPLETE = ".incomplete"  # in a folder in a bucket that is being written, or whose writer was killed
UNRECORDED = (DIGESTS, INCOMPLETE)
FORMAT = "melt_jax digests 1"
SKIP = "MELT_SKIP_DIGESTS"  # environment variable, inherited by child processes; set by --check_digests=false
BLOCK = 2**22  # bytes read at a time
THREADS = 8

_compared: dict[str, tuple] = {}  # {folder: sizes and times of the files that matched}


def write_digests(folder: Path, kind: str, sizes: Mapping[str, int]) -> None:
    """Writes the record of a folder whose files are complete.

    Args:
      folder: the folder. In a bucket only sizes are recorded: it compares checksums of its own.
      kind: what it is, such as "prepared data".
      sizes: {name: bytes} of its files.
    """
    names = sorted(set(sizes) - set(UNRECORDED))
    if isinstance(folder, pathlib.Path):
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            digests = dict(zip(names, pool.map(lambda name: _digest(folder / name), names)))
    else:
        digests = {name: (sizes[name], "") for name in names}
    record = {"format": FORMAT, "kind": kind, "files": digests}
    (folder / DIGESTS).write_text(json.dumps(record, indent=1) + "\n")


def digest_errors(folder: Path) -> list[str]:
    """Files of a folder that differ from its record: one message each.

    A folder without a record has no errors, and neither has one in a bucket, which compares checksums of its own.

    A folder that matched is not read again in this process unless the size or time of a file has changed.
    """
    if os.environ.get(SKIP) or not isinstance(folder, pathlib.Path) or not (folder / DIGESTS).exists():
        return []
    try:
        files = _read(folder)["files"]
    except InputError as error:
        return [str(error)]
    errors = []
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            errors.append(f"{path}: expected the file that {DIGESTS} lists, found none")
        elif path.stat().st_size != size:
            errors.append(f"{path}: expected {size} bytes, found {path.stat().st_size}")
    if errors:
        return errors
    state = tuple((name, (folder / name).stat().st_mtime_ns, *files[name]) for name in files)
    if _compared.get(str(folder.absolute())) == state:
        return []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(files, pool.map(lambda name: _digest(folder / name), files)))
    errors = [
        f"{folder / name}: expected CRC-32 {digest}, found {found[name][1]}; the file was changed or is damaged"
        for name, (_, digest) in files.items()
        if found[name][1] != digest
    ]
    if not errors:
        _compared[str(folder.absolute())] = state
    return errors


def check_digests(folder: Path) -> None:
    """Compares a folder's files with its record, if it has one.

    Raises:
      InputError: lists the files that differ.
    """
    if errors := digest_errors(folder):
        lines = "\n".join(f"  - {error}" for error in errors)
        raise InputError(
            f"{folder}: expected the files as they were written, found others; copy or write the folder again, or read"
            f" it as it is with --check_digests=false:\n{lines}"
        )


def check_replaceable(
    folder: Path, kind: str, sizes: Mapping[str, int], inputs: Iterable[Path] = (), others: Iterable[str] = ()
) -> None:
    """Checks that an existing folder may be replaced: melt_jax wrote it, it is of that kind, and it is no input.

    Args:
      folder: the output that exists.
      kind: of the new folder.
      sizes: {name: bytes} of the files of the one that exists.
      inputs: absolute paths of files and folders from which the new folder is made.
      others: names of files that belong to such a folder without being in its record.

    Raises:
      InputError: the folder has no record, another kind or further files, or contains an input or is inside one.
    """
    hint = "use another output, or remove it yourself"
    for source in inputs:
        if folder == source or folder in source.parents or source in folder.parents:
            raise InputError(f"{folder}: expected an output apart from the inputs, found input {source}; {hint}")
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder to overwrite, found a file; {hint}")
    if not (folder / DIGESTS).is_file():
        raise InputError(
            f"{folder}: expected a folder written by melt_jax to overwrite, found one without {DIGESTS}; {hint}"
        )
    record = _read(folder)
    if record["kind"] != kind:
        raise InputError(f"{folder}: expected {kind} to overwrite, found {record['kind']}; {hint}")
    if further := sorted(set(sizes) - set(record["files"]) - {*UNRECORDED, *others}):
        names = ", ".join(further[:3]) + (", …" if len(further) > 3 else "")
        raise InputError(f"{folder}: expected only files that melt_jax wrote, found also {names}; {hint}")


def _read(folder: Path) -> dict:
    """The checked record of a folder."""
    path = folder / DIGESTS
    try:
        record = json.loads(path.read_text())
        kind, files = str(record["kind"]), dict(record["files"])
        good = record["format"] == FORMAT and all(
            isinstance(size, int) and isinstance(digest, str) and _is_inside(name)
            for name, (size, digest) in files.items()
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f'{path}: expected a record of "{FORMAT}", found {error!r:.100}') from error
    if not good:
        raise InputError(f'{path}: expected a record of "{FORMAT}", found another one')
    return {"kind": kind, "files": files}


def _is_inside(name: str) -> bool:
    path = pathlib.PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _digest(path: pathlib.Path) -> tuple[int, str]:
    """(bytes, CRC-32 in hexadecimal) of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, f"{crc:08x}"
