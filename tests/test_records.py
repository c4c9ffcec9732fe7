"""Prepared data: sequences round-trip, mismatches are refused, processes share one global batch."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melt_jax.config import DataConfig, InputError, ModelConfig
from melt_jax.data.documents import Document
from melt_jax.data.records import (
    Layout,
    ShardWriter,
    open_records,
    read_manifest,
    record_errors,
    sha256,
    verify_shards,
    write_manifest,
)
from melt_jax.data.stream import batch_maker, batches, data_errors

MODEL = ModelConfig(vocab=64, max_positions=512)
LENGTH, VOCAB = 12, 50


def make_document(rng, size):
    loss_mask = rng.integers(2, size=size).astype(bool)
    loss_mask[-1] = False
    return Document("x:1", rng.integers(VOCAB, size=size, dtype=np.int32), loss_mask)


def write(folder, count=11, shard=4, tokenizer=b"{}", seed=0):
    """Writes `count` sequences of two documents each; returns them as lists of documents."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    rng, layout, writer = np.random.default_rng(seed), Layout.of(LENGTH, VOCAB), ShardWriter(folder, shard)
    sequences = [[make_document(rng, 5), make_document(rng, int(rng.integers(2, 8)))] for _ in range(count)]
    for sequence in sequences:
        writer.write(layout.encode(sequence))
    writer.close()
    manifest = {
        "length": LENGTH,
        "token_dtype": layout.token_dtype,
        "segment_dtype": layout.segment_dtype,
        "counts": {},
        "shards": writer.shards,
        "tokenizer": {"sha256": sha256(folder / "tokenizer.json"), "vocab": VOCAB},
        "inputs": [],
    }
    write_manifest(folder, manifest)
    return sequences


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "data")
    return tmp_path / "data"


def assert_same(one, other):
    for name, a, b in zip(one._fields, one, other):
        np.testing.assert_array_equal(a, b, err_msg=name)


# Folders


def test_sequences_round_trip(tmp_path):
    written = write(tmp_path / "data")
    records = open_records(tmp_path / "data")
    assert len(records) == len(written) == 11
    assert [s["sequences"] for s in read_manifest(tmp_path / "data")["shards"]] == [4, 4, 3]
    for i in (10, 0, 7, 3, 4):
        row, (one, other) = records[i], written[i]
        first, second = len(one.tokens), len(other.tokens)
        assert row.segments.tolist() == [1] * first + [2] * second + [0] * (LENGTH - first - second)
        for where, document in ((slice(first), one), (slice(first, first + second), other)):
            np.testing.assert_array_equal(row.tokens[where], document.tokens)
            np.testing.assert_array_equal(row.loss_mask[where], document.loss_mask)
            np.testing.assert_array_equal(row.targets[where], [*document.tokens[1:], 0])
        assert not any(field[first + second :].any() for field in row)


@pytest.mark.parametrize("length, vocab", [(9, 2**16), (9, 2**16 + 1), (2**16, 10)])
def test_layout_holds_the_largest_ids(length, vocab):
    layout = Layout.of(length, vocab)
    sizes = [1] * length if length < 100 else [2] * (length // 2)
    documents = [Document("", np.full(n, vocab - 1, np.int32), np.zeros(n, bool)) for n in sizes]
    row = layout.decode(layout.encode(documents))
    assert (row.tokens == vocab - 1).all() and row.segments[-1] == len(sizes)
    assert layout.size == len(layout.encode(documents))


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(2, 40), st.data())
def test_record_keeps_segments_and_scores(length, data):
    """Decoding returns the documents' tokens, targets within a document, and scores; the rest is zero."""
    sizes = data.draw(st.lists(st.integers(1, length), min_size=1).filter(lambda sizes: sum(sizes) <= length))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    documents = [make_document(rng, size) for size in sizes]
    row = (layout := Layout.of(length, VOCAB)).decode(layout.encode(documents))
    end = np.cumsum(sizes)
    for i, document in enumerate(documents):
        where = slice(end[i] - sizes[i], end[i])
        np.testing.assert_array_equal(row.segments[where], i + 1)
        np.testing.assert_array_equal(row.tokens[where], document.tokens)
        np.testing.assert_array_equal(row.targets[where], [*document.tokens[1:], 0])
        np.testing.assert_array_equal(row.loss_mask[where], document.loss_mask)
    assert not any(field[end[-1] :].any() for field in row)


def test_record_of_another_size_is_refused():
    with pytest.raises(InputError, match="record: expected 50 bytes as the manifest states, found 3"):
        Layout.of(12, 50).decode(b"abc")


def test_damaged_shards_are_reported(folder):
    assert verify_shards(folder) == []
    shard = folder / "00001.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[70000 % len(content)] ^= 1
    shard.write_bytes(content)
    (message,) = verify_shards(folder)
    assert "00001.arrayrecord: expected sha256" in message
    shard.write_bytes(content[:-1])
    (folder / "00002.arrayrecord").unlink()
    with pytest.raises(ValueError) as error:
        open_records(folder)
    size = len(content)
    assert f"00001.arrayrecord: expected {size} bytes, found {size - 1}" in str(error.value)
    assert "00002.arrayrecord: expected the file" in str(error.value)


