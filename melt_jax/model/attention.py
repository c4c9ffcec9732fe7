"""Softmax attention of a chunk over a long cache, one block of slots at a time.

Only one block's scores are in memory at a time, and only blocks that hold entries are visited, so a chunk early in a
sequence costs less than a late one. The backward pass recomputes the scores from the log of their normalizer, as in
flash attention (arXiv 2205.14135). On TPUs the kernels of `attention_kernel` can do the same. Letters in shapes: B
batch, S cached slots, C chunk length, N near entries, W window, K key/value heads, G query heads per key/value head, E
head width.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from melt_jax.model.attention_kernel import NearReach, Reach, attention_backward, attention_forward
from melt_jax.model.cache import KV, EntryView, read_slots
from melt_jax.model.layout import einsum, upcast

BLOCKS = "cached_blocks"  # the scope of the work on cached entries
SAVED = "attention"  # the `jax.checkpoint` name of the values that the backward pass needs from the forward pass


class AttentionMask(NamedTuple):
    """The entries a query attends to: one for itself and each earlier token of its segment; for padding, only itself.

    Attributes:
      segments: the segments of the chunk's tokens.
      cached: the segments of the cache's slots.
      start: the chunk's first slot; slots from there on are not read.
      width: W; a query attends to the W tokens before it through their entries of its own loop.
      recent: the segments of the window's tokens; None without a window.
      last_loop: whether this is loop T, whose own entries are the final ones; the window is then not read.
      sweep: counted from 0; from sweep 1 on, tokens of the chunk further back than W are seen through the final entries
        of the sweep before. None: there is one sweep.
    """

    segments: Int[Array, "B C"]
    cached: Int[Array, "B S"]
    start: Int[Array, ""] | Int[Array, " B"]
    width: Int[Array, ""] | int = 0
    recent: Int[Array, "B W"] | None = None
    last_loop: Bool[Array, ""] | bool = False
    sweep: Int[Array, ""] | None = None

    def near(self) -> Bool[Array, "B C N"]:
        """The mask over the window's entries, the chunk's entries of this loop, and its final ones of the sweep before.

        Every query attends to itself, so that no softmax is empty.
        """
        (segments, first, stop), queries = self._near_reach(), self._queries()[:, None]
        inside = (first[None] <= queries) & (queries < stop[None])
        return (self._segments()[:, :, None] == segments[:, None]) & inside[None]

    def over_cache(
        self, first: Int[Array, ""] | int, begin: Int[Array, ""] | int, size: int
    ) -> Bool[Array, "B C {size}"]:
        """The mask over the slots begin … begin + size − 1; slots before `first` belong to another block."""
        slots = begin + jnp.arange(size, dtype=jnp.int32)[None, None]
        live = (slots >= first) & (slots < self._ends()[..., None])
        cached = jax.lax.dynamic_slice_in_dim(self.cached, begin, size, 1)
        return (self._segments()[:, :, None] == cached[:, None]) & live

    def reach(self) -> Reach:
        """The same masks, as the kernels take them."""
        ends = (self.segments != 0) * self._ends()
        return Reach(self._segments(), self._near_reach(), ends, self.cached, jnp.max(self.start))

    def _near_reach(self):
        """The queries that see each near entry, in the order of `near`."""
        queries, segments = self._queries(), self._segments()
        end = jnp.full_like(queries, len(queries))
        parts = [(segments, queries, end)]
        if self.sweep is not None:
            far = jnp.where(self.sweep > 0, queries + self.width + 1, end)  # the first query that sees `previous`
            parts = [(segments, queries, far), (segments, far, end)]
        if self.recent is not None:
            # The window's token i is W − i before the chunk's first token.
            window = jnp.arange(self.recent.shape[1], dtype=jnp.int32)
            stop = jnp.where(self.last_loop, 0, window + 1)
            parts = [(self.recent, jnp.zeros_like(window), stop), *parts]
        return NearReach(*(jnp.concatenate(part, axis=-1) for part in zip(*parts)))

    def _segments(self):
        """[B, C]: the segments of the tokens; each token of padding has one of its own, below 0."""
        # Not `where`, whose two cases would need the same split over a mesh.
        return self.segments - (self.segments == 0) * (1 + self._queries())[None]

    def _ends(self):
        """[1 or B, 1 or C]: the slot from which on a query reads nothing of the cache."""
        end = jnp.reshape(self.start, (-1, 1))
        if self.recent is None:
            return end
        return jnp.where(self.last_loop, end, jnp.minimum(end, end + (self._queries() - self.width)[None]))

    def _queries(self):
        return jnp.arange(self.segments.shape[1], dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise_attention(
    query: Float[Array, "B C K G E"],
    earlier: KV | EntryView,
    near: KV,
    mask: AttentionMask,
    block: int,
    attention: str = "blocks",
) -> Float[Array, "B C K G E"]:
    """Softmax attention over the cached entries of earlier tokens and the entries near the chunk.

    Args:
      query: the chunk's queries.
      earlier: the cached entries of one layer, [B, S, K, E]. The gradient of an `EntryView` goes to its sums.
      near: the entries that `mask.near` covers, [B, N, K, E].
      mask: which tokens each query attends to.
      block: slots whose scores are in memory at a time; a shorter cache is one block.
      attention: `ModelConfig.attention`: "blocks" compiles it with XLA, "pallas" runs the kernels of
        `attention_kernel`. A chunk of one token always takes "blocks".

    Returns:
      The heads' results in the query's dtype; scores, softmax and sums are at least float32.
    """
    return _blockwise_attention_forward(query, earlier, near, mask, block, attention)[0]


def _blockwise_attention_forward(query, earlier, near, mask, block, attention):
    if _uses_kernel(attention, query, mask):
        with jax.named_scope(BLOCKS):
            out, log_total = attention_forward(query, earlier, near, mask.reach(), block)
    else:
        out, log_total = _forward_in_blocks(query, earlier, near, mask, block)
    out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
    return out, (query, earlier, near, mask, out, log_total)


def _forward_in_blocks(query, earlier, near, mask, block):
    """(The heads' results, the log of the normalizer [B, K, G, C, 1])."""
    with jax.named_scope("near_entries"):
        scores = _scores(query, near.keys, mask.near())
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        state = peak, jnp.sum(weights, axis=-1, keepdims=True), _mix(weights, near.values)

    def add_block(state, kv, visible, _):
        peak, total, mixed = state
        scores = _scores(query, kv.keys, visible)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return new_peak, total, mixed * _token_first(shrink) + _mix(weights, kv.values)

    peak, total, mixed = _fold_blocks(add_block, state, earlier, mask, block)
    return (mixed / _token_first(total)).astype(query.dtype), peak + jnp.log(total)


def _blockwise_attention_backward(block, attention, residuals, out_bar):
    query, earlier, near, mask, out, log_total = residuals
    product = jnp.sum(upcast(out_bar) * upcast(out), axis=-1)
    product = jnp.moveaxis(product, 1, -1)[..., None]
    more = out_bar, log_total, product
    if _uses_kernel(attention, query, mask):
        with jax.named_scope(BLOCKS):
            sums = _read_sums(earlier)
            query_bar, sums, near_bar = attention_backward(query, earlier, near, mask.reach(), block, *more, sums)
            earlier_bar = _write_sums(earlier, sums)
    else:
        query_bar, earlier_bar, near_bar = _backward_in_blocks(query, earlier, near, mask, block, *more)
    return query_bar.astype(query.dtype), earlier_bar, near_bar, None


def _backward_in_blocks(query, earlier, near, mask, block, out_bar, log_total, product):
    """The cotangents (of the queries, of the cached entries or None for a view, of the near entries)."""
    scale = 1 / math.sqrt(query.shape[-1])

    def pull_back(kv, visible):
        weights = jnp.exp(_scores(query, kv.keys, visible) - log_total)
        weights_bar = einsum("bckge,bske->bkgcs", out_bar, kv.values, accumulate=True)
        scores_bar = (weights * (weights_bar - product) * scale).astype(query.dtype)
        query_bar = einsum("bkgcs,bske->bckge", scores_bar, kv.keys, accumulate=True)
        keys_bar = einsum("bkgcs,bckge->bske", scores_bar, query)
        return query_bar, KV(keys_bar, einsum("bkgcs,bckge->bske", weights.astype(query.dtype), out_bar))

    def add_block(state, kv, visible, begin):
        query_bar, earlier_bar = state
        more, kv_bar = pull_back(kv, visible)
        return query_bar + more, _add_gradient(earlier, earlier_bar, kv_bar, begin)

    with jax.named_scope("near_entries"):
        query_bar, near_bar = pull_back(near, mask.near())
    zeros = None if isinstance(earlier, EntryView) else jax.tree.map(jnp.zeros_like, earlier)
    query_bar, earlier_bar = _fold_blocks(add_block, (query_bar, zeros), earlier, mask, block)
    return query_bar, earlier_bar, near_bar


blockwise_attention.defvjp(_blockwise_attention_forward, _blockwise_attention_backward)


def _uses_kernel(attention, query, mask):
    """Whether the kernels run. They gain nothing with an empty cache or with the few scores of a single token."""
    return attention == "pallas" and query.shape[1] > 1 and mask.cached.shape[1] > 0


def _read_sums(entries):
    """The sums to which the gradient of the entries is added: those of a view, if any; zeros for arrays."""
    sums = entries.sums if isinstance(entries, EntryView) else jax.tree.map(jnp.zeros_like, entries)
    return jax.tree.map(lambda ref: ref[...], sums)


def _write_sums(entries, sums):
    """Returns the gradient of the entries; None for a view, whose sums are set instead."""
    if not isinstance(entries, EntryView):
        return sums

    def write(ref, total):
        ref[...] = total

    jax.tree.map(write, entries.sums, sums)
    return None


def _fold_blocks(add_block, state, earlier, mask, block):
    """Folds `add_block(state, kv, visible, begin)` over the blocks of slots before the chunk's first slot."""
    slots = mask.cached.shape[1]
    if slots == 0:
        return state
    size = min(block, slots)

    def body(index, state):
        begin = jnp.minimum(index * size, slots - size)  # the last block may overlap the one before it
        visible = mask.over_cache(index * size, begin, size)
        return add_block(state, read_slots(earlier, begin, size), visible, begin)

    with jax.named_scope(BLOCKS):
        if size == slots:
            return body(0, state)
        return jax.lax.fori_loop(0, (jnp.max(mask.start) + size - 1) // size, body, state)


def _add_gradient(entries, total, kv_bar, begin):
    """The gradient of the entries, plus that of the slots from `begin` on; None for a view, which adds it."""
    if isinstance(entries, EntryView):
        entries.add_gradient(begin, kv_bar)
        return None
    # Adds to the slots, never overwrites: the last block may overlap the one before it.
    add = lambda total, x: jax.lax.dynamic_update_slice_in_dim(
        total, jax.lax.dynamic_slice_in_dim(total, begin, x.shape[1], 1) + x.astype(total.dtype), begin, 1
    )
    return jax.tree.map(add, total, kv_bar)


def _scores(query, keys, visible):
    """Attention scores [B, K, G, C, slots], at least float32; −∞ for slots that a query does not attend to."""
    scores = einsum("bckge,bske->bkgcs", query, keys, accumulate=True)
    return jnp.where(visible[:, None, None], scores / math.sqrt(query.shape[-1]), -jnp.inf)


def _mix(weights, values):
    """Weighted sums of values, [B, C, K, G, E], at least float32."""
    # This order of the result's dimensions lets XLA multiply with the values as they are stored.
    mixed = einsum("bkgcs,bske->bkgce", weights.astype(values.dtype), values, accumulate=True)
    return jnp.moveaxis(mixed, 3, 1)


def _token_first(x):
    """[B, K, G, C, 1] → [B, C, K, G, 1]."""
    return jnp.moveaxis(x, 3, 1)
