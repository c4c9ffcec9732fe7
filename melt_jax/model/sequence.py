"""Chunks over a sequence: sequential across chunks, parallel inside, with a gradient in memory linear in S."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from melt_jax.config import InputError
from melt_jax.model.cache import Cache, create_cache
from melt_jax.model.gradient_sums import GradientSums
from melt_jax.model.layout import accumulation_dtype, batch_axes
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import LoopedTransformer, join_layers, split_layers

Alpha = Float[Array, ""] | float | None
ChunkStep = Callable[..., tuple[Any, Any, Any]]


class SequenceOutput(NamedTuple):
    """The result of `run_sequence`.

    Attributes:
      hidden: the normed stream at the end of each loop.
      attention_output: after W_O and before the second norm.
      gate_openness: the gate's mean 1 − z, at least float32.
      cache: `Cache` of S slots.
    """

    hidden: Float[Array, "T B S D"]
    attention_output: Float[Array, "T L B S D"]
    gate_openness: Float[Array, "T L B S"]
    cache: Cache


def run_sequence(
    model: LoopedTransformer,
    tokens: Int[Array | np.ndarray, "B S"] | Sequence[Sequence[int]],
    chunk_size: int,
    alpha: Alpha = None,
    *,
    positions: Int[Array | np.ndarray, "B S"] | None = None,
    segments: Int[Array | np.ndarray, "B S"] | None = None,
) -> SequenceOutput:
    """Runs a model over whole sequences, chunk by chunk.

    Args:
      model: a LoopLM or a MELT.
      tokens: token ids.
      chunk_size: C; the last chunk may be shorter. With S or more, the sequence is a single chunk.
      alpha: the share of MELT's entries in the transition, in [0, 1]; None outside the transition.
      positions: for RoPE; by default counted from the first token of each segment.
      segments: a different id for each packed document; 0 is padding. Ones by default.

    Returns:
      `SequenceOutput`; its cache has no window, so a model with a window cannot continue from it.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    length = tokens.shape[1]
    chunk_size = min(chunk_size, length)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    positions = segment_positions(segments) if positions is None else jnp.asarray(positions)
    outputs, cache = run_chunks(model, split_chunks((tokens, positions, segments), chunk_size), alpha)
    cut = lambda x, axis: jax.lax.slice_in_dim(x, 0, length, axis=axis)
    hidden, _, attention_output, gate_openness = (
        cut(join_chunks(x, axis), axis) for x, axis in zip(outputs, (2, 3, 3, 3), strict=True)
    )
    cache = Cache(cache.read(0, length), cut(cache.segments, 1))
    return SequenceOutput(hidden, attention_output, gate_openness, cache)


def run_chunks(
    model: LoopedTransformer,
    chunks: tuple[Int[Array | np.ndarray, "N B C"], ...],
    alpha: Alpha = None,
    *,
    differentiable: bool = True,
) -> tuple[tuple[Array, ...], Cache]:
    """Runs a model over the N chunks of sequences, one after the other.

    Args:
      model: a LoopLM or a MELT.
      chunks: (tokens, positions, segments) from `split_chunks`.
      alpha: see `run_sequence`.
      differentiable: False drops the gradients of cached entries, and a TPU does not copy them layer by layer.

    Returns:
      ((hidden [N, T, B, C, D], layer_input and attention_output [N, T, L, B, C, D], gate_openness [N, T, L, B, C]) as
      in `ChunkOutput`, `Cache` of N·C slots).
    """
    count, batch, chunk_size = chunks[0].shape

    def step(cache, xs):
        start, (tokens, positions, segments) = xs
        read = cache if differentiable else cache.in_place()
        out = run_chunk(model, tokens, read, start, positions=positions, segments=segments, alpha=alpha)
        return cache.write(out.kv, out.segments, start), out[:4]

    split = batch_axes(chunks[0][0])
    cache = create_cache(model.config, batch, count * chunk_size, model.dtype, alpha is not None, split)
    cache, outputs = jax.lax.scan(step, cache, (_chunk_starts(count, chunk_size), chunks))
    return outputs, cache


def segment_positions(segments: Int[Array | np.ndarray, "B S"]) -> Int[Array, "B S"]:
    """Positions counted from the first token of each run of equal segment ids."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    changed = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return slots - jax.lax.cummax(jnp.where(changed, slots, 0), axis=1)


def split_chunks(tree: Any, chunk_size: int) -> Any:
    """Splits leaves: [B, S, …] → [N, B, C, …]; zeros (segment 0: padding) fill the last chunk."""

    def split(x):
        batch, length, *rest = x.shape
        count = -(-length // chunk_size)
        x = jnp.pad(x, [(0, 0), (0, count * chunk_size - length)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x.reshape(batch, count, chunk_size, *rest), 1, 0)

    return jax.tree.map(split, tree)


def join_chunks(x: Shaped[Array, "N ..."], axis: int) -> Shaped[Array, "..."]:
    """Concatenates the outputs of a scan over chunks: [N, …, C at axis + 1, …] → […, N·C at axis, …]."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def plain_chunk_sums(
    step: ChunkStep, weights: LoopedTransformer, perturbation: Any, cache: Cache, data: Any, chunks: Any
) -> Any:
    """Sums `step` over the chunks of a sequence; its gradient is plain differentiation, with one cache per chunk.

    Args:
      step: `(weights, cache, start, data, chunk) → (sums, entries, segments)`: the objective's sums over one chunk,
        and the `ChunkKV` and segments that the chunk adds to the cache. Static: it must not close over arrays.
      weights: a model, in the dtype of the computation.
      perturbation: zeros like the weights, in the dtype in which gradients are summed. The gradient with respect to
        it equals that with respect to the weights, but in its dtype. None: differentiate with respect to the weights.
      cache: an empty `Cache` of N·C slots.
      data: a pytree that all chunks share, not differentiated.
      chunks: a pytree of [N, B, C, …] leaves, not differentiated.

    Returns:
      The sums over all chunks.
    """
    return _forward(step, perturb_weights(weights, perturbation), cache, data, chunks)[0]


