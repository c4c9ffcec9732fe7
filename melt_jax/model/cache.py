"""The key/value cache: one KV entry per token and layer for MELT, T entries for the LoopLM and in the transition.

The entries of a `Cache` have one of two forms:

    shared      [L, B, S, K, E]       read by all loops: MELT's, projected from a token's last latent
    per-loop    [T, L, B, S, K, E]    read by one loop each: the LoopLM's, projected from u, the normed input; in the
                                      transition, blends of MELT's entry and the LoopLM's of the same loop

Earlier chunks are read only after their last loop. So the transition blends their entries once, when it writes them,
instead of keeping both kinds and blending whenever it reads.

A MELT with a window also keeps the entries of the last W tokens as loops 1 … T − 1 read them. Loop T needs none: its
entries are the final ones.

Letters in shapes: L layers, T loops, B batch, S slots, C chunk length, W window, K key/value heads, E head width.
"""

import dataclasses
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ref import addupdate
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from melt_jax.config import InputError, ModelConfig
from melt_jax.model.layout import split_zeros, upcast


class KV(NamedTuple):
    """Keys (after RoPE) and values of tokens, [..., B, tokens, K, E] each."""

    keys: Float[Array, "*lead B S K E"]
    values: Float[Array, "*lead B S K E"]


class ChunkKV(NamedTuple):
    """The KV entries that one chunk adds to a cache.

    Attributes:
      entries: in the form of the cache's.
      recent: as loops 1 … T − 1 read them, [T − 1, L, B, C, K, E], for the window; None without one.
    """

    entries: KV
    recent: KV | None = None


class Window(NamedTuple):
    """The last W tokens of each sequence, oldest first.

    Attributes:
      kv: their entries as loops 1 … T − 1 read them, [T − 1, L, B, W, K, E].
      segments: their segments; 0 before a sequence's first token.
    """

    kv: KV
    segments: Int[Array, "B W"]

    def advance(
        self, recent: KV, segments: Int[Array, "B C"], start: Int[Array, ""] | Int[Array, " B"] | int
    ) -> "Window":
        """The window after a chunk.

        Args:
          recent: the chunk's entries, [T − 1, L, B, C, K, E].
          segments: the chunk's segments.
          start: the chunk's first slot. One slot for the whole batch: all tokens of the chunk enter the window. A slot
            per sequence: padding at the end of the chunk does not, since the sequence continues before it.
        """
        width = self.segments.shape[1]
        joined = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 3), self.kv, recent)
        joined_segments = jnp.concatenate([self.segments, segments], axis=1)
        if jnp.ndim(start) == 0:
            count = segments.shape[1]
            last = lambda x, axis: jax.lax.slice_in_dim(x, count, count + width, axis=axis)
            return Window(jax.tree.map(lambda x: last(x, 3), joined), last(joined_segments, 1))
        ends = jnp.arange(1, segments.shape[1] + 1, dtype=jnp.int32)[None]
        counts = jnp.max(jnp.where(segments != 0, ends, 0), axis=1)
        # One sequence at a time: a gather over the batch makes a TPU copy the whole array.
        cut = lambda x, axis: jax.lax.map(
            lambda xs: jax.lax.dynamic_slice_in_dim(xs[0], xs[1], width, axis), (x, counts)
        )
        cut_kv = lambda x: jnp.moveaxis(cut(jnp.moveaxis(x, 2, 0), 2), 0, 2)
        return Window(jax.tree.map(cut_kv, joined), cut(joined_segments, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryList:
    """The entries of each layer, or of each loop and layer, as arrays of their own, heads before slots.

    A product with them needs neither a slice nor a transposed copy. `entries[i]` has the shape and order of `KV`.

    Attributes:
      items: for each layer a `KV` of [B, K, S, E], or for each loop an `EntryList`.
    """

    items: tuple[Any, ...]

    @classmethod
    def of(cls, entries: KV) -> "EntryList":
        """The same entries as `KV` of [L, B, S, K, E] or [T, L, B, S, K, E]."""
        nested = entries.keys.ndim == 6
        parts = (jax.tree.map(itemgetter(i), entries) for i in range(len(entries.keys)))
        return cls(tuple(cls.of(part) if nested else _swap_heads(part) for part in parts))

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        return item if isinstance(item, EntryList) else _swap_heads(item)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntryStack:
    """Stacked entries that attention reads in place, one block of one layer at a time.

    A scan over the entries themselves makes a TPU copy all slots of a layer, even empty ones, before attention reads
    its blocks. A scan over `indices` that takes a `view` of each copies nothing.

    Attributes:
      entries: `KV` of [L, B, S, K, E] or [T, L, B, S, K, E].
      sums: refs of these shapes, to which the backward pass of attention adds the gradients of the entries. None: the
        gradients are dropped. In either case the entries themselves get no gradient.
    """

    entries: KV
    sums: Any = None

    def indices(self) -> Int[Array, "*lead n"]:
        """The index of each layer, or of each loop and layer, for a scan in place of the entries."""
        lead = self.entries.keys.shape[:-4]
        return jnp.asarray(np.moveaxis(np.indices(lead, np.int32), 0, -1))

    def view(self, index: Int[Array, " n"]) -> "EntryView":
        """A view of the entries at one index; it reads nothing."""
        return EntryView(self.entries, index, self.sums)


class EntryView(NamedTuple):
    """The entries [B, S, K, E] of one layer, or of one loop and layer, of an `EntryStack`; `sums` are of all layers."""

    entries: KV
    index: Int[Array, " n"]
    sums: Any = None

    def add_gradient(self, begin: Int[Array, ""] | int, kv_bar: KV) -> None:
        """Adds `kv_bar`, the gradient of the slots from `begin` on, [B, size, K, E], to the sums, if there are any."""

        def add(ref, bar):
            lead = [jax.ds(self.index[i], 1) for i in range(len(self.index))]
            bar = jnp.expand_dims(bar.astype(ref.dtype), tuple(range(len(lead))))
            place: Any = (*lead, slice(None), jax.ds(begin, bar.shape[-3]), ...)
            addupdate(ref, place, bar)

        if self.sums is not None:
            jax.tree.map(add, self.sums, kv_bar)

    def read(self, begin: Int[Array, ""] | int, size: int) -> KV:
        """The entries of slots begin … begin + size − 1, [B, size, K, E]."""

        def read(x):
            lead, (batch, _, *rest) = x.ndim - 4, x.shape[-4:]
            zero = jnp.int32(0)
            start = (*(self.index[i] for i in range(lead)), zero, jnp.asarray(begin, jnp.int32), zero, zero)
            sizes = (*[1] * lead, batch, size, *rest)
            return jax.lax.squeeze(jax.lax.dynamic_slice(x, start, sizes), range(lead))

        return jax.tree.map(read, self.entries)


def read_slots(entries: KV | EntryView, begin: Int[Array, ""] | int, size: int) -> KV:
    """The slots begin … begin + size − 1 of one layer's entries, [B, size, K, E]."""
    if isinstance(entries, EntryView):
        return entries.read(begin, size)
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size, 1), entries)


