"""Blockwise attention equals plain softmax attention, and so does its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax.model.attention import AttentionMask, blockwise_attention
from melt_jax.model.cache import KV

B, C, K, G, E = 2, 5, 2, 3, 4


def plain_attention(query, earlier, own, mask):
    """Softmax attention with all scores computed at once."""
    slots = mask.cached.shape[1]
    keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(earlier, own))
    visible = jnp.concatenate([mask.over_cache(0, 0, slots), mask.near()], axis=-1)[:, None, None]
    scores = jnp.einsum("bckge,bske->bkgcs", query, keys, precision="highest") / E**0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgcs,bske->bckge", weights, values, precision="highest")


def inputs(slots, start, dtype=jnp.float32, seed=0, sweep=None):
    """Random arguments of `blockwise_attention`; entries from `start` on are large, so that reading one shows.

    With a sweep there are also a window of 2 and the entries of the sweep before.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    entries = lambda length: KV(normal(B, length, K, E), normal(B, length, K, E))
    earlier = jax.tree.map(lambda x: x.at[:, np.max(start) :].set(100.0), entries(slots))
    cached = np.sort(rng.integers(0, 3, (B, slots)), axis=1)[:, ::-1].astype(np.int32)
    segments = np.array([[1, 1, 1, 2, 2], [2, 2, 1, 0, 0]], np.int32)
    mask = AttentionMask(jnp.asarray(segments), jnp.asarray(cached), jnp.asarray(start, jnp.int32))
    if sweep is not None:
        recent = jnp.array([[0, 1], [2, 2]], jnp.int32)
        mask = mask._replace(width=2, recent=recent, sweep=jnp.asarray(sweep, jnp.int32))
    return normal(B, C, K, G, E), earlier, entries(C if sweep is None else 2 + 2 * C), mask


@pytest.mark.parametrize("last_loop", [False, True])
@pytest.mark.parametrize("sweep", [None, 0, 1])
def test_near_mask_follows_from_distances(sweep, last_loop):
    """Of the entries of a token, at most one is visible; padding sees only itself."""
    mask = inputs(8, 6, sweep=0)[-1]._replace(last_loop=jnp.asarray(last_loop))
    mask, width = mask._replace(sweep=None if sweep is None else jnp.int32(sweep)), 2
    chunk, recent = np.asarray(mask.segments), np.asarray(mask.recent)

    def visible(b, i):
        distance = i - np.arange(C)
        earlier = (chunk[b] == chunk[b, i]) & (chunk[b] != 0) & (distance >= 0)
        far = (distance > width) & bool(sweep)
        window = (recent[b] == chunk[b, i]) & (recent[b] != 0) & (i - np.arange(-2, 0) <= width) & (not last_loop)
        return np.concatenate([window, earlier & ~far | (distance == 0), *([] if sweep is None else [earlier & far])])

    want = [[visible(b, i) for i in range(C)] for b in range(B)]
    np.testing.assert_array_equal(mask.near(), want)


CASES = {
    "one block": (8, 6, 512),
    "whole blocks": (12, 8, 4),
    "overlapping blocks": (13, 13, 4),
    "a partly empty block": (13, 6, 4),
    "an empty cache": (12, 0, 4),
    "a start per sequence": (13, (3, 11), 4),
    "no cache": (0, 0, 4),
    "the first sweep": (13, 6, 4, 0),
    "a later sweep": (13, (3, 11), 4, 1),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kernel", ["blocks", "pallas"])
@pytest.mark.parametrize("name", CASES)
def test_blockwise_attention_equals_plain_attention(name, kernel):
    """The kernel is interpreted here."""
    slots, start, block, *sweep = CASES[name]
    query, earlier, own, mask = inputs(slots, start, jnp.float64, 0, *sweep)
    weight = np.random.default_rng(1).standard_normal((B, C, K, G, E))

    def outcome(function, *more):
        run = lambda query, earlier, own: function(query, earlier, own, mask, *more)
        loss = lambda *args: jnp.sum(run(*args) * weight)
        return jax.jit(lambda *args: (run(*args), jax.grad(loss, (0, 1, 2))(*args)))(query, earlier, own)

    got, want = outcome(blockwise_attention, block, kernel), outcome(plain_attention)
    assert max(np.abs(x).max() for x in jax.tree.leaves(want) if x.size) > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), got, want)


@pytest.mark.parametrize("kernel", ["blocks", "pallas"])
def test_bfloat16_attention_differs_by_rounding(kernel):
    """Scores and sums are float32; the weights and the result are rounded to bfloat16, with relative errors of 2⁻⁹."""
    arguments = inputs(13, 11, dtype=jnp.bfloat16)
    got = blockwise_attention(*arguments, 4, kernel)
    want = plain_attention(
        *jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.result_type(x) == jnp.bfloat16 else x, arguments)
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize("kernel", ["blocks", "pallas"])
def test_empty_blocks_are_not_visited(kernel):
    """A nan in an empty block changes nothing; if the block were only masked, the nan would spread."""
    query, earlier, own, mask = inputs(16, 4)
    with_nan = jax.tree.map(lambda x: x.at[:, 4:].set(jnp.nan), earlier)
    outcome = lambda earlier: blockwise_attention(query, earlier, own, mask, 4, kernel)
    np.testing.assert_array_equal(outcome(with_nan), outcome(earlier))


def test_only_one_block_of_scores_is_kept():
    """The temporary memory of the forward pass does not grow with the cache."""

    def temporary(slots):
        query, earlier, own, mask = inputs(slots, slots)
        compiled = jax.jit(lambda *args: blockwise_attention(*args, mask, 64)).lower(query, earlier, own).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) <= 1.1 * temporary(512)
