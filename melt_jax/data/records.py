"""Prepared data: a folder of ArrayRecord shards of packed sequences, and a manifest that describes them.

    manifest.json             counts, hashes, tokenizer, chat template, inputs; written last
    00000.arrayrecord, …      one record per sequence: token ids, segment ids, loss mask as bits, concatenated

`melt_jax.prepare` writes such folders. A sequence is read by its index alone, so that each process of a run reads its
own part of any step.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from melt_jax.config import InputError
from melt_jax.config_keys import INT_LIMIT
from melt_jax.data.batch import Batch
from melt_jax.data.documents import Document
from melt_jax.data.text import Tokenizer
from melt_jax.data.token_files import TokenSequences
from melt_jax.digests import check_digests
from melt_jax.files import (
    Path,
    PathLike,
    as_path,
    completeness_errors,
    copy_file,
    file_sizes,
    in_bucket,
    write_text,
    written_on_disk,
)

_fetching = threading.Lock()
FORMAT = "melt_jax records 1"
MANIFEST = "manifest.json"
WRITER_OPTIONS = "group_size:1,zstd:3"  # each record is compressed alone, for random access
DTYPES = ("<u2", "<u4")
KEYS = {
    "format": str,
    "length": int,
    "token_dtype": str,
    "segment_dtype": str,
    "counts": dict,
    "shards": list,
    "tokenizer": dict,
    "inputs": list,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a sequence in a record: `length` token ids, `length` segment ids, `length` mask bits.

    Attributes:
      length: S, tokens of a sequence.
      token_dtype, segment_dtype: little-endian NumPy dtypes.
    """

    length: int
    token_dtype: str
    segment_dtype: str

    @classmethod
    def of(cls, length: int, vocab: int) -> "Layout":
        """The smallest layout for sequences of `length` tokens with ids below `vocab`."""
        narrow = lambda limit: DTYPES[limit > 2**16]
        return cls(length, narrow(vocab), narrow(length + 1))

    @property
    def size(self) -> int:
        """The bytes of a record before compression."""
        tokens, segments = (np.dtype(name).itemsize for name in (self.token_dtype, self.segment_dtype))
        return self.length * (tokens + segments) + -(-self.length // 8)

    def encode(self, documents: Sequence[Document]) -> bytes:
        """The record of a sequence of documents, at most `length` tokens in total; segment ids start at 1."""
        sizes = [len(document.tokens) for document in documents]
        tokens = np.zeros(self.length, self.token_dtype)
        segments = np.zeros(self.length, self.segment_dtype)
        loss_mask = np.zeros(self.length, bool)
        filled = slice(0, sum(sizes))
        tokens[filled] = np.concatenate([document.tokens for document in documents])
        segments[filled] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        loss_mask[filled] = np.concatenate([document.loss_mask for document in documents])
        return tokens.tobytes() + segments.tobytes() + np.packbits(loss_mask).tobytes()

    def decode(self, record: bytes) -> Batch:
        """The `Batch` of [S] int32 arrays in a record.

        Raises:
          InputError: the record has another size.
        """
        if len(record) != self.size:
            raise InputError(f"record: expected {self.size} bytes as the manifest states, found {len(record)}")
        tokens = np.frombuffer(record, self.token_dtype, self.length)
        segments = np.frombuffer(record, self.segment_dtype, self.length, tokens.nbytes)
        bits = np.frombuffer(record, np.uint8, offset=tokens.nbytes + segments.nbytes)
        loss_mask = np.unpackbits(bits, count=self.length)
        return TokenSequences(tokens[None], segments[None], loss_mask[None])[0]


class ShardWriter:
    """Writes records into shards of `sequences` records each.

    Attributes:
      shards: the manifest's entry of each finished shard: file, sequences, bytes, sha256.
    """

    def __init__(self, folder: PathLike, sequences: int):
        self.shards: list[dict] = []
        self._folder, self._sequences, self._writer, self._count = as_path(folder), sequences, None, 0
        self._shard, self._written = contextlib.ExitStack(), pathlib.Path()

    def write(self, record: bytes) -> None:
        """Adds a record."""
        if self._writer is None:
            path = self._folder / f"{len(self.shards):05d}.arrayrecord"
            self._written = self._shard.enter_context(written_on_disk(path))
            self._writer = ArrayRecordWriter(str(self._written), WRITER_OPTIONS)
        self._writer.write(record)
        self._count += 1
        if self._count == self._sequences:
            self.close()

    def close(self) -> None:
        """Finishes the current shard, if there is one."""
        if self._writer is None:
            return
        self._writer.close()
        path = self._written
        entry = {"file": path.name, "sequences": self._count, "bytes": path.stat().st_size, "sha256": sha256(path)}
        self._shard.close()
        self.shards.append(entry)
        self._writer, self._count = None, 0


def write_manifest(folder: PathLike, manifest: dict) -> None:
    """Writes the manifest atomically. It comes last: without it a folder of shards is not prepared data."""
    write_text(as_path(folder) / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def read_manifest(folder: PathLike) -> dict:
    """The manifest of prepared data, checked against the sizes of the folder's files.

    Raises:
      InputError: the manifest is missing or malformed; otherwise, lists every shard that is missing or has another
        size; otherwise, every file that differs from the folder's record.
    """
    path = as_path(folder) / MANIFEST
    if errors := completeness_errors(path.parent):
        raise InputError(errors[0])
    if not path.is_file():
        raise InputError(f"{folder}: expected {MANIFEST}, found none; prepare the data with melt_jax.prepare")
    try:
        manifest = json.loads(path.read_text())
        errors = [
            f"{key}: expected {kind.__name__}, found {manifest.get(key)!r}"
            for key, kind in KEYS.items()
            if not isinstance(manifest.get(key), kind)
        ]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected a manifest, found {error}; prepare the data again") from error
    if not errors and manifest["format"] != FORMAT:
        errors = [f'format: expected "{FORMAT}", found "{manifest["format"]}"']
    if not errors:
        errors = _value_errors(manifest)
    if errors:
        raise InputError(f"{path}: {'; '.join(errors)}; prepare the data again")
    if errors := _shard_errors(as_path(folder), manifest["shards"]):
        raise InputError("\n".join(errors))
    check_digests(path.parent)
    return manifest


def open_records(folder: PathLike) -> "RecordSequences":
    """`RecordSequences` of prepared data; same errors as `read_manifest`."""
    return RecordSequences(folder, read_manifest(folder))


class RecordSequences:
    """Prepared data as sequences: `len(x)` is their number, `x[i]` a `Batch` of int32 [S] arrays."""

    def __init__(self, folder: PathLike, manifest: dict):
        self._layout = Layout(manifest["length"], manifest["token_dtype"], manifest["segment_dtype"])
        self._sequences = sum(shard["sequences"] for shard in manifest["shards"])
        self._folder, self._shards = as_path(folder), manifest["shards"]
        self._ends = list(itertools.accumulate(shard["sequences"] for shard in self._shards))
        # With these extents, Grain opens a shard only when one of its records is read.
        places = [local_shard(self._folder, shard) for shard in self._shards]
        extents = [f"{place}[0:{shard['sequences']}]" for place, shard in zip(places, self._shards)]
        self._records = grain.sources.ArrayRecordDataSource(extents)

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> Batch:
        if in_bucket(self._folder):
            fetch_shard(self._folder, self._shards[bisect.bisect_right(self._ends, index)])
        return self._layout.decode(self._records[index])


def local_shard(folder: Path, shard: dict) -> Path:
    """Where a shard is read: in its folder, or if that is in a bucket, in this machine's cache, named by its sha256.

    The cache is `melt_jax/` in $XDG_CACHE_HOME, by default ~/.cache. All processes of a machine and all runs share it.
    """
    if not in_bucket(folder):
        return folder / shard["file"]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "melt_jax" / f"{shard['sha256']}.arrayrecord"


def fetch_shard(folder: Path, shard: dict) -> None:
    """Copies a shard of a bucket to `local_shard`, unless it is there.

    Raises:
      InputError: its sha256 differs from the manifest's.
    """
    target = local_shard(folder, shard)
    if target.exists():
        return
    with _fetching:
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        copy_file(folder / shard["file"], temporary)
        if errors := _digest_errors(folder, shard, sha256(temporary)):
            temporary.unlink()
            raise InputError(errors[0])
        temporary.replace(target)


def record_errors(folder: PathLike, length: int, vocab: int, tokenizer: PathLike | None = None) -> list[str]:
    """Mismatches between prepared data and a run.

    Args:
      folder: the data.
      length: S, tokens of a sequence in the run.
      vocab: V of the model.
      tokenizer: a model folder, or None. If it has a tokenizer, the data must have been written with it, and
        conversations with its chat template.
    """
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        return str(error).split("\n")
    errors = []
    if manifest["length"] != length:
        errors.append(
            f"{folder}: expected sequences of data.length, {length} tokens, found {manifest['length']}; set data.length"
            f" to {manifest['length']}, or prepare the data with --length={length}"
        )
    if manifest["counts"].get("scored") == 0:
        errors.append(f"{folder}: expected scored tokens, found none; prepare other data")
    if manifest["tokenizer"]["vocab"] > vocab:
        errors.append(
            f"{folder}: expected a tokenizer of at most the model's {vocab} ids, found"
            f" {manifest['tokenizer']['vocab']}; prepare the data with the model's tokenizer"
        )
    if tokenizer:
        errors += _tokenizer_errors(folder, manifest, as_path(tokenizer))
    return errors


def compatibility_errors(manifest: dict, other: dict, folder: PathLike) -> list[str]:
    """At most one message: `thinking` differs from that of `other`, the manifest of `folder`."""
    found, expected = manifest.get("thinking"), other.get("thinking")
    if None in (found, expected) or found == expected:
        return []
    flag = "--thinking" if expected else "--nothinking"
    return [f"expected data rendered with {flag}, as {folder} is, found the opposite; prepare it again with {flag}"]


def _tokenizer_errors(folder, manifest: dict, tokenizer: Path) -> list[str]:
    """At most one message: the tokenizer or chat template differs, or `thinking` is unknown."""
    if not (tokenizer / "tokenizer.json").is_file():
        return []
    part, expected, found = "tokenizer", sha256(tokenizer / "tokenizer.json"), manifest["tokenizer"]["sha256"]
    if found == expected and (template := manifest.get("template_sha256")):
        # Opening a tokenizer takes a second, but only the library determines which of several template files is used.
        try:
            opened = Tokenizer(tokenizer)
        except (OSError, ValueError) as error:
            return [f"{folder}: expected a readable chat template in {tokenizer} to compare, found {error}"]
        part, expected, found = "chat template", opened.template_sha256 or "none", template
        if found == expected and opened.has_thinking and manifest.get("thinking") is None:
            return [
                f"{folder}: expected conversations rendered with a known enable_thinking, found data of an earlier"
                f" version; prepare it again with --tokenizer={tokenizer}"
            ]
    if found == expected:
        return []
    return [
        f"{folder}: expected data written with the {part} of {tokenizer}, sha256 {expected[:12]}, found {found[:12]};"
        f" prepare the data with --tokenizer={tokenizer}"
    ]


def verify_shards(folder: PathLike) -> list[str]:
    """Compares all shards of prepared data with their hashes: a list of messages, empty if they match.

    Raises:
      InputError: as `read_manifest`.
    """
    folder = as_path(folder)
    shards = read_manifest(folder)["shards"]
    return [error for shard in shards for error in _digest_errors(folder, shard, sha256(folder / shard["file"]))]


def sha256(path: PathLike) -> str:
    """Hex digest of a file."""
    file: Any
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _value_errors(manifest: dict) -> list[str]:
    errors = []
    for name in ("token_dtype", "segment_dtype"):
        if manifest[name] not in DTYPES:
            errors.append(f"{name}: expected {' or '.join(DTYPES)}, found {manifest[name]!r:.100}")
    if not 2 <= manifest["length"] < INT_LIMIT:
        errors.append(f"length: expected 2 tokens or more, below {INT_LIMIT}, found {manifest['length']}")
    for name, kind in (("sha256", str), ("vocab", int)):
        if type(found := manifest["tokenizer"].get(name)) is not kind:
            errors.append(f"tokenizer {name}: expected {kind.__name__}, found {found!r:.100}")
    return errors


def _digest_errors(folder: Path, shard: dict, digest: str) -> list[str]:
    if digest == shard["sha256"]:
        return []
    return [f"{folder / shard['file']}: expected sha256 {shard['sha256']}, found {digest}; copy it again"]


def _shard_errors(folder: Path, shards: list[dict]) -> list[str]:
    fields = {"file": str, "sequences": int, "bytes": int, "sha256": str}
    for shard in shards:
        if not isinstance(shard, dict) or any(type(shard.get(name)) is not kind for name, kind in fields.items()):
            expected = ", ".join(fields)
            return [f"{folder / MANIFEST}: expected {expected} of each shard, found {shard!r:.100}; copy it again"]
        if not re.fullmatch(r"\d+\.arrayrecord", shard["file"]):  # no path, which could lead out of the folder
            return [f"{folder / MANIFEST}: expected a shard such as 00000.arrayrecord, found {shard['file']!r:.100}"]
    errors, sizes = [], file_sizes(folder)
    for shard in shards:
        path, size = folder / shard["file"], sizes.get(shard["file"])
        if size is None:
            errors.append(f"{path}: expected the file, as the manifest lists it, found none; copy it again")
        elif size != shard["bytes"]:
            errors.append(f"{path}: expected {shard['bytes']} bytes, found {size}; copy it again")
    return errors if shards else [f"{folder}: expected a manifest with shards, found none; prepare the data again"]