def _swap_heads(kv: KV) -> KV:
    """[B, S, K, E] from [B, K, S, E], and the reverse."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), kv)


class Cache(NamedTuple):
    """KV entries of S slots and the segment of each slot.

    Attributes:
      entries: `KV` of [L, B, S, K, E] (shared) or [T, L, B, S, K, E] (per-loop), or the same as `EntryList` or
        `EntryStack`.
      segments: [B, S]; 0 is an empty slot or padding, which no token attends to.
      window: of a MELT that has one.
    """

    entries: Any
    segments: Int[Array, "B S"]
    window: Window | None = None

    def unstack(self) -> "Cache":
        """The cache with entry lists, for an unstacked model."""
        return self._replace(entries=EntryList.of(self.entries))

    def in_place(self, sums: Any = None) -> "Cache":
        """The cache with stacked entries as `EntryStack`, which `run_chunk` reads in blocks, without copies of layers.

        An `EntryList` stays as it is.

        Args:
          sums: refs to which the backward pass adds the gradients of the entries; None drops the gradients.
        """
        return self if isinstance(self.entries, EntryList) else self._replace(entries=EntryStack(self.entries, sums))

    def stop_gradient(self) -> "Cache":
        """The cache as a constant: neither entries nor window get a gradient, and no sums receive any."""
        entries = EntryStack(self.entries.entries) if isinstance(self.entries, EntryStack) else self.entries
        return jax.lax.stop_gradient(self._replace(entries=entries))

    @property
    def keys(self) -> Float[Array | np.ndarray, "*lead B S K E"]:
        """The keys, [L, B, S, K, E] if they are shared, else [T, L, B, S, K, E]."""
        return self.entries.keys

    @property
    def values(self) -> Float[Array | np.ndarray, "*lead B S K E"]:
        """The values, of the shape of `keys`."""
        return self.entries.values

    @property
    def per_loop(self) -> bool:
        """Whether each loop has entries of its own."""
        if isinstance(self.entries, EntryList):
            return isinstance(self.entries.items[0], EntryList)
        return jax.tree.leaves(self.entries)[0].ndim == 6

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return self.segments.shape[1]

    def read(self, start: Int[Array, ""] | int, length: int) -> KV:
        """The entries of slots start … start + length − 1."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length, x.ndim - 3), self.entries)

    def write(
        self, new: ChunkKV, segments: Int[Array, "B C"], start: Int[Array, ""] | Int[Array, " B"] | int
    ) -> "Cache":
        """The cache with a chunk's entries and segments in slots start … start + C − 1.

        `start` is one slot for the whole batch, or a slot per sequence.
        """
        with jax.named_scope("cache_write"):
            return self._write(new, segments, start)

    def _write(self, new, segments, start):
        window = self.window
        if window is not None:
            assert new.recent is not None, "a window needs the entries of every loop"
            window = window.advance(new.recent, segments, start)
        entries = _write_entries(self.entries, new.entries, start)
        return Cache(entries, _write_slots(self.segments, segments, start, 1, 0), window)