def test_missing_manifest_means_unfinished_data(folder):
    (folder / "manifest.json").rename(folder / "manifest.incomplete")
    with pytest.raises(ValueError, match=r"expected manifest.json, found none"):
        open_records(folder)


def test_malformed_manifests_are_errors(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in (
        ({"format": "melt_jax records 9"}, 'format: expected "melt_jax records 1", found "melt_jax records 9"'),
        ({"length": "12", "shards": None}, "length: expected int, found '12'; shards: expected list, found None"),
        ({"length": 10**12, "token_dtype": "O"}, "token_dtype: expected <u2 or <u4, found 'O'; length: expected 2"),
        ({"tokenizer": {}}, "tokenizer sha256: expected str, found None; tokenizer vocab: expected int, found None"),
        ({"shards": [3]}, "expected file, sequences, bytes, sha256 of each shard, found 3"),
        ({"shards": [manifest["shards"][0] | {"sequences": "4"}]}, "expected file, sequences, bytes, sha256 of each"),
        ({"shards": [manifest["shards"][0] | {"file": "../data/00000.arrayrecord"}]}, "expected a shard such as"),
    ):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            read_manifest(folder)
    path.write_text("{")
    assert "expected a manifest, found" in record_errors(folder, LENGTH, VOCAB)[0]


# The stream


def data_config(folder, batch=4):
    return DataConfig("records", str(folder), length=LENGTH, batch=batch)


def test_batch_is_a_function_of_seed_and_step(folder):
    data = data_config(folder)
    whole = list(batches(data, 5, 0, 7))
    for start in (1, 6):
        for one, other in zip(batches(data, 5, start, 7), whole[start:], strict=True):
            assert_same(one, other)
    assert any((a.tokens != b.tokens).any() for a, b in zip(whole, batches(data, 6, 0, 7)))
    for field in whole[0]:
        assert field.shape == (4, LENGTH) and field.dtype == np.int32


def test_every_epoch_shows_every_sequence_once(folder):
    records = open_records(folder)
    seen = [row.tobytes() for batch in batches(data_config(folder, 11), 0, 0, 2) for row in batch.tokens]
    everything = sorted(records[i].tokens.tobytes() for i in range(11))
    assert sorted(seen[:11]) == sorted(seen[11:]) == everything and seen[:11] != seen[11:]


def share(batch, process, processes):
    """The batch indices of a process, which are not consecutive."""
    return np.arange(process, batch, processes)


@pytest.mark.parametrize("source", ["records", "arithmetic"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_one_global_batch(folder, source, processes):
    data = data_config(folder) if source == "records" else DataConfig(length=64, batch=4, high=3)
    order = np.argsort(np.concatenate([share(4, i, processes) for i in range(processes)]))
    for step in (0, 5):
        parts = [batch_maker(data, 3, share(4, i, processes))(step) for i in range(processes)]
        joined = type(parts[0])(*(np.concatenate(field)[order] for field in zip(*parts)))
        assert len(parts[0].tokens) == 4 // processes
        assert_same(joined, batch_maker(data, 3)(step))
    rows = share(4, processes - 1, processes)
    assert_same(next(batches(data, 3, 5, 6, rows)), parts[-1])


def test_process_reads_only_its_rows(folder, monkeypatch):
    data, read = data_config(folder, 8), []
    decode = Layout.decode
    monkeypatch.setattr(Layout, "decode", lambda self, record: read.append(record) or decode(self, record))
    batch_maker(data, 0, share(8, 1, 4))(0)
    assert len(read) == 2


def test_data_without_scores_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"counts": {"scored": 0}}))
    assert record_errors(folder, LENGTH, VOCAB) == [f"{folder}: expected scored tokens, found none; prepare other data"]


def test_mismatched_data_is_refused(folder, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    assert data_errors(data_config(folder), MODEL, teacher) == data_errors(data_config(folder), MODEL) == []
    (teacher / "tokenizer.json").write_bytes(b"{}")
    assert data_errors(data_config(folder), MODEL, teacher) == []
    (teacher / "tokenizer.json").write_bytes(b"{ }")
    found = data_errors(
        DataConfig("records", str(folder), length=16), ModelConfig(vocab=49, max_positions=512), str(teacher)
    )
    assert len(found) == 3
    for part in (
        "expected sequences of data.length, 16 tokens, found 12",
        "at most the model's 49 ids, found 50",
        "expected data written with the tokenizer of",
    ):
        assert sum(part in message for message in found) == 1
    assert "expected a folder written by melt_jax.prepare" in data_errors(DataConfig("records"), MODEL)[0]
