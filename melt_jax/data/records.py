"""Prepared data: a folder of ArrayRecord shards of packed sequences, and a manifest that describes them.

    manifest.json             counts, hashes, tokenizer, chat template, inputs; written last
    00000.arrayrecord, …      one record per sequence: token ids, segment ids, loss mask as bits, concatenated

`melt_jax.prepare` writes such folders. A sequence is read by its index alone, so that each process of a run reads its
own part of any step.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

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
from melt_jax.files import write_text

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

    def __init__(self, folder: str | pathlib.Path, sequences: int):
        self.shards: list[dict] = []
        self._folder, self._sequences, self._writer, self._count = folder, sequences, None, 0

    def write(self, record: bytes) -> None:
        """Adds a record."""
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self._path()), WRITER_OPTIONS)
        self._writer.write(record)
        self._count += 1
        if self._count == self._sequences:
            self.close()

    def close(self) -> None:
        """Finishes the current shard, if there is one."""
        if self._writer is None:
            return
        self._writer.close()
        path = self._path()
        entry = {"file": path.name, "sequences": self._count, "bytes": path.stat().st_size, "sha256": sha256(path)}
        self.shards.append(entry)
        self._writer, self._count = None, 0

    def _path(self):
        return pathlib.Path(self._folder) / f"{len(self.shards):05d}.arrayrecord"


def write_manifest(folder: str | pathlib.Path, manifest: dict) -> None:
    """Writes the manifest atomically. It comes last: without it a folder of shards is not prepared data."""
    write_text(pathlib.Path(folder) / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")


def read_manifest(folder: str | pathlib.Path) -> dict:
    """The manifest of prepared data, checked against the sizes of the folder's files.

    Raises:
      InputError: the manifest is missing or malformed; otherwise, lists every shard that is missing or has another
        size; otherwise, every file that differs from the folder's record.
    """
    path = pathlib.Path(folder) / MANIFEST
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
    if errors := _shard_errors(pathlib.Path(folder), manifest["shards"]):
        raise InputError("\n".join(errors))
    check_digests(folder)
    return manifest


def open_records(folder: str | pathlib.Path) -> "RecordSequences":
    """`RecordSequences` of prepared data; same errors as `read_manifest`."""
    return RecordSequences(folder, read_manifest(folder))


class RecordSequences:
    """Prepared data as sequences: `len(x)` is their number, `x[i]` a `Batch` of int32 [S] arrays."""

    def __init__(self, folder: str | pathlib.Path, manifest: dict):
        self._layout = Layout(manifest["length"], manifest["token_dtype"], manifest["segment_dtype"])
        self._sequences = sum(shard["sequences"] for shard in manifest["shards"])
        # With these extents, Grain opens a shard only when one of its records is read.
        paths = [f"{pathlib.Path(folder) / s['file']}[0:{s['sequences']}]" for s in manifest["shards"]]
        self._records = grain.sources.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return self._sequences

    def __getitem__(self, index: int) -> Batch:
        return self._layout.decode(self._records[index])


def record_errors(
    folder: str | pathlib.Path, length: int, vocab: int, tokenizer: str | pathlib.Path | None = None
) -> list[str]:
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
        errors += _tokenizer_errors(folder, manifest, pathlib.Path(tokenizer))
    return errors


def compatibility_errors(manifest: dict, other: dict, folder: str | pathlib.Path) -> list[str]:
    """At most one message: `thinking` differs from that of `other`, the manifest of `folder`."""
    found, expected = manifest.get("thinking"), other.get("thinking")
    if None in (found, expected) or found == expected:
        return []
    flag = "--thinking" if expected else "--nothinking"
    return [f"expected data rendered with {flag}, as {folder} is, found the opposite; prepare it again with {flag}"]


def _tokenizer_errors(folder, manifest: dict, tokenizer: pathlib.Path) -> list[str]:
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


def verify_shards(folder: str | pathlib.Path) -> list[str]:
    """Compares all shards of prepared data with their hashes: a list of messages, empty if they match.

    Raises:
      InputError: as `read_manifest`.
    """
    folder, errors = pathlib.Path(folder), []
    for shard in read_manifest(folder)["shards"]:
        if (digest := sha256(folder / shard["file"])) != shard["sha256"]:
            errors.append(f"{folder / shard['file']}: expected sha256 {shard['sha256']}, found {digest}; copy it again")
    return errors


def sha256(path: str | pathlib.Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
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


def _shard_errors(folder: pathlib.Path, shards: list[dict]) -> list[str]:
    fields = {"file": str, "sequences": int, "bytes": int, "sha256": str}
    for shard in shards:
        if not isinstance(shard, dict) or any(type(shard.get(name)) is not kind for name, kind in fields.items()):
            expected = ", ".join(fields)
            return [f"{folder / MANIFEST}: expected {expected} of each shard, found {shard!r:.100}; copy it again"]
        if not re.fullmatch(r"\d+\.arrayrecord", shard["file"]):  # no path, which could lead out of the folder
            return [f"{folder / MANIFEST}: expected a shard such as 00000.arrayrecord, found {shard['file']!r:.100}"]
    errors = []
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            errors.append(f"{path}: expected the file, as the manifest lists it, found none; copy it again")
        elif path.stat().st_size != shard["bytes"]:
            errors.append(f"{path}: expected {shard['bytes']} bytes, found {path.stat().st_size}; copy it again")
    return errors if shards else [f"{folder}: expected a manifest with shards, found none; prepare the data again"]
