"""Softmax attention of a chunk over a long cache, block by block: scores of one block of slots exist at a time.

Only blocks that hold rows are visited, so a chunk early in a sequence costs less than one late in it, and the gradient
recomputes scores from the log of their normaliser (the flash attention of arXiv 2205.14135, on plain arrays). Letters
in shapes: B batch, S cached slots, C chunk length, K key/value heads, G query heads per key/value head, E head width.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from melt_jax.model.cache import KV, ChunkKV, blend
from melt_jax.model.layout import einsum

SAVED = "attention"  # the name under which `jax.checkpoint` policies know what the gradient needs of the forward pass


class AttentionMask(NamedTuple):
    """Who sees whom: a query sees the tokens before it of its own segment; segment 0, padding, is seen by nothing.

    Attributes:
      segments: [B, C] int32, of the chunk's tokens.
      cached: [B, S] int32, of the cache's slots.
      start: the chunk's first slot, a scalar or [B]; slots from there on are not seen.
    """

    segments: jax.Array
    cached: jax.Array
    start: jax.Array

    def within_chunk(self):
        """[B, C, C] bool, within the chunk. Every query sees itself, so that no softmax is empty."""
        length = self.segments.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        return self._same(self.segments) & causal | jnp.eye(length, dtype=bool)

    def over_cache(self, first, begin, size):
        """[B, C, size] bool, over the slots from `begin`; those before `first` belong to another block."""
        slots = begin + jnp.arange(size)
        live = (slots >= first) & (slots < jnp.reshape(self.start, (-1, 1)))
        return self._same(jax.lax.dynamic_slice_in_dim(self.cached, begin, size, 1)) & live[:, None, :]

    def _same(self, keys):
        return (self.segments[:, :, None] == keys[:, None, :]) & (keys != 0)[:, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(query, earlier, own, alpha, mask, block):
    """Softmax attention over the rows of earlier tokens ++ the chunk's own rows of this loop.

    Args:
      query: [B, C, K, G, E].
      earlier: `ChunkKV` of [B, S, K, E], the cache's of one layer: shared, per_loop, or both, which are blended by α.
      own: `KV` of [B, C, K, E].
      alpha: of the transition, or None; not differentiated.
      mask: `AttentionMask`.
      block: slots whose scores exist at a time; a shorter cache is one block.

    Returns:
      [B, C, K, G, E] in the query's dtype; scores, softmax and sums are float32.
    """
    return _blockwise_attention_forward(query, earlier, own, alpha, mask, block)[0]


def _blockwise_attention_forward(query, earlier, own, alpha, mask, block):
    with jax.named_scope("within_chunk"):
        scores = _scores(query, own.keys, mask.within_chunk())
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        state = peak, jnp.sum(weights, axis=-1, keepdims=True), _mix(weights, own.values)

    def add_block(state, rows, visible, _):
        peak, total, mixed = state
        scores = _scores(query, rows.keys, visible)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return new_peak, total, mixed * _token_first(shrink) + _mix(weights, rows.values)

    peak, total, mixed = _fold_blocks(add_block, state, earlier, alpha, mask, block)
    out = checkpoint_name((mixed / _token_first(total)).astype(query.dtype), SAVED)
    log_total = checkpoint_name(peak + jnp.log(total), SAVED)
    return out, (query, earlier, own, alpha, mask, out, log_total)


def _blockwise_attention_backward(block, residuals, out_bar):
    query, earlier, own, alpha, mask, out, log_total = residuals
    scale = 1 / math.sqrt(query.shape[-1])
    product = jnp.sum(out_bar.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    product = jnp.moveaxis(product, 1, -1)[..., None]

    def pull_back(rows, visible):
        weights = jnp.exp(_scores(query, rows.keys, visible) - log_total)
        weights_bar = einsum("bckge,bske->bkgcs", out_bar, rows.values, preferred_element_type=jnp.float32)
        scores_bar = (weights * (weights_bar - product) * scale).astype(query.dtype)
        query_bar = einsum("bkgcs,bske->bckge", scores_bar, rows.keys, preferred_element_type=jnp.float32)
        keys_bar = einsum("bkgcs,bckge->bske", scores_bar, query)
        return query_bar, KV(keys_bar, einsum("bkgcs,bckge->bske", weights.astype(query.dtype), out_bar))

    with jax.named_scope("within_chunk"):
        query_bar, own_bar = pull_back(own, mask.within_chunk())

    def add_block(state, rows, visible, begin):
        query_bar, earlier_bar = state
        more, kv_bar = pull_back(rows, visible)
        # Read, add, write: where the last block overlaps the one before it, both have their say.
        put = lambda total, x: jax.lax.dynamic_update_slice_in_dim(
            total, jax.lax.dynamic_slice_in_dim(total, begin, x.shape[1], 1) + x.astype(total.dtype), begin, 1
        )
        parts = _unblend(kv_bar, earlier, alpha)
        return query_bar + more, jax.tree.map(put, earlier_bar, parts)

    state = query_bar, jax.tree.map(jnp.zeros_like, earlier)
    query_bar, earlier_bar = _fold_blocks(add_block, state, earlier, alpha, mask, block)
    return query_bar.astype(query.dtype), earlier_bar, own_bar, jax.tree.map(jnp.zeros_like, alpha), None


blockwise_attention.defvjp(_blockwise_attention_forward, _blockwise_attention_backward)


def _fold_blocks(add_block, state, earlier, alpha, mask, block):
    """Folds `add_block(state, rows, visible, begin)` over the blocks of slots before the chunk's first."""
    slots = mask.cached.shape[1]
    if slots == 0:
        return state
    size = min(block, slots)

    def body(index, state):
        begin = jnp.minimum(index * size, slots - size)  # the last block may overlap the one before it
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size, 1)
        rows = blend(*jax.tree.map(cut, earlier), alpha)
        return add_block(state, rows, mask.over_cache(index * size, begin, size), begin)

    if size == slots:
        return body(0, state)
    with jax.named_scope("cached_blocks"):
        return jax.lax.fori_loop(0, (jnp.max(mask.start) + size - 1) // size, body, state)


def _unblend(kv_bar, earlier, alpha):
    """The cotangent of `blend`: that of the blended rows → that of the shared and of the per-loop entries."""
    if earlier.shared is None or earlier.per_loop is None:
        return ChunkKV(*(rows and kv_bar for rows in earlier))
    scale = lambda factor: jax.tree.map(lambda x: (factor * x.astype(jnp.float32)).astype(x.dtype), kv_bar)
    return ChunkKV(scale(alpha), scale(1 - alpha))


def _scores(query, keys, visible):
    """[B, K, G, C, slots] float32; −∞ where a query does not see."""
    scores = einsum("bckge,bske->bkgcs", query, keys, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None, None], scores / math.sqrt(query.shape[-1]), -jnp.inf)


def _mix(weights, values):
    """Weighted sums of values, [B, C, K, G, E] float32."""
    return einsum("bkgcs,bske->bckge", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _token_first(x):
    """[B, K, G, C, 1] → [B, C, K, G, 1]."""
    return jnp.moveaxis(x, 3, 1)
