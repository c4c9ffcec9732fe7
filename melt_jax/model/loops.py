"""T loops over one chunk: the one function that training, prefill and decoding run."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from melt_jax.model.attention import SAVED, AttentionMask, blockwise_attention
from melt_jax.model.cache import ChunkKV, blend, create_cache
from melt_jax.model.gate import update_latent
from melt_jax.model.layers import rms_norm, rope_table
from melt_jax.model.layout import batch_axes, split_features, split_zeros, whole_features

_policies = jax.checkpoint_policies
_attention = _policies.save_only_these_names(SAVED)
# What the gradient of a layer keeps of its forward pass beside its inputs: the outcome of attention always.
REMAT = {
    "products": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _attention),
    "layer": _attention,
}


class ChunkOutput(NamedTuple):
    """What `run_chunk` computes.

    Attributes:
      hidden: [T, B, C, D], the normed stream at the end of each loop.
      attention_output: [T, L, B, C, D], after W_O and before the sandwich norm.
      gate_openness: [T, L, B, C] float32, the gate's mean 1 − z; ones for the LoopLM.
      kv: `ChunkKV`: the chunk's final shared rows and its per-loop entries of every loop, as the cache keeps them.
      segments: [B, C] int32, to be written beside the rows.
    """

    hidden: jax.Array
    attention_output: jax.Array
    gate_openness: jax.Array
    kv: ChunkKV
    segments: jax.Array


def run_chunk(model, tokens, cache, start, *, positions=None, segments=None, alpha=None, loops=None):
    """Runs all T loops over C consecutive tokens in parallel.

    A query of loop t sees its chunk's rows as they stand in loop t, causally, and of earlier chunks the cache's rows:
    the final ones of a shared cache, loop t's of a loop cache, both blended in the transition.

    Args:
      model: `LoopedTransformer`.
      tokens: [B, C] int32.
      cache: `Cache`; only slots before `start` are seen.
      start: the chunk's first slot, a scalar or [B].
      positions: [B, C] int32 for RoPE; by default the slots.
      segments: [B, C] int32; tokens see only their own segment, and nothing sees segment 0. Ones by default.
      alpha: the transition's blend, for a cache that keeps both kinds of rows.
      loops: T, where it is not the model's.

    Returns:
      `ChunkOutput`. The cache is not changed; `cache.write(out.kv, out.segments, start)` adds the chunk.
    """
    config = model.config
    batch, length = tokens.shape
    loops = loops or config.loops
    slots = jnp.reshape(start, (-1, 1)) + jnp.arange(length, dtype=jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(slots, (batch, length))
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if (alpha is None) != (cache.shared is None or cache.per_loop is None):
        raise ValueError(
            "alpha goes with a transition cache, which keeps shared and per-loop entries, and only with one"
        )
    rope = rope_table(positions, config.head_width, config.rope_theta)
    mask = AttentionMask(segments, cache.segments, jnp.asarray(start, jnp.int32))

    def run_layer(y, xs):
        layer, latent, earlier_shared, earlier_per_loop, loop = xs
        with jax.named_scope("gate"):
            u = layer.norm(y, "input_layernorm")
            gate_openness = jnp.ones(u.shape[:-1], jnp.float32)
            shared = per_loop = None
            if cache.shared is not None:
                latent, gate_openness = update_latent(config.gate, config.first_loop, layer.kv_gate, u, latent, loop)
                shared = layer.project_kv(whole_features(latent), rope)
            if cache.per_loop is not None:
                per_loop = layer.project_kv(u, rope)
        with jax.named_scope("attention"):
            earlier, own = ChunkKV(earlier_shared, earlier_per_loop), blend(shared, per_loop, alpha)
            heads = blockwise_attention(layer.project_query(u, rope), earlier, own, alpha, mask, config.attention_block)
            attended = layer.project_output(heads)
            y = y + layer.norm(attended, "input_layernorm_2")
        with jax.named_scope("mlp"):
            m = layer.mlp(layer.norm(y, "post_attention_layernorm"))
            y = y + layer.norm(m, "post_attention_layernorm_2")
        return y, (latent, shared, per_loop, split_features(attended), gate_openness)

    if config.remat != "none":
        run_layer = jax.checkpoint(run_layer, prevent_cse=False, policy=REMAT[config.remat])

    def run_loop(state, xs):
        x, latents, _ = state
        loop, earlier_per_loop = xs
        layer_loop = jnp.full((config.layers,), loop)
        y, (latents, shared, per_loop, attended, gate_openness) = jax.lax.scan(
            run_layer, x, (model.layers, latents, cache.shared, earlier_per_loop, layer_loop)
        )
        with jax.named_scope("final_norm"):
            x = rms_norm(y, model.norm[...], config.rms_eps)
        return (x, latents, shared), (x, per_loop, attended, gate_openness)

    x = model.embed(tokens)
    latents = shared = None
    if cache.shared is not None:
        latents = split_zeros((config.layers, *x.shape), x.dtype, 1, batch_axes(x), -1)
        shared = create_cache(config, batch, length, x.dtype, batch_axes=batch_axes(x)).shared
    (_, _, shared), (hidden, per_loop, attended, gate_openness) = jax.lax.scan(
        run_loop, (x, latents, shared), (jnp.arange(1, loops + 1, dtype=jnp.int32), cache.per_loop)
    )
    return ChunkOutput(hidden, attended, gate_openness, ChunkKV(shared, per_loop), segments)
