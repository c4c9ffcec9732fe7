"""Prepared data: a folder of ArrayRecord shards of packed sequences, and a manifest that says what they are.

    manifest.json             counts, hashes, tokenizer, template, inputs; written last
    00000.arrayrecord, …      a record is a sequence: token ids, segment ids, loss mask as bits, laid end to end

`melt_jax.prepare` writes such folders. Any sequence is read by its index alone, so that every host of a run can read
its own rows of any step.
"""

import dataclasses
import hashlib
import json
import os
import pathlib

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from melt_jax.data.text import Tokenizer
from melt_jax.data.token_files import TokenSequences

FORMAT = "melt_jax records 1"
MANIFEST = "manifest.json"
WRITER_OPTIONS = "group_size:1,zstd:3"  # each record compressed alone, for reading in any order
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
    """How a sequence lies in a record: `length` token ids, `length` segment ids, `length` mask bits.

    Attributes:
      length: S, tokens of a sequence.
      token_dtype, segment_dtype: little-endian numpy dtypes.
    """

    length: int
    token_dtype: str
    segment_dtype: str

    @classmethod
    def of(cls, length, vocab):
        """The smallest layout for sequences of that length with ids below vocab."""
        narrow = lambda limit: "<u2" if limit <= 2**16 else "<u4"
        return cls(length, narrow(vocab), narrow(length + 1))

    @property
    def bytes(self):
        """The size of a record before compression."""
        tokens, segments = (np.dtype(name).itemsize for name in (self.token_dtype, self.segment_dtype))
        return self.length * (tokens + segments) + -(-self.length // 8)

    def encode(self, documents):
        """The record of a sequence: a list of `Document` of at most `length` tokens together; segments count from 1."""
        sizes = [len(document.tokens) for document in documents]
        tokens = np.zeros(self.length, self.token_dtype)
        segments = np.zeros(self.length, self.segment_dtype)
        loss_mask = np.zeros(self.length, bool)
        filled = slice(0, sum(sizes))
        tokens[filled] = np.concatenate([document.tokens for document in documents])
        segments[filled] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        loss_mask[filled] = np.concatenate([document.loss_mask for document in documents])
        return tokens.tobytes() + segments.tobytes() + np.packbits(loss_mask).tobytes()

    def decode(self, record):
        """The `Batch` of [S] int32 arrays in a record; ValueError if its size is not this layout's."""
        if len(record) != self.bytes:
            raise ValueError(f"a record of {len(record)} bytes: expected {self.bytes} by the manifest")
        tokens = np.frombuffer(record, self.token_dtype, self.length)
        segments = np.frombuffer(record, self.segment_dtype, self.length, tokens.nbytes)
        bits = np.frombuffer(record, np.uint8, offset=tokens.nbytes + segments.nbytes)
        loss_mask = np.unpackbits(bits, count=self.length)
        return TokenSequences(tokens[None], segments[None], loss_mask[None])[0]


class ShardWriter:
    """Writes records into shards of `sequences` records each.

    Attributes:
      shards: what the manifest says of each finished shard: file, sequences, bytes, sha256.
    """

    def __init__(self, folder, sequences):
        self.shards, self._folder, self._sequences, self._writer, self._count = [], folder, sequences, None, 0

    def write(self, record):
        """Adds a record."""
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self._path()), WRITER_OPTIONS)
        self._writer.write(record)
        self._count += 1
        if self._count == self._sequences:
            self.close()

    def close(self):
        """Finishes the shard under way, if there is one."""
        if self._writer is None:
            return
        self._writer.close()
        path = self._path()
        entry = {"file": path.name, "sequences": self._count, "bytes": path.stat().st_size, "sha256": sha256(path)}
        self.shards.append(entry)
        self._writer, self._count = None, 0

    def _path(self):
        return pathlib.Path(self._folder) / f"{len(self.shards):05d}.arrayrecord"


def write_manifest(folder, manifest):
    """Writes a manifest, whole or not at all: the last thing that makes a folder of shards prepared data."""
    path = pathlib.Path(folder) / MANIFEST
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")
    os.replace(temporary, path)


