"""Chunks over a sequence: sequential across chunks, parallel inside, and a gradient in memory linear in S."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from melt_jax.model.cache import Cache, create_cache
from melt_jax.model.layout import batch_axes
from melt_jax.model.loops import run_chunk


class SequenceOutput(NamedTuple):
    """What `run_sequence` computes.

    Attributes:
      hidden: [T, B, S, D].
      attention_output: [T, L, B, S, D], after W_O and before the sandwich norm.
      gate_openness: [T, L, B, S] float32, the gate's mean 1 − z.
      cache: `Cache` of S slots.
    """

    hidden: jax.Array
    attention_output: jax.Array
    gate_openness: jax.Array
    cache: Cache


def run_sequence(model, tokens, chunk_size, alpha=None, *, positions=None, segments=None, loops=None):
    """Runs a model over whole sequences, chunk after chunk.

    Args:
      model: `LoopedTransformer`.
      tokens: [B, S] integers.
      chunk_size: C; the last chunk may be short. S or more is one chunk.
      alpha: in [0, 1]: the transition's blend of shared and per-loop entries. None: the model as it is.
      positions: [B, S]; by default counted from each segment's first token.
      segments: [B, S]; documents packed side by side have different ids, padding has 0. Ones by default.
      loops: T, where it is not the model's.

    Returns:
      `SequenceOutput`.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    length = tokens.shape[1]
    chunk_size = min(chunk_size, length)
    if segments is None:
        segments = jnp.ones_like(tokens)
    if positions is None:
        positions = segment_positions(segments)
    outputs, cache = run_chunks(model, split_chunks((tokens, positions, segments), chunk_size), alpha, loops)
    outputs = (join_chunks(x, axis)[(slice(None),) * axis + (slice(length),)] for x, axis in zip(outputs, (2, 3, 3)))
    cut = lambda rows, axis: jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, length, axis=axis), rows)
    return SequenceOutput(*outputs, Cache(cut(cache.shared, 2), cut(cache.per_loop, 3), cache.segments[:, :length]))


def run_chunks(model, chunks, alpha=None, loops=None):
    """Runs a model over the N chunks of sequences, one after the other.

    Args:
      model: `LoopedTransformer`.
      chunks: (tokens, positions, segments), [N, B, C] each, as `split_chunks` makes them.
      alpha, loops: see `run_sequence`.

    Returns:
      ((hidden [N, T, B, C, D], attention_output [N, T, L, B, C, D], gate_openness [N, T, L, B, C]), `Cache` of N·C
      slots).
    """
    count, batch, chunk_size = chunks[0].shape

    def step(cache, xs):
        index, (tokens, positions, segments) = xs
        start = index * chunk_size
        out = run_chunk(model, tokens, cache, start, positions=positions, segments=segments, alpha=alpha, loops=loops)
        return cache.write(out.kv, out.segments, start), out[:3]

    split = batch_axes(chunks[0][0])
    cache = create_cache(model.config, batch, count * chunk_size, model.dtype, alpha is not None, loops, split)
    cache, outputs = jax.lax.scan(step, cache, (jnp.arange(count), chunks))
    return outputs, cache


def segment_positions(segments):
    """Positions counted from the first token of each run of equal segment ids: [B, S] → [B, S] int32."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)
    changed = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return slots - jax.lax.cummax(jnp.where(changed, slots, 0), axis=1)


def split_chunks(tree, chunk_size):
    """[B, S, …] leaves → [N, B, C, …]; the last chunk is filled with zeros (segment 0: padding)."""

    def split(x):
        batch, length, *rest = x.shape
        count = -(-length // chunk_size)
        x = jnp.pad(x, [(0, 0), (0, count * chunk_size - length)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(batch, count, chunk_size, *rest), 1, 0)

    return jax.tree.map(split, tree)


def join_chunks(x, axis):
    """[N, …, C at axis + 1, …] → […, N·C at axis, …]: the outputs of a scan over chunks laid end to end."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def plain_chunk_sums(step, weights, perturbation, cache, data, chunks):
    """Sums `step` over the chunks of a sequence; differentiated plainly, it keeps a copy of the cache per chunk.

    Args:
      step: `(weights, cache, start, data, chunk) → (sums, rows, segments)`: the objective's sums over one chunk, and
        what the chunk adds to the cache. Static: it must not close over arrays.
      weights: a model, in the dtype of the computation.
      perturbation: zeros like the weights, in the dtype in which gradients are added up: differentiate with respect to
        it,
        and the gradient has that dtype. None: differentiate with respect to the weights.
      cache: an empty `Cache` of N·C slots.
      data: a pytree that every chunk sees, not differentiated.
      chunks: a pytree of [N, B, C, …] leaves, not differentiated.

    Returns:
      The sums, added up over the chunks.
    """
    return _forward(step, perturb_weights(weights, perturbation), cache, data, chunks)[0]


