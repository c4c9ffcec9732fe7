"""Attention of a chunk as Pallas kernels for TPUs: scores and partial sums stay in VMEM.

`blockwise_attention` calls them if `ModelConfig.attention` is "pallas". One kernel computes the softmax over the
entries near the chunk and those in the cache; the other computes the gradients from the log of the normalizer. A grid
step holds one block of entries: first all blocks of near entries, then those of the cache. JAX's splash attention
(`jax.experimental.pallas.ops.tpu.splash_attention`) does not fit: it reads keys from one array, so that near and cached
entries would have to be copied together; its public functions differentiate only with the normalizer of the entries
that they read; and they read a mask that is known only at run time from HBM. Here the mask follows from a few integers
for each query and entry.

The kernels read the cached entries of one layer in place, from the stack of all layers, and add their gradients in
place to the sums of all layers. Only live blocks move: those that begin before `Reach.start`. XLA stores entries and
sums with heads before slots, as the kernels read them, and copies nothing.

The kernels are written for one key/value head of one sequence. `jax.vmap` adds heads and sequences to their grid, and
if a mesh splits these, each device runs its own. Scores are transposed, [entries, rows], so that values with one number
per row, such as the largest score, run along the lanes. On platforms other than TPUs the kernels are interpreted, which
is slow and meant for tests. Letters in shapes: B batch, S cached slots, C chunk length, N near entries, K key/value
heads, G query heads per key/value head, E head width, R = G·C rows of queries.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from melt_jax.model.attention_grid import run_over_blocks
from melt_jax.model.cache import KV, EntryView
from melt_jax.model.layout import accumulation_dtype

LANES = 128  # of a TPU's vector registers


class NearReach(NamedTuple):
    """The queries of a chunk that see each entry near it: those of the entry's segment, from `first` to `stop` − 1."""

    segments: Int[Array, "B N"]
    first: Int[Array, " N"]
    stop: Int[Array, " N"]


class Reach(NamedTuple):
    """The entries that each query of a chunk sees: near ones, and those of its segment in the cache, up to its end.

    Attributes:
      segments: of the queries, never 0.
      near: the queries that see each near entry.
      ends: for each query, the slot from which on it reads nothing.
      cached: the segments of the slots.
      start: the slot from which on no query of the batch reads anything.
    """

    segments: Int[Array, "B C"]
    near: NearReach
    ends: Int[Array, "B C"]
    cached: Int[Array, "B S"]
    start: Int[Array, ""]


def attention_forward(
    query: Float[Array, "B C K G E"],
    earlier: KV | EntryView,
    near: KV,
    reach: Reach,
    block: int,
) -> tuple[Float[Array, "B C K G E"], Float[Array, "B K G C 1"]]:
    """Softmax attention.

    Args:
      query: the chunk's queries.
      earlier: the cached entries of one layer, [B, S, K, E]; a view is read in place.
      near: the entries near the chunk, [B, N, K, E].
      reach: the entries that each query sees; at least one near entry.
      block: entries whose scores are in VMEM at a time; on a TPU a multiple of 128, or at least S.

    Returns:
      (the heads' results, the log of the normalizer).
    """
    shape = query.shape
    out, log_total = _over_heads(_fold, shape[3], (_rows(_head_first(query)),), earlier, near, reach, block)
    return _token_first(_unrows(out, shape)), _unrows(log_total, shape)[..., None]


def attention_backward(
    query: Float[Array, "B C K G E"],
    earlier: KV | EntryView,
    near: KV,
    reach: Reach,
    block: int,
    out_bar: Float[Array, "B C K G E"],
    log_total: Float[Array, "B K G C 1"],
    product: Float[Array, "B K G C 1"],
    sums: KV | None,
) -> tuple[Float[Array, "B C K G E"], KV | None, KV]:
    """The cotangents of the queries, the cached and the near entries.

    Args:
      query, earlier, near, reach, block: see `attention_forward`.
      out_bar: the cotangent of the heads' results.
      log_total: from `attention_forward`.
      product: the sums of results · out_bar over E.
      sums: arrays to which the cotangents of the cached entries are added in place, shaped like the entries or, for a
        view, like its whole stack; None if they are not needed.

    Returns:
      (the query's cotangent, the sums after the addition, the near entries' cotangents); each in the dtype of its
      primal or sum.
    """
    inputs = _rows(_head_first(query)), _rows(_head_first(out_bar)), _rows(log_total[..., 0]), _rows(product[..., 0])
    query_bar, near_bar, sums = _over_heads(_pull_back, query.shape[3], inputs, earlier, near, reach, block, sums)
    # The kernel's results have sequences and heads first.
    restore = lambda x: jnp.swapaxes(jnp.moveaxis(x, (0, 1), (-4, -3)), -3, -2)
    sums = jax.tree.map(restore, sums)
    near_bar = jax.tree.map(lambda x, like: jnp.swapaxes(x[:, :, : like.shape[1]], 1, 2), near_bar, near)
    return _token_first(_unrows(query_bar, query.shape)), sums, near_bar


def _head_first(x):
    """[B, C, K, G, E] → [B, K, G, C, E]."""
    return jnp.moveaxis(x, 1, 3)