def read_manifest(folder):
    """The manifest of prepared data, checked against the folder's files by their sizes.

    Raises:
      ValueError: no manifest, or another's; else every shard that is missing or has another size.
    """
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no {MANIFEST}, so no finished data; write it with melt_jax.prepare")
    try:
        manifest = json.loads(path.read_text())
        wrong = [
            f"{key} is no {kind.__name__}" for key, kind in KEYS.items() if not isinstance(manifest.get(key), kind)
        ]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not wrong and manifest["format"] != FORMAT:
        wrong = [f'expected format "{FORMAT}", found "{manifest["format"]}"']
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}; prepare the data again")
    if found := _shard_errors(pathlib.Path(folder), manifest["shards"]):
        raise ValueError("\n".join(found))
    return manifest


def open_records(folder):
    """`RecordSequences` of prepared data; ValueError as `read_manifest`."""
    return RecordSequences(folder, read_manifest(folder))


class RecordSequences:
    """Prepared data as sequences: `len(x)` is their number, `x[i]` a `Batch` of int32 [S] arrays."""

    def __init__(self, folder, manifest):
        self._layout = Layout(manifest["length"], manifest["token_dtype"], manifest["segment_dtype"])
        # With their extents given, the shards are opened when something in them is asked for.
        paths = [f"{pathlib.Path(folder) / s['file']}[0:{s['sequences']}]" for s in manifest["shards"]]
        self._records = grain.sources.ArrayRecordDataSource(paths)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._layout.decode(self._records[index])


def record_errors(folder, length, vocab, tokenizer=None):
    """Everything that keeps prepared data from feeding a model: a list of messages.

    Args:
      folder: of the data.
      length: S, the configured tokens of a sequence.
      vocab: V of the model.
      tokenizer: a checkpoint folder; if it has a tokenizer, the data must be written with it, and conversations in it
        with its chat template. None: not compared.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error).split("\n")
    found = []
    if manifest["length"] != length:
        found.append(
            f"{folder}: sequences of {manifest['length']} tokens, but data.length is {length}; set it to"
            f" {manifest['length']}, or prepare the data with --length={length}"
        )
    if manifest["tokenizer"]["vocab"] > vocab:
        found.append(
            f"{folder}: written with a tokenizer of {manifest['tokenizer']['vocab']} ids, but the model has {vocab};"
            " prepare the data with the model's tokenizer"
        )
    if tokenizer:
        found += _tokenizer_errors(folder, manifest, pathlib.Path(tokenizer))
    return found


def _tokenizer_errors(folder, manifest, tokenizer):
    """At most one message: another tokenizer or, with the same one, another chat template."""
    if not (tokenizer / "tokenizer.json").is_file():
        return []
    part, written, here = "tokenizer", manifest["tokenizer"]["sha256"], sha256(tokenizer / "tokenizer.json")
    if here == written and (template := manifest.get("template_sha256")):
        # Opened, which takes a second: a template may stand in several files, and the library knows which one counts.
        try:
            part, written, here = "chat template", template, Tokenizer(tokenizer).template_sha256 or "none"
        except (OSError, ValueError) as error:
            return [f"{folder}: written by a chat template, and that of {tokenizer} cannot be read: {error}"]
    if here == written:
        return []
    return [
        f"{folder}: written with another {part} than that of {tokenizer}: sha256 {written[:12]} there, {here[:12]}"
        f" here; prepare the data with --tokenizer={tokenizer}"
    ]


def verify_shards(folder):
    """Reads all shards of prepared data and compares them with their hashes: a list of messages, empty if all is well.

    Raises:
      ValueError: as `read_manifest`.
    """
    folder, found = pathlib.Path(folder), []
    for shard in read_manifest(folder)["shards"]:
        if (digest := sha256(folder / shard["file"])) != shard["sha256"]:
            found.append(f"{folder / shard['file']}: expected sha256 {shard['sha256']}, found {digest}")
    return found


def sha256(path):
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shard_errors(folder, shards):
    found = []
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            found.append(f"{path}: missing, but the manifest lists it")
        elif path.stat().st_size != shard["bytes"]:
            found.append(f"{path}: expected {shard['bytes']} bytes, found {path.stat().st_size}; copy it again")
    return found if shards else [f"{folder}: the manifest lists no shards"]
