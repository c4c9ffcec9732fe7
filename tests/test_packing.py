"""Packing: documents stay whole, splitting loses no tokens, a wider window wastes less padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from melt_jax.data.documents import Document
from melt_jax.data.packing import Packer, split

PROPERTY = settings(deadline=None, derandomize=True, database=None)


def sized(size):
    return Document("x:1", np.arange(size, dtype=np.int32), np.arange(size) < size - 1)


@PROPERTY
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(1, 8))
def test_packing_keeps_every_document_whole(sizes, window):
    """Each document is in exactly one sequence, no sequence is empty or too long, and a window of 1 keeps the order."""
    packer, given_documents = Packer(20, window), [sized(size) for size in sizes]
    packed = [full for document in given_documents if (full := packer.add(document))] + packer.finish()
    order = [id(document) for sequence in packed for document in sequence]
    assert sorted(order) == sorted(map(id, given_documents))
    assert all(1 <= sum(len(d.tokens) for d in sequence) <= 20 for sequence in packed)
    if window == 1:
        assert order == list(map(id, given_documents))


def test_wider_window_wastes_less():
    sizes = np.random.default_rng(0).integers(1, 21, 400)
    count = lambda window: len([1 for s in sizes if packers[window].add(sized(s))]) + len(packers[window].finish())
    packers = {window: Packer(20, window) for window in (1, 64)}
    assert count(64) < 0.85 * count(1)


@PROPERTY
@given(st.integers(1, 60), st.integers(2, 20), st.integers(0, 2**31))
def test_split_keeps_tokens_and_scored_targets(size, length, seed):
    """The joined pieces are the document; only predictions across a boundary are not scored."""
    mask = np.random.default_rng(seed).integers(2, size=size).astype(bool)
    pieces = split(Document("x:1", np.arange(size, dtype=np.int32), mask), length)
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == list(range(size))
    assert {len(piece.tokens) for piece in pieces[:-1]} <= {length} and 1 <= len(pieces[-1].tokens) <= length
    scored = np.concatenate([piece.loss_mask for piece in pieces])
    last = np.cumsum([len(piece.tokens) for piece in pieces]) - 1
    assert not scored[last].any()
    np.testing.assert_array_equal(np.delete(scored, last), np.delete(mask, last))
