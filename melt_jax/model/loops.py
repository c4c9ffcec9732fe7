"""T loops over one chunk: the function that training, prefill and decoding share."""

import dataclasses
import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from melt_jax.config import InputError, ModelConfig
from melt_jax.model.attention import SAVED, AttentionMask, blockwise_attention
from melt_jax.model.cache import KV, Cache, ChunkKV, EntryList, EntryStack, blend, create_cache, has_window
from melt_jax.model.gate import LOGITS, update_latent
from melt_jax.model.layers import DecoderLayer, RopeTable, rms_norm, rope_table
from melt_jax.model.layout import accumulation_dtype, batch_axes, split_features, split_zeros, whole_features
from melt_jax.model.model import LoopedTransformer, is_unstacked

_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(SAVED)
_attention_and_gate = _policies.save_only_these_names(SAVED, LOGITS)  # in place of the gate's two products
# For each `ModelConfig.remat`: the values of a layer, besides its inputs, that are kept for the backward pass.
REMAT = {
    "products": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _attention_and_gate),
    "layer": _attention,
}


class ChunkOutput(NamedTuple):
    """The result of `run_chunk`.

    Attributes:
      hidden: the normed stream at the end of each loop.
      layer_input: the stream that enters each layer.
      attention_output: after W_O and before the second norm.
      gate_openness: the gate's mean 1 − z, at least float32; ones for the LoopLM.
      kv: the chunk's entries for the cache.
      segments: to be written to the cache with the entries.
    """

    hidden: Float[Array, "T B C D"]
    layer_input: Float[Array, "T L B C D"]
    attention_output: Float[Array, "T L B C D"]
    gate_openness: Float[Array, "T L B C"]
    kv: ChunkKV
    segments: Int[Array, "B C"]


class _Context(NamedTuple):
    """Values shared by all layers and loops of a sweep."""

    rope: RopeTable
    mask: AttentionMask
    alpha: Float[Array, ""] | None


class _Earlier(NamedTuple):
    """The entries that one layer reads in one loop, besides the chunk's own of that loop.

    Attributes:
      cached: [B, S, K, E], of the cache; of an `EntryStack`, the index of its view.
      window: [B, W, K, E], of the window, or None.
      previous: [B, C, K, E], of the chunk itself after the sweep before, or None.
    """

    cached: Any
    window: KV | None
    previous: KV | None


def run_chunk(
    model: LoopedTransformer,
    tokens: Int[Array, "B C"],
    cache: Cache,
    start: Int[Array, ""] | Int[Array, " B"] | int,
    *,
    positions: Int[Array, "B C"] | None = None,
    segments: Int[Array, "B C"] | None = None,
    alpha: Float[Array, ""] | float | None = None,
    layer_inputs: Float[Array, "T L B C D"] | None = None,
) -> ChunkOutput:
    """Runs all T loops over C consecutive tokens in parallel (MELT, arXiv 2605.07721, Fig. 3a).

    A query of loop t attends causally to its chunk's entries as they are in loop t, to the entries of loop t of the W
    tokens before it, and to the cache's entries of all other earlier tokens: the final ones of a shared cache, those
    of loop t of a per-loop cache. In the transition all of these are blends, α parts MELT's entry and 1 − α parts the
    LoopLM's of loop t.

    With several sweeps the loops run again over the same tokens. From the second sweep on, tokens of the chunk further
    back than W are read through the final entries of the sweep before. A chunk of at most sweeps · (W + 1) tokens is
    then exactly token-by-token decoding.

    Args:
      model: a LoopLM or a MELT; T is `model.config.loops`.
      tokens: token ids.
      cache: only slots before `start` are read.
      start: the chunk's first slot, for the whole batch or per sequence.
      positions: for RoPE; by default the slots.
      segments: tokens attend only to their own segment; segment 0 is padding. Ones by default.
      alpha: the transition's α, for a MELT with a per-loop cache.
      layer_inputs: the stream that enters each layer, instead of the output of the layer before.

    Returns:
      `ChunkOutput`. The cache is unchanged; `cache.write(out.kv, out.segments, start)` adds the chunk.

    Raises:
      InputError: α without a transition cache, or the reverse; a cache with entries but without the model's window.
    """
    config, (batch, length) = model.config, tokens.shape
    if cache.length and cache.window is None and has_window(config):
        raise InputError(f"cache: expected one with a window of {config.window}, from `create_cache`, found none")
    if (alpha is not None) != (cache.per_loop and config.gate != "none"):
        raise InputError(f"alpha: expected a number for a MELT with a per-loop cache, else None, found {alpha}")
    start = jnp.asarray(start, jnp.int32)
    slots = jnp.reshape(start, (-1, 1)) + jnp.arange(length, dtype=jnp.int32)[None]
    if positions is None:
        positions = jnp.broadcast_to(slots, (batch, length))
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    wide = accumulation_dtype(model.dtype)
    rope = rope_table(positions, config.head_width, config.rope_theta, wide)
    recent = None if cache.window is None else cache.window.segments
    mask = AttentionMask(segments, cache.segments, start, config.window, recent)
    context = _Context(rope, mask, None if alpha is None else jnp.asarray(alpha, wide))
    x = model.embed(tokens)
    if config.sweeps_of(length) == 1:
        return _run_loops(model, cache, context, x, None, layer_inputs)

    def run_sweep(previous, sweep):
        return _run_loops(model, cache, context._replace(mask=mask._replace(sweep=sweep)), x, previous, layer_inputs)

    def next_entries(previous, sweep):
        return run_sweep(previous, sweep).kv.entries, None

    empty = create_cache(config, batch, length, x.dtype, alpha is not None, batch_axes(x)).entries
    sweeps = jnp.arange(config.sweeps_of(length), dtype=jnp.int32)
    previous, _ = jax.lax.scan(next_entries, empty, sweeps[:-1])
    return run_sweep(previous, sweeps[-1])


