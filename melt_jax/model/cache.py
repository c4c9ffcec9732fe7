"""The key/value cache: a row per token and layer shared by the loops, T of them for the LoopLM, both in the transition.

A `Cache` keeps up to two kinds of rows over the same slots:

    shared   [L, B, S, K, E]       the shared cache of MELT: one row per token and layer, projected from the last latent
    per_loop     [T, L, B, S, K, E]    the loop cache of the LoopLM: a row per token, layer and loop, projected from u

MELT has the first, the LoopLM the second, the transition both. Everything else is common to them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from melt_jax.model.layout import split_zeros


class KV(NamedTuple):
    """Keys (after RoPE) and values of tokens, [..., B, tokens, K, E] each."""

    keys: jax.Array
    values: jax.Array


class ChunkKV(NamedTuple):
    """The rows that one chunk adds to a cache; None where the cache keeps none."""

    shared: KV | None
    per_loop: KV | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """KV of S slots and the segment each slot belongs to.

    Attributes:
      shared: `KV` of [L, B, S, K, E], or None.
      per_loop: `KV` of [T, L, B, S, K, E], or None.
      segments: [B, S] int32; 0 is an empty slot or padding, which nothing sees.
    """

    shared: KV | None
    per_loop: KV | None
    segments: jax.Array

    @property
    def keys(self):
        """The shared keys [L, B, S, K, E] where there are some, else the loop cache's [T, L, B, S, K, E]."""
        return (self.shared or self.per_loop).keys

    @property
    def values(self):
        """The values, of the shape of `keys`."""
        return (self.shared or self.per_loop).values

    @property
    def length(self):
        """S, the number of slots."""
        return self.segments.shape[1]

    def read(self, start, length):
        """The `ChunkKV` of slots start … start + length − 1."""
        take = lambda axis: lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, axis)
        return ChunkKV(jax.tree.map(take(2), self.shared), jax.tree.map(take(3), self.per_loop))

    def write(self, rows, segments, start):
        """The cache with a chunk's `ChunkKV` and its segments [B, C] at slots start … start + C − 1.

        `start` is one slot for all batch rows, or [B] with a slot for each.
        """
        put = lambda axis: lambda old, new: _write_slots(old, new.astype(old.dtype), start, axis)
        shared = jax.tree.map(put(2), self.shared, rows.shared)
        per_loop = jax.tree.map(put(3), self.per_loop, rows.per_loop)
        return Cache(shared, per_loop, _write_slots(self.segments, segments, start, 1))


def create_cache(config, batch, length, dtype=jnp.bfloat16, transition=False, loops=None, batch_axes=None):
    """An empty cache for a model.

    Args:
      config: `ModelConfig`; gate "none" makes a loop cache, any other a shared one.
      batch: B.
      length: S, in tokens.
      dtype: of the rows.
      transition: keep per-loop entries beside the shared ones.
      loops: T, where it is not the config's.
      batch_axes: the mesh axes that batch rows are split over, under a mesh; heads are split over its tensor axis.
    """
    shape = (config.layers, batch, length, config.kv_heads, config.head_width)
    zeros = lambda lead: split_zeros((*lead, *shape), dtype, len(lead) + 1, batch_axes, -2)
    empty = lambda *lead: KV(zeros(lead), zeros(lead))
    melt = config.gate != "none"
    if transition and not melt:
        raise ValueError("a transition needs a model with a gate; this one has gate='none' (a LoopLM)")
    per_loop = empty(loops or config.loops) if transition or not melt else None
    return Cache(empty() if melt else None, per_loop, split_zeros((batch, length), jnp.int32, 0, batch_axes))


def bytes_per_token(config, itemsize=2, loops=None):
    """Bytes of cache that one token takes: 2·L·K·E numbers, times the loops for the LoopLM."""
    rows = 1 if config.gate != "none" else (loops or config.loops)
    return 2 * rows * config.layers * config.kv_heads * config.head_width * itemsize


def blend(shared, per_loop, alpha):
    """KV as attention sees them: α·shared + (1 − α)·per_loop, or whichever is kept alone."""
    if shared is None or per_loop is None:
        return shared if per_loop is None else per_loop
    mix = lambda s, b: (alpha * s.astype(jnp.float32) + (1 - alpha) * b.astype(jnp.float32)).astype(s.dtype)
    return jax.tree.map(mix, shared, per_loop)


def _write_slots(old, new, start, slot_axis):
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, slot_axis)
    batch_axis = slot_axis - 1

    def put(old, xs):  # one sequence after the other, in place: a scatter makes a TPU copy the whole cache
        i, row, slot = xs
        at = [0] * old.ndim
        at[batch_axis], at[slot_axis] = i, slot
        return jax.lax.dynamic_update_slice(old, jnp.expand_dims(row, batch_axis), at), None

    return jax.lax.scan(put, old, (jnp.arange(len(start)), jnp.moveaxis(new, batch_axis, 0), start))[0]