def _token_first(x):
    """[B, K, G, C, E] → [B, C, K, G, E]."""
    return jnp.moveaxis(x, 3, 1)


def _rows(x):
    """[B, K, G, C, …] → [B, K, R, …]; zeros fill R up to a multiple of the lanes."""
    batch, heads, group, chunk, *rest = x.shape
    x = jnp.reshape(x, (batch, heads, group * chunk, *rest))
    return jnp.pad(x, [(0, 0), (0, 0), (0, -(group * chunk) % LANES), *[(0, 0)] * len(rest)])


def _unrows(x, shape):
    """[B, K, R, …] → [B, K, G, C, …], for queries of a shape."""
    _, chunk, heads, group, _ = shape
    return jnp.reshape(x[:, :, : group * chunk], (x.shape[0], heads, group, chunk, *x.shape[3:]))


def _over_heads(function, group, inputs, earlier, near, reach, block, sums=None):
    """Runs a function of one head of one sequence over all of them; `inputs` are [B, K, R, …], results [B, K, …]."""
    size, (piece, pad) = min(block, reach.cached.shape[1]), _near_blocks(near.keys.shape[1], block)
    of_rows = functools.partial(_repeat, group)
    queries = of_rows(jnp.arange(reach.segments.shape[1], dtype=jnp.int32))
    rows = *(jax.vmap(of_rows)(x) for x in (reach.segments, reach.ends)), queries
    # The entries that fill up N have segment 0, which no query has.
    near_reach = jax.tree.map(lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, pad)]), tuple(reach.near))
    near = jax.tree.map(lambda x: jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))), near)
    view = earlier if isinstance(earlier, EntryView) else EntryView(earlier, jnp.zeros((0,), jnp.int32))
    stacks = jax.tree.map(lambda x: jnp.swapaxes(x, -3, -2), (view.entries, sums))
    lead = len(view.index)
    places = jnp.pad(view.index, (0, 1))  # never empty
    count = jnp.reshape((reach.start + size - 1) // size, (1,))

    def run(*arguments, interpret):
        of_head = functools.partial(function, (piece, size), interpret)
        of_sequence = jax.vmap(of_head, (None, None, lead, 0, 0))
        masks = (0, 0, None), (0, None, None), 0
        return jax.vmap(of_sequence, (None, masks, lead, 0, 0))(*arguments)

    return jax.lax.platform_dependent(
        (count, places), (rows, near_reach, reach.cached), stacks, near, inputs,
        tpu=functools.partial(run, interpret=False), default=functools.partial(run, interpret=True),
    )  # fmt: skip


def _repeat(group, x):
    """[C] → [R]; rows that fill up R copy the last one, so that they see something too."""
    return jnp.pad(jnp.tile(x, group), (0, -(group * len(x)) % LANES), "edge")


def _near_blocks(entries, block):
    """(entries of a block of near entries, entries to be added so that all blocks are full)."""
    count = -(-entries // max(block, LANES))
    size = -(-entries // (count * LANES)) * LANES
    return size, count * size - entries


def _fold(sizes, interpret, scalars, masks, stacks, near, inputs):
    """(results [R, E], log of the normalizer [R]) of one head."""
    (query,), (of_rows, near_reach, cached) = inputs, masks
    (rows, width), slots, wide = query.shape, cached.shape[0], accumulation_dtype(query.dtype)
    entries, _ = stacks
    near_blocks = len(near.keys) // sizes[0]

    def kernel(count, places, operands, results, peaks, totals, sums):
        (*of_rows, query), (*near_reach, near_keys, near_values), (cached, *entries) = operands[:3]
        out, log_total = results[0]
        index = pl.program_id(0)
        slot_block = index - near_blocks

        def add(keys, values, visible):
            scores = jnp.where(visible, _scores(keys, query[...]), -jnp.inf)
            new_peak = jnp.maximum(peaks[...], jnp.max(scores, axis=0, keepdims=True))
            weights, shrink = jnp.exp(scores - new_peak), jnp.exp(peaks[...] - new_peak)
            totals[...] = totals[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            sums[...] = sums[...] * shrink + _dot(values, weights.astype(values.dtype), (0, 0))
            peaks[...] = new_peak

        @pl.when(index == 0)
        def _():
            peaks[...] = jnp.full_like(peaks, jnp.finfo(wide).min)  # finite: a row may see nothing of a block
            totals[...], sums[...] = jnp.zeros_like(totals), jnp.zeros_like(sums)

        @pl.when(index < near_blocks)
        def _():
            add(near_keys[...], near_values[...], _near_visible(near_reach, of_rows))

        @pl.when((slot_block >= 0) & (slot_block < count[0]))
        def _():
            kv = _read(entries, slot_block, sizes[1], slots)
            add(*kv, _cached_visible(slot_block, cached, of_rows))

        @pl.when(index == pl.num_programs(0) - 1)
        def _():
            out[...] = (sums[...] / totals[...]).T.astype(out.dtype)
            log_total[...] = peaks[...] + jnp.log(totals[...])

    (out, log_total), *_ = run_over_blocks(
        kernel,
        scalars,
        (*map(_row, of_rows), query),
        (*map(_row, near_reach), *near),
        (_row(cached), *entries),
        sizes,
        outputs=(jax.ShapeDtypeStruct((rows, width), query.dtype), jax.ShapeDtypeStruct((1, rows), wide)),
        scratch=[pltpu.VMEM((1, rows), wide), pltpu.VMEM((1, rows), wide), pltpu.VMEM((width, rows), wide)],
        name="attention_forward",
        products=2,
        interpret=interpret,
    )
    return out, log_total[0]


def _pull_back(sizes, interpret, scalars, masks, stacks, near, inputs):
    """(cotangents of the queries [R, E], of the near entries, the sums after the addition or None) of one head."""
    (query, out_bar, log_total, product), (of_rows, near_reach, cached) = inputs, masks
    (rows, width), slots, wide = query.shape, cached.shape[0], accumulation_dtype(query.dtype)
    entries, sums = stacks
    near_blocks = len(near.keys) // sizes[0]

    def kernel(count, places, operands, results, query_sum):
        (
            (*of_rows, query, out_bar, log_total, product),
            (*near_reach, near_keys, near_values),
            (cached, *entries),
            old,
        ) = operands
        (query_bar,), near_bar, new = results
        index = pl.program_id(0)
        slot_block = index - near_blocks

        def pull_back(keys, values, visible):
            weights = jnp.exp(jnp.where(visible, _scores(keys, query[...]), -jnp.inf) - log_total[...])
            weights_bar = _dot(values, out_bar[...], (1, 1))
            scores_bar = weights * (weights_bar - product[...]) * (1 / math.sqrt(width))
            scores_bar = scores_bar.astype(query.dtype)
            query_sum[...] += _dot(keys, scores_bar, (0, 0))
            return _dot(scores_bar, query[...], (1, 0)), _dot(weights.astype(query.dtype), out_bar[...], (1, 0))

        @pl.when(index == 0)
        def _():
            query_sum[...] = jnp.zeros_like(query_sum)

        @pl.when(index < near_blocks)
        def _():
            kv_bar = pull_back(near_keys[...], near_values[...], _near_visible(near_reach, of_rows))
            for ref, x in zip(near_bar, kv_bar):
                ref[...] = x.astype(ref.dtype)

        @pl.when((slot_block >= 0) & (slot_block < count[0]))
        def _():
            kv = _read(entries, slot_block, sizes[1], slots)
            kv_bar = pull_back(*kv, _cached_visible(slot_block, cached, of_rows))
            for before, after, x in zip(old, new, kv_bar):
                after[...] = before[...] + x.astype(after.dtype)

        @pl.when((index == 0) & (count[0] == 0))
        def _():
            for before, after in zip(old, new):
                after[...] = before[...]

        @pl.when(index == pl.num_programs(0) - 1)
        def _():
            query_bar[...] = query_sum[...].T.astype(query_bar.dtype)

    (query_bar,), near_bar, totals = run_over_blocks(
        kernel,
        scalars,
        (*map(_row, of_rows), query, out_bar, _row(log_total), _row(product)),
        (*map(_row, near_reach), *near),
        (_row(cached), *entries),
        sizes,
        totals=tuple(sums or ()),
        outputs=(jax.ShapeDtypeStruct((rows, width), query.dtype),),
        near_outputs=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in near),
        scratch=[pltpu.VMEM((width, rows), wide)],
        name="attention_backward",
        products=5,
        interpret=interpret,
    )
    return query_bar, KV(*near_bar), KV(*totals) if totals else None


def _row(x):
    """[n] → [1, n]."""
    return x[None]


def _read(entries, index, size, slots):
    """The keys and values [size, E] of a block; zeros past the last slot, where its contents are undefined."""
    keys, values = (ref[...] for ref in entries)
    if slots % size:
        inside = index * size + jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0) < slots
        keys, values = (jnp.where(inside, x, 0) for x in (keys, values))
    return keys, values


def _scores(keys, query):
    """Scores [entries, rows] of a block."""
    return _dot(keys, query, (1, 1)) * (1 / math.sqrt(query.shape[-1]))


def _near_visible(near_reach, of_rows):
    """Whether each row [1, R] sees each near entry [n, 1] of a block."""
    near_segments, first, stop = (_column(ref[...]) for ref in near_reach)
    segments, _, queries = of_rows
    return (near_segments == segments[...]) & (first <= queries[...]) & (queries[...] < stop)


def _cached_visible(index, cached, of_rows):
    """Whether each row [1, R] sees each slot [n, 1] of a block."""
    cached_segments, (segments, ends, _) = _column(cached[...]), of_rows
    shape = len(cached_segments), segments.shape[1]
    slots = index * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (slots < ends[...]) & (cached_segments == segments[...])


def _column(x):
    """[1, n] → [n, 1]."""
    return jnp.broadcast_to(x, (8, x.shape[1])).T[:, :1]


def _dot(x, y, contracted):
    """The product of two matrices over one dimension of each, in the accumulation dtype, at full precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    wide = accumulation_dtype(x.dtype)
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=wide)