def _run_loops(
    model: LoopedTransformer,
    cache: Cache,
    context: _Context,
    x: Float[Array, "B C D"],
    previous: KV | None,
    layer_inputs: Float[Array, "T L B C D"] | None,
) -> ChunkOutput:
    """One sweep: T loops over a chunk from its embeddings x; `previous` is the chunk's entries of the sweep before."""
    config = model.config
    scan_layers = _scan(in_lists=is_unstacked(model))
    loops_in_lists = isinstance(cache.entries, EntryList) and cache.per_loop
    scan_loops = _scan(loops_in_lists, unroll=config.loops if config.unroll else 1)
    if is_unstacked(model) and cache.length:
        # The scores of one token are small, and a block of the slots would be a copy. A longer chunk has two blocks or
        # more, because the loop over blocks skips those without entries.
        block = cache.length if x.shape[1] == 1 else min(config.attention_block, -(-cache.length // 2))
        config = dataclasses.replace(config, attention_block=block)
    run_layer = functools.partial(_run_layer, config, context, cache.entries)
    if config.remat != "none":
        run_layer = jax.checkpoint(run_layer, prevent_cse=False, policy=REMAT[config.remat])

    def run_nth_layer(loop, y, xs):
        index, layer, *rest = xs
        return run_layer(loop, y, (layer if model.layer_sums is None else model.layer_sums.send(layer, index), *rest))

    final = _scanned(cache.entries), previous

    def run_loop(state, xs):
        x, latents, _ = state
        loop, final_of_loop, window, given = xs
        cached, previous = final_of_loop if cache.per_loop else final
        earlier = _Earlier(cached, window, previous)
        x, (layer_input, latents, (shared, *more), attention_output, gate_openness) = scan_layers(
            functools.partial(run_nth_layer, loop),
            x,
            (jnp.arange(config.layers), model.layers, latents, earlier, given),
        )
        with jax.named_scope("final_norm"):
            x = rms_norm(x, model.norm[...], config.rms_eps)
        return (x, latents, shared), (more, (x, layer_input, attention_output, gate_openness))

    latents, shared = _before_first_loop(config, x)
    loops = jnp.arange(1, config.loops + 1, dtype=jnp.int32)
    # Loop T does not read the window; zeros stand in for its entries.
    pad = lambda entries: jnp.concatenate([entries, jnp.zeros_like(entries[:1])])
    window = None if cache.window is None else jax.tree.map(pad, cache.window.kv)
    (_, _, shared), ((per_loop, recent), outputs) = scan_loops(
        run_loop, (x, latents, shared), (loops, final if cache.per_loop else None, window, layer_inputs)
    )
    kv = ChunkKV(blend(shared, per_loop, context.alpha), jax.tree.map(lambda entries: entries[:-1], recent))
    hidden, layer_input, attention_output, gate_openness = outputs
    return ChunkOutput(hidden, layer_input, attention_output, gate_openness, kv, context.mask.segments)


def _scan(in_lists: bool, unroll: int = 1) -> Callable[..., Any]:
    """`jax.lax.scan`, or the same over lists, where a list stands for an array with a leading axis."""
    return _scan_lists if in_lists else functools.partial(jax.lax.scan, unroll=unroll)


def _scan_lists(step, state, xs):
    is_list = lambda x: isinstance(x, nnx.List | EntryList)
    count = len(jax.tree.leaves(xs, is_leaf=is_list)[0])
    outputs = []
    for i in range(count):
        state, output = step(state, jax.tree.map(itemgetter(i), xs, is_leaf=is_list))
        outputs.append(output)
    return state, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


def _before_first_loop(config: ModelConfig, x: Float[Array, "B C D"]):
    """Zeros for h⁰ [L, B, C, D] and for the chunk's shared entries; None for a LoopLM."""
    if config.gate == "none":
        return None, None
    batch, length, _ = x.shape
    split = batch_axes(x)
    latents = split_zeros((config.layers, *x.shape), x.dtype, 1, split, -1)
    return latents, create_cache(config, batch, length, x.dtype, batch_axes=split).entries


def _scanned(entries: Any) -> Any:
    """What a scan over loops or layers slices: the entries themselves, or the indices of an `EntryStack`."""
    return entries.indices() if isinstance(entries, EntryStack) else entries


def _run_layer(config: ModelConfig, context: _Context, stored: Any, loop: Int[Array, ""], y: Float[Array, "B C D"], xs):
    """One layer in one loop, as a step of a scan; xs are (layer, its latent, its `_Earlier`, its input or None).

    `stored` are the entries of all layers.
    """
    layer, latent, earlier, given = xs
    cached = stored.view(earlier.cached) if isinstance(stored, EntryStack) else earlier.cached
    layer_input = y = y if given is None else whole_features(given)
    with jax.named_scope("gate"):
        u = layer.norm(y, "input_layernorm")
        latent, shared, per_loop, gate_openness = _chunk_kv(config, context, layer, u, latent, loop)
    with jax.named_scope("attention"):
        own = blend(shared, per_loop, context.alpha)
        near = [own] if earlier.window is None else [earlier.window, own]
        if earlier.previous is not None:
            near.append(earlier.previous)
        near = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *near)
        mask = context.mask._replace(last_loop=loop == config.loops)
        query = layer.project_query(u, context.rope)
        heads = blockwise_attention(query, cached, near, mask, config.attention_block, config.attention)
        y, attention_output = layer.add_attention(y, heads)
    with jax.named_scope("mlp"):
        y = layer.add_mlp(y)
    kv = shared, per_loop, None if earlier.window is None else own
    return y, (split_features(layer_input), latent, kv, split_features(attention_output), gate_openness)


def _chunk_kv(
    config: ModelConfig,
    context: _Context,
    layer: DecoderLayer,
    u: Float[Array, "B C D"],
    latent: Float[Array, "B C D"] | None,
    loop: Int[Array, ""],
) -> tuple[Float[Array, "B C D"] | None, KV | None, KV | None, Float[Array, "B C"]]:
    """(hᵗ, MELT's entries of this loop, the LoopLM's, gate openness); None for what the model has not."""
    if latent is None:
        return None, None, layer.project_kv(u, context.rope), jnp.ones(u.shape[:-1], accumulation_dtype(u.dtype))
    latent, gate_openness = update_latent(config.gate, config.first_loop, layer.kv_gate, u, latent, loop)
    shared = layer.project_kv(whole_features(latent), context.rope)
    per_loop = None if context.alpha is None else layer.project_kv(u, context.rope)
    return latent, shared, per_loop, gate_openness
