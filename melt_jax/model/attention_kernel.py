"""Attention to the cached entries as Pallas kernels for TPUs: scores and partial sums stay in VMEM.

`blockwise_attention` calls them if its kernel is "pallas"; attention to the entries near the chunk stays in XLA. One
kernel folds the cached entries into the softmax that the near entries began; the other computes the gradients from the
log of the normalizer over all entries. JAX's splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) does
not fit: its public functions differentiate only with the normalizer of the entries that they read, here a part of all
entries; they read a mask that is known only at run time from HBM; and they would need a copy of the cache, padded to a
multiple of their blocks.

The kernels read the entries of one layer in place, from the stack of all layers, and add their gradients in place to
the sums of all layers. Only live blocks move: those that begin before `Reach.start`. XLA stores entries and sums with
heads before slots, as the kernels read them, and copies nothing.

The kernels are written for one key/value head of one sequence. `jax.vmap` adds heads and sequences to their grid, and
if a mesh splits these, each device runs its own. Scores are transposed, [slots, rows], so that values with one number
per row, such as the largest score, run along the lanes. On platforms other than TPUs the kernels are interpreted, which
is slow and meant for tests. Letters in shapes: B batch, S cached slots, C chunk length, K key/value heads, G query
heads per key/value head, E head width, R = G·C rows of queries.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from melt_jax.model.cache import KV, ChunkKV, EntryView, blend
from melt_jax.model.layout import accumulation_dtype

LANES = 128  # of a TPU's vector registers


class Reach(NamedTuple):
    """The cached entries that each query of a chunk reads: those of its segment, up to its end.

    Attributes:
      segments: of the queries.
      ends: for each query, the slot from which on it reads nothing.
      cached: the segments of the slots.
      start: the slot from which on no query of the batch reads anything.
    """

    segments: Int[Array, "B C"]
    ends: Int[Array, "B C"]
    cached: Int[Array, "B S"]
    start: Int[Array, ""]


def fold_cached(
    query: Float[Array, "B C K G E"],
    earlier: ChunkKV,
    alpha: Float[Array, ""] | None,
    reach: Reach,
    block: int,
    state: tuple[Float[Array, "B K G C 1"], Float[Array, "B K G C 1"], Float[Array, "B C K G E"]],
) -> tuple[Float[Array, "B C K G E"], Float[Array, "B K G C 1"]]:
    """Folds the cached entries into a softmax and normalizes it.

    Args:
      query: the chunk's queries.
      earlier: the cached entries, as arrays or as views, which are read in place.
      alpha: the transition's α, or None.
      reach: the entries that are read.
      block: slots whose scores are in VMEM at a time; on a TPU a multiple of 128, or at least S.
      state: of the near entries: the largest score and, relative to it, the sums of weights and of weighted values.

    Returns:
      (the heads' results, the log of the normalizer).
    """
    peak, total, mixed = state
    inputs = _rows(_head_first(query)), _rows(peak[..., 0]), _rows(total[..., 0]), _rows(_head_first(mixed))
    shape = query.shape
    out, log_total = _over_heads(_fold, shape[3], inputs, earlier, alpha, reach, block)
    return _token_first(_unrows(out, shape)), _unrows(log_total, shape)[..., None]


def cached_cotangents(
    query: Float[Array, "B C K G E"],
    earlier: ChunkKV,
    alpha: Float[Array, ""] | None,
    reach: Reach,
    block: int,
    out_bar: Float[Array, "B C K G E"],
    log_total: Float[Array, "B K G C 1"],
    product: Float[Array, "B K G C 1"],
    sums: ChunkKV,
) -> tuple[Float[Array, "B C K G E"], ChunkKV]:
    """The cotangents of the queries and of the cached entries from attention to the cached entries.

    Args:
      query: see `fold_cached`, as for the next four.
      out_bar: the cotangent of the heads' results.
      log_total: from `fold_cached`.
      product: the sums of results · out_bar over E.
      sums: arrays to which the cotangents of the entries are added in place, shaped like the entries or, for a view,
        like its whole stack; None for a set that needs none.

    Returns:
      (the cached entries' part of the query's cotangent, at least float32; the sums after the addition).
    """
    inputs = _rows(_head_first(query)), _rows(_head_first(out_bar)), _rows(log_total[..., 0]), _rows(product[..., 0])
    query_bar, *totals = _over_heads(_pull_back, query.shape[3], inputs, earlier, alpha, reach, block, sums)
    leads = (part.keys.ndim - 4 for part in sums[:2] if part)
    # The kernel's results have sequences and heads first.
    restore = lambda x, lead: jnp.swapaxes(jnp.moveaxis(x, (0, 1), (lead, lead + 1)), -3, -2)
    parts = iter([jax.tree.map(lambda x, lead=lead: restore(x, lead), part) for part, lead in zip(totals, leads)])
    return _token_first(_unrows(query_bar, query.shape)), ChunkKV(*(part and next(parts) for part in sums[:2]))


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


def _over_heads(function, group, inputs, earlier, alpha, reach, block, sums=(None, None)):
    """Runs a function of one head of one sequence over all of them; `inputs` are [B, K, R, …], results [B, K, …]."""
    of_rows = lambda x: _rows(jnp.broadcast_to(x[:, None, None], (x.shape[0], 1, group, x.shape[1])))[:, 0]
    segments, ends, cached = of_rows(reach.segments), of_rows(reach.ends), reach.cached
    first = jnp.zeros((0,), jnp.int32)
    views = [
        EntryView(*x[:2], total) if isinstance(x, EntryView) else EntryView(x, first, total)
        for x, total in zip(earlier, sums)
        if x
    ]
    sets = jax.tree.map(lambda x: jnp.swapaxes(x, -3, -2), [(view.entries, view.sums) for view in views])
    lead = [len(view.index) for view in views]
    places = jnp.concatenate([*(view.index for view in views), jnp.zeros((1,), jnp.int32)])
    size = min(block, cached.shape[1])
    count = jnp.reshape((reach.start + size - 1) // size, (1,))
    alpha = jnp.zeros((1,), jnp.float32) if alpha is None else jnp.reshape(alpha, (1,))

    def run(*arguments, interpret):
        of_head = functools.partial(function, size, interpret)
        of_sequence = jax.vmap(of_head, (None, None, None, None, lead, 0))
        return jax.vmap(of_sequence, (None, 0, 0, 0, lead, 0))(*arguments)

    return jax.lax.platform_dependent(
        (count, alpha, places), segments, ends, cached, sets, inputs,
        tpu=functools.partial(run, interpret=False), default=functools.partial(run, interpret=True),
    )  # fmt: skip


def _fold(size, interpret, scalars, segments, ends, cached, sets, inputs):
    """(results [R, E], log of the normalizer [R]) of one head."""
    query, peak, total, mixed = inputs
    (rows, width), slots, wide = query.shape, cached.shape[0], accumulation_dtype(query.dtype)
    arrays = jax.tree.leaves([entries for entries, _ in sets])

    def kernel(count, alpha, places, segments, ends, query, peak, total, mixed, cached, *refs):
        entries, (out, log_total, peaks, totals, sums) = refs[:-5], refs[-5:]
        index = pl.program_id(0)

        @pl.when(index == 0)
        def _():
            peaks[...], totals[...], sums[...] = peak[...], total[...], mixed[...].T

        @pl.when(index < count[0])
        def _():
            keys, values = _read(entries, alpha, index, size, slots)
            scores = _scores(keys, query[...], index, cached, segments, ends)
            new_peak = jnp.maximum(peaks[...], jnp.max(scores, axis=0, keepdims=True))
            weights, shrink = jnp.exp(scores - new_peak), jnp.exp(peaks[...] - new_peak)
            totals[...] = totals[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            sums[...] = sums[...] * shrink + _dot(values, weights.astype(values.dtype), (0, 0))
            peaks[...] = new_peak

        @pl.when(index == pl.num_programs(0) - 1)
        def _():
            out[...] = (sums[...] / totals[...]).T.astype(out.dtype)
            log_total[...] = peaks[...] + jnp.log(totals[...])

    out, log_total = _call(
        kernel,
        scalars,
        (_row(segments), _row(ends), query, _row(peak), _row(total), mixed),
        (_row(cached), *arrays),
        size,
        outputs=(jax.ShapeDtypeStruct((rows, width), query.dtype), jax.ShapeDtypeStruct((1, rows), wide)),
        scratch=[pltpu.VMEM((1, rows), wide), pltpu.VMEM((1, rows), wide), pltpu.VMEM((width, rows), wide)],
        name="fold_cached",
        products=2,
        interpret=interpret,
    )
    return out, log_total[0]


def _pull_back(size, interpret, scalars, segments, ends, cached, sets, inputs):
    """(cotangents of the queries [R, E], of each set of entries) of one head."""
    query, out_bar, log_total, product = inputs
    (rows, width), slots, wide = query.shape, cached.shape[0], accumulation_dtype(query.dtype)
    arrays = jax.tree.leaves([entries for entries, _ in sets])
    totals = jax.tree.leaves([sums for _, sums in sets])

    def kernel(count, alpha, places, segments, ends, query, out_bar, log_total, product, cached, *refs):
        entries, old, (query_bar, *new, query_sum) = _split(refs, len(arrays), len(totals))
        index = pl.program_id(0)

        @pl.when(index == 0)
        def _():
            query_sum[...] = jnp.zeros_like(query_sum)

        @pl.when(index < count[0])
        def _():
            keys, values = _read(entries, alpha, index, size, slots)
            weights = jnp.exp(_scores(keys, query[...], index, cached, segments, ends) - log_total[...])
            weights_bar = _dot(values, out_bar[...], (1, 1))
            scores_bar = weights * (weights_bar - product[...]) * (1 / math.sqrt(width))
            scores_bar = scores_bar.astype(query.dtype)
            query_sum[...] += _dot(keys, scores_bar, (0, 0))
            kv_bar = _dot(scores_bar, query[...], (1, 0)), _dot(weights.astype(query.dtype), out_bar[...], (1, 0))
            factors = (1,) if len(sets) == 1 else (alpha[0], 1 - alpha[0])
            factors = [factor for factor, (_, sums) in zip(factors, sets) if sums]
            for before, after, (factor, x) in zip(old, new, itertools.product(factors, kv_bar)):
                after[...] = before[...] + (factor * x).astype(after.dtype)

        @pl.when((index == 0) & (count[0] == 0))
        def _():
            for before, after in zip(old, new):
                after[...] = before[...]

        @pl.when(index == pl.num_programs(0) - 1)
        def _():
            query_bar[...] = query_sum[...].T

    query_bar, *totals = _call(
        kernel,
        scalars,
        (_row(segments), _row(ends), query, out_bar, _row(log_total), _row(product)),
        (_row(cached), *arrays),
        size,
        totals=totals,
        outputs=(jax.ShapeDtypeStruct((rows, width), wide),),
        scratch=[pltpu.VMEM((width, rows), wide)],
        name="cached_cotangents",
        products=5,
        interpret=interpret,
    )
    return query_bar, *(KV(*totals[i : i + 2]) for i in range(0, len(totals), 2))


def _split(items, first, second):
    """Returns (the first `first` items, the next `second` items, the rest)."""
    return items[:first], items[first : first + second], items[first + second :]


def _call(kernel, scalars, whole, by_slot, size, *, totals=(), outputs, scratch, name, products, interpret):
    """Runs a kernel over the blocks of slots.

    Args:
      kernel: a function of references to scalars, whole, by_slot, totals, outputs, changed totals and scratch.
      scalars: (the number of live blocks [1], α [1], the indices of the sets' leading dimensions, concatenated).
      whole: arrays that are in VMEM all the time.
      by_slot: the segments of the slots [1, S] and the entries [..., S, E]; a block of them is in VMEM at a time, and
        no block is fetched after the last live one.
      size: slots of a block.
      totals: arrays like the entries; the kernel changes their live blocks in place.
      outputs: shapes of results that are in VMEM all the time.
      scratch: further arrays in VMEM.
      name: of the kernel.
      products: the number of matrix products, of 2 · rows · slots · width FLOPs each over all blocks.
      interpret: whether to interpret the kernel, as on platforms other than TPUs.

    Returns:
      (*outputs, *totals).
    """
    cached, *entries = by_slot
    (rows, width), slots = whole[2].shape, cached.shape[1]
    blocks = -(-slots // size)
    live = lambda index, count: jnp.minimum(index, jnp.maximum(count[0] - 1, 0))
    block = lambda shape, index: pl.BlockSpec(shape, _outside_mesh(index))
    at_rest = lambda x: block(x.shape, lambda index, *scalars: (0, 0))
    of_slots = block((1, size), lambda index, count, *others: (0, live(index, count)))

    def of_entries(x):
        n = entries[0].ndim - 2
        lead = range(n) if x.ndim - 2 == n else range(n, n + x.ndim - 2)  # per-loop entries have one more
        place = lambda index, count, alpha, places: (*(places[i] for i in lead), live(index, count), 0)
        return block((*[None] * len(lead), size, width), place)

    first = len(scalars) + len(whole)  # of the operands that are read by block
    parts = (blocks, *(blocks * math.prod(x.shape[:-2]) for x in (*entries, *totals)))
    operands = (f"{first + i}:{count}" for i, count in enumerate(parts))
    results = (f"{len(outputs) + i}:{count}" for i, count in enumerate(parts[len(by_slot) :]))
    return pl.pallas_call(
        _outside_mesh(kernel),
        out_shape=(*outputs, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in totals)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(blocks,),
            in_specs=[*map(at_rest, whole), of_slots, *map(of_entries, (*entries, *totals))],
            out_specs=(*map(at_rest, outputs), *map(of_entries, totals)),
            scratch_shapes=scratch,
        ),
        input_output_aliases={first + len(by_slot) + i: len(outputs) + i for i in range(len(totals))},
        interpret=interpret,
        name=name,
        # For all blocks; `melt_jax.analysis` scales it to the mean number of live ones.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * rows * slots * width,
            transcendentals=rows * slots,
            bytes_accessed=len(entries) * slots * width * entries[0].dtype.itemsize,
        ),
        metadata={
            "blocks": str(blocks),
            "operands_by_block": " ".join(operands),
            "results_by_block": " ".join(results),
            "sides": f"{width} {min(size, rows)}",  # a product sums over the width or its result has it
        },
    )(*scalars, *whole, *by_slot, *totals)


def _row(x):
    """[n] → [1, n]."""
    return x[None]


def _outside_mesh(function):
    """Traces a function without a mesh, as code of one device; else the interpreter finds two meshes in a program."""

    @functools.wraps(function)
    def run(*args):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return function(*args)

    return run


def _read(entries, alpha, index, size, slots):
    """The keys and values [size, E] of a block, blended; zeros past the last slot, where its contents are undefined."""
    read = [ref[...] for ref in entries]
    keys, values = blend(ChunkKV(KV(*read[:2]), KV(*read[2:]) if read[2:] else None), alpha[0])
    if slots % size:
        inside = index * size + jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0) < slots
        keys, values = (jnp.where(inside, x, 0) for x in (keys, values))
    return keys, values


def _scores(keys, query, index, cached, segments, ends):
    """Scores [slots, rows] of a block; −∞ for slots that a row does not attend to."""
    scores = _dot(keys, query, (1, 1)) * (1 / math.sqrt(query.shape[-1]))
    slots = index * keys.shape[0] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    visible = (slots < ends[...]) & (_column(cached[...]) == segments[...])
    return jnp.where(visible, scores, -jnp.inf)


def _column(x):
    """[1, n] → [n, 1]."""
    return jnp.broadcast_to(x, (8, x.shape[1])).T[:, :1]


def _dot(x, y, contracted):
    """The product of two matrices over one dimension of each, in the accumulation dtype; float32 is exact."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    wide = accumulation_dtype(x.dtype)
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=wide)