def create_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: DTypeLike = jnp.bfloat16,
    transition: bool = False,
    batch_axes: Any = None,
) -> Cache:
    """An empty cache for a model.

    Args:
      config: gate "none" gives a per-loop cache, any other gate a shared one.
      batch: B.
      length: S, in tokens.
      dtype: of the entries.
      transition: a per-loop cache for a MELT.
      batch_axes: the mesh axes that split the batch; under a mesh, heads are split over the tensor axis.

    Raises:
      InputError: a transition cache for a model without a gate.
    """
    melt = config.gate != "none"
    if transition and not melt:
        raise InputError("gate: expected a gate variant for a transition, found 'none'; add a gate with `reconfigure`")
    lead = (config.loops, config.layers) if transition or not melt else (config.layers,)
    shape = (*lead, batch, length, config.kv_heads, config.head_width)
    zeros = lambda: split_zeros(shape, dtype, len(lead), batch_axes, -2)
    segments = split_zeros((batch, length), jnp.int32, 0, batch_axes)
    return Cache(KV(zeros(), zeros()), segments, create_window(config, batch, dtype, batch_axes))


def has_window(config: ModelConfig) -> bool:
    """Whether a cache of this model has a window; a LoopLM, W = 0 and T = 1 need none."""
    return config.gate != "none" and config.window > 0 and config.loops > 1


def create_window(config: ModelConfig, batch: int, dtype: DTypeLike, batch_axes: Any = None) -> Window | None:
    """An empty window for B sequences; None if the model has none."""
    if not has_window(config):
        return None
    shape = (config.loops - 1, config.layers, batch, config.window, config.kv_heads, config.head_width)
    zeros = lambda: split_zeros(shape, dtype, 2, batch_axes, -2)
    return Window(KV(zeros(), zeros()), split_zeros((batch, config.window), jnp.int32, 0, batch_axes))


def bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of cache per token: 2·L·K·E numbers of `itemsize` bytes, times T for the LoopLM."""
    entries = 1 if config.gate != "none" else config.loops
    return 2 * entries * config.layers * config.kv_heads * config.head_width * itemsize


def bytes_per_sequence(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of a sequence's window, whatever its length: 2·(T − 1)·W·L·K·E numbers; 0 for the LoopLM."""
    entries = (config.loops - 1) * config.window if config.gate != "none" else 0
    return 2 * entries * config.layers * config.kv_heads * config.head_width * itemsize


def blend(shared: KV | None, per_loop: KV | None, alpha: Float[Array, ""] | float | None) -> KV:
    """The entries that attention reads: α·shared + (1 − α)·per_loop, or those that are not None.

    Shared entries without an axis of loops count for every loop.
    """
    if shared is None or per_loop is None:
        only = per_loop if shared is None else shared
        assert only is not None, "shared or per-loop entries are needed"
        return only
    assert alpha is not None, "two kinds of entries need an α"

    def mix(shared, per_loop):
        every_loop = jnp.expand_dims(upcast(shared), tuple(range(per_loop.ndim - shared.ndim)))
        return (alpha * every_loop + (1 - alpha) * upcast(per_loop)).astype(shared.dtype)

    return jax.tree.map(mix, shared, per_loop)


def _write_entries(old, new, start):
    if isinstance(old, EntryList):
        return _write_slots(old, EntryList.of(new), start, 2, 0)
    slot_axis = old.keys.ndim - 3
    return _write_slots(old, new, start, slot_axis, slot_axis - 1)


def _write_slots(old, new, start, slot_axis, batch_axis):
    """Writes arrays of [.., B, .., C, ..] into the slots from `start` on of the arrays of another tree."""
    new = jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)
    if jnp.ndim(start) == 0:
        put_all = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, slot_axis)
        return jax.tree.map(put_all, old, new)

    def put(old, xs):  # one sequence at a time, in place: a scatter makes a TPU copy the whole cache
        i, new, slot = xs

        def put_one(old, new):
            at = [jnp.int32(0)] * old.ndim
            at[batch_axis], at[slot_axis] = i, slot
            return jax.lax.dynamic_update_slice(old, jnp.expand_dims(new, batch_axis), at)

        return jax.tree.map(put_one, old, new), None

    start = start.astype(jnp.int32)
    sequences = jnp.arange(len(start), dtype=jnp.int32)
    by_sequence = jax.tree.map(lambda new: jnp.moveaxis(new, batch_axis, 0), new)
    return jax.lax.scan(put, old, (sequences, by_sequence, start))[0]