def perturb_weights(weights: LoopedTransformer, perturbation: Any) -> LoopedTransformer:
    """Weights + perturbation in the weights' dtype, so that the perturbation (zeros) receives their gradient."""
    return weights if perturbation is None else jax.tree.map(lambda w, p: w + p.astype(w.dtype), weights, perturbation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunk_sums(
    step: ChunkStep, weights: LoopedTransformer, perturbation: Any, cache: Cache, data: Any, chunks: Any
) -> Any:
    """The sums and gradient of `plain_chunk_sums`, exact and not truncated, in memory linear in the sequence length.

    Final entries never change, so the cache after the last chunk, masked to the slots before a chunk, is the cache
    that this chunk read. Only the weights, the chunks, that one cache and the windows that the chunks read are kept for
    the backward pass. It visits the chunks in reverse: it recomputes a chunk against the final cache and its window,
    pulls back the cotangents of the chunk's sums, of the entries it wrote and of the window it left, and adds up the
    cotangents of the layers' weights and of earlier entries in place. The sums start from the perturbation, so it must
    be zeros.
    """
    return _forward(step, weights, cache, data, chunks, differentiable=False)[0]


def _forward(step, weights, cache, data, chunks, differentiable=True):
    """Returns (sums over the chunks, the final cache, the windows that the chunks read).

    `differentiable`: as in `run_chunks`.
    """
    chunk_size, count = _chunk_shape(cache, chunks)

    def body(cache, xs):
        start, chunk = xs
        read = cache if differentiable else cache.in_place()
        sums, entries, segments = step(weights, read, start, data, chunk)
        return cache.write(entries, segments, start), (sums, cache.window)

    cache, (sums, windows) = jax.lax.scan(body, cache, (_chunk_starts(count, chunk_size), chunks))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), cache, windows


def _chunk_sums_forward(step, weights, perturbation, cache, data, chunks):
    sums, cache, windows = _forward(step, weights, cache, data, chunks, differentiable=False)
    return sums, (weights, perturbation, cache, windows, data, chunks)


def _chunk_sums_backward(step, residuals, sums_bar):
    weights, perturbation, cache, windows, data, chunks = residuals
    chunk_size, count = _chunk_shape(cache, chunks)
    layers, others = split_layers(weights)

    def body(carry, xs):
        entries_bar, window_bar, layers_bar, others_bar = carry
        start, window, chunk = xs
        own_bar = cache._replace(entries=entries_bar).read(start, chunk_size)
        entry_sums, layer_sums = jax.tree.map(jax.new_ref, entries_bar), GradientSums(layers_bar)

        def chunk_step(layers, others, window_kv):
            read = None if window is None else window._replace(kv=window_kv)
            earlier = cache._replace(window=read).in_place(entry_sums)
            sums, new, segments = step(join_layers(layers, others, layer_sums), earlier, start, data, chunk)
            written = None if read is None else read.advance(new.recent, segments, start).kv
            return sums, new.entries, written

        (_, entries, _), pull_back = jax.vjp(chunk_step, layers, others, window and window.kv)
        own_bar = jax.tree.map(lambda bar, new: bar.astype(new.dtype), own_bar, entries)
        # Zeros for the layers, whose gradients are in `layer_sums`.
        _, chunk_others_bar, window_bar = pull_back((sums_bar, own_bar, window_bar))
        with jax.named_scope("gradient_sums"):
            others_bar = jax.tree.map(lambda total, x: total + x.astype(total.dtype), others_bar, chunk_others_bar)
        return (jax.tree.map(jax.freeze, entry_sums), window_bar, layer_sums.take(), others_bar), None

    zeros = lambda x: jnp.zeros_like(x, accumulation_dtype(x.dtype))
    weights_zeros = jax.tree.map(zeros, weights) if perturbation is None else perturbation
    window_zeros = None if cache.window is None else jax.tree.map(jnp.zeros_like, cache.window.kv)
    totals = jax.tree.map(zeros, cache.entries), window_zeros, *split_layers(weights_zeros)
    starts = _chunk_starts(count, chunk_size)
    (_, _, layers_bar, others_bar), _ = jax.lax.scan(body, totals, (starts, windows, chunks), reverse=True)
    weights_bar = join_layers(layers_bar, others_bar)
    if perturbation is not None:
        return None, weights_bar, None, None, None
    return jax.tree.map(lambda bar, w: bar.astype(w.dtype), weights_bar, weights), None, None, None, None


chunk_sums.defvjp(_chunk_sums_forward, _chunk_sums_backward)


def _chunk_starts(count, chunk_size):
    return chunk_size * jnp.arange(count, dtype=jnp.int32)


def _chunk_shape(cache, chunks):
    count, _, chunk_size, *_ = jax.tree.leaves(chunks)[0].shape
    if cache.length not in (0, count * chunk_size):
        raise InputError(
            f"cache: expected {count * chunk_size} slots for {count} chunks of {chunk_size}, found {cache.length}"
        )
    return chunk_size, count