def perturb_weights(weights, perturbation):
    """The weights as they are, with a gradient that falls on the perturbation too."""
    return weights if perturbation is None else jax.tree.map(lambda w, s: w + s.astype(w.dtype), weights, perturbation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunk_sums(step, weights, perturbation, cache, data, chunks):
    """`plain_chunk_sums` with the same gradient in memory linear in the sequence.

    Final rows never change, so the cache after the last chunk, masked to the slots before a chunk, is the cache that
    chunk saw. Kept between the passes are the weights, the chunks and that one cache. The backward pass walks the
    chunks in reverse: it recomputes a chunk against the final cache, pulls back the cotangents of the chunk's sums and
    of the rows it wrote, and adds what falls on earlier rows to their accumulator. Exact, not truncated.
    """
    return _forward(step, weights, cache, data, chunks)[0]


def _forward(step, weights, cache, data, chunks):
    chunk_size, count = _chunk_shape(cache, chunks)

    def body(cache, xs):
        index, chunk = xs
        start = index * chunk_size
        sums, rows, segments = step(weights, cache, start, data, chunk)
        return cache.write(rows, segments, start), sums

    cache, sums = jax.lax.scan(body, cache, (jnp.arange(count), chunks))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), cache


def _chunk_sums_forward(step, weights, perturbation, cache, data, chunks):
    sums, cache = _forward(step, weights, cache, data, chunks)
    return sums, (weights, perturbation, cache, data, chunks)


def _chunk_sums_backward(step, residuals, sums_bar):
    weights, perturbation, cache, data, chunks = residuals
    chunk_size, count = _chunk_shape(cache, chunks)
    rows = (cache.shared, cache.per_loop)

    def body(carry, xs):
        kv_bar, weights_bar = carry
        index, chunk = xs
        start = index * chunk_size

        def chunk_step(weights, rows):
            sums, new_kv, _ = step(weights, Cache(*rows, cache.segments), start, data, chunk)
            return sums, tuple(new_kv)

        (_, new_kv), pull_back = jax.vjp(chunk_step, weights, rows)
        own = Cache(*kv_bar, cache.segments).read(start, chunk_size)
        own = jax.tree.map(lambda bar, new: bar.astype(new.dtype), tuple(own), new_kv)
        chunk_weights_bar, earlier_bar = pull_back((sums_bar, own))
        add = lambda total, x: total + x.astype(total.dtype)
        return (jax.tree.map(add, kv_bar, earlier_bar), jax.tree.map(add, weights_bar, chunk_weights_bar)), None

    float32 = lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))
    totals = (
        jax.tree.map(float32, rows),
        jax.tree.map(float32 if perturbation is None else jnp.zeros_like, perturbation or weights),
    )
    (_, weights_bar), _ = jax.lax.scan(body, totals, (jnp.arange(count), chunks), reverse=True)
    if perturbation is not None:
        return None, weights_bar, None, None, None
    return jax.tree.map(lambda bar, w: bar.astype(w.dtype), weights_bar, weights), None, None, None, None


chunk_sums.defvjp(_chunk_sums_forward, _chunk_sums_backward)


def _chunk_shape(cache, chunks):
    count, _, chunk_size, *_ = jax.tree.leaves(chunks)[0].shape
    if cache.length not in (0, count * chunk_size):
        raise ValueError(
            f"{count} chunks of {chunk_size} tokens need a cache of {count * chunk_size} slots, got {cache.length}"
        )
    return chunk_size, count
