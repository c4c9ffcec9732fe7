"""The KV cache of MELT (arXiv 2605.07721) for transformers 5: the loops of a chunk overwrite its entries.

Letters in shapes: B batch, C chunk length, T loops, K key/value heads, E head width, W window, N entries.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin


class MeltCacheLayer(CacheLayerMixin):
    """KV entries of one layer, or of one layer in one loop of a LoopLM: [B, K, N, E].

    Attributes:
      recent: keys and values of a window's tokens as loops 1 … T − 1 read them, [T − 1, B, K, W, E]; None without.
    """

    is_sliding = False

    def __init__(self, **kwargs):
        super().__init__()
        self.recent: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `update` creates the entries."""

    def update(self, key_states: Tensor, value_states: Tensor, start: int, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes a chunk's entries to the slots from `start` on, whatever they hold; returns all entries."""
        self.keys = _overwrite(self.keys, key_states, start)
        self.values = _overwrite(self.values, value_states, start)
        self.is_initialized = True
        return self.keys, self.values

    def map(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Applies `change(tensor, batch axis)` to every tensor."""
        self.keys, self.values = change(self.keys, 0), change(self.values, 0)
        if self.recent is not None:
            self.recent = tuple(change(x, 1) for x in self.recent)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers


class MeltCache(Cache):
    """The entries of a batch: one `MeltCacheLayer` per layer for a MELT, T · L of them for a LoopLM.

    Padding takes slots, but nothing reads them. A rollback is not possible, since a window keeps nothing older.

    Attributes:
      window: W.
      ordinals: for each slot, the index of its token in its own sequence, [B, N]; −1 for padding.
      recent: the same of the window's tokens, [B, W].
      columns: tokens seen, including padding, as `generate` counts them.
      padded: whether there was any padding.
    """

    def __init__(self, window: int = 0):
        super().__init__(layer_class_to_replicate=MeltCacheLayer)
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Empties the cache."""
        self.layers.clear()
        self.ordinals: Tensor | None = None
        self.recent: Tensor | None = None
        self.columns, self.start, self.padded = 0, 0, False

    def ordinals_after(self, real: Tensor) -> Tensor:
        """The ordinals of new tokens, [B, S]; `real` says which are tokens, these first, and not padding."""
        begin = 0 if self.ordinals is None else self.ordinals.amax(1, keepdim=True) + 1
        return torch.where(real, begin + torch.arange(real.shape[1], device=real.device), -1)

    def begin_chunk(self, ordinals: Tensor) -> None:
        """Adds a slot for each token of a chunk; ordinals are [B, C]."""
        empty = ordinals[:, :0]
        earlier = empty if self.ordinals is None else self.ordinals
        self.recent = empty if self.recent is None else self.recent
        self.start = earlier.shape[1]
        self.ordinals = torch.cat([earlier, ordinals], 1)

    def mask(self, last_loop: bool, later_sweep: bool) -> Tensor | None:
        """Which entries a query of the chunk reads, [B, 1, C, N]; None: all.

        The entries are the slots before the chunk, the chunk's of this loop; except in the last loop the window's; in
        later sweeps the chunk's of the sweep before. Every query reads its own entry, so that no softmax is empty.
        """
        earlier, own = self.ordinals[:, None, : self.start], self.ordinals[:, self.start :]
        window = 0 if last_loop else self.window
        count = own.shape[1]
        if count == 1 and window == 0 and not self.padded:
            return None
        query = own[:, :, None]
        parts = [(earlier >= 0) & (earlier < query - window)]
        column = torch.arange(count, device=own.device)
        distance = (column[:, None] - column)[None]
        causal, itself = (distance >= 0) & (own >= 0)[:, None], distance == 0
        parts.append(causal & (distance <= self.window) | itself if later_sweep else causal | itself)
        if window:
            recent = self.recent[:, None]
            parts.append((recent >= 0) & (recent >= query - window))
        if later_sweep:
            parts.append(causal & (distance > self.window))
        return torch.cat(parts, -1)[:, None]

    def advance_window(self, own: list[list[tuple[Tensor, Tensor]]]) -> None:
        """The window after a chunk; `own` holds its entries in loops 1 … T − 1 of each layer."""
        joined = torch.cat([self.recent, self.ordinals[:, self.start :]], 1)
        # The W largest ordinals of each sequence, in order; padding (−1) comes first.
        last = joined.argsort(dim=1, stable=True)[:, -self.window :]
        index = last[None, :, None, :, None]
        for layer, entries in zip(self.layers, own):
            new = [torch.stack(tensors) for tensors in zip(*entries)]
            old = [x[..., :0, :] for x in new] if layer.recent is None else layer.recent
            joined_pairs = (torch.cat(pair, 3) for pair in zip(old, new))
            layer.recent = tuple(torch.take_along_dim(x, index.to(x.device), 3) for x in joined_pairs)
        self.recent = joined.gather(1, last)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, including padding."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects sequences for beam search."""
        self._map(lambda x, axis: x.index_select(axis, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence."""
        self._map(lambda x, axis: x.repeat_interleave(repeats, axis))

    def crop(self, *args, **kwargs) -> None:
        """Raises: a window keeps no older entries, and a MELT's entries depend on the borders of chunks."""
        raise NotImplementedError("cache: expected no rollback, found a call of crop; turn assisted generation off")

    def _map(self, change):
        if self.ordinals is not None:
            self.ordinals, self.recent = change(self.ordinals, 0), change(self.recent, 0)
        for layer in self.layers:
            layer.map(change)


def _overwrite(old, new, start):
    """The slots before `start` of old, followed by new; in place if old has slots for it and needs no gradient."""
    if old is None:
        return new.clone()
    if old.shape[2] == start + new.shape[2] and not (old.requires_grad or new.requires_grad):
        old[:, :, start:] = new
        return old
    return torch.cat([old[:, :, :start], new], 2)


class ChunkEntries:
    """The entries that the queries of a chunk read, in one sweep: `entries(cache layer, loop, key, value)`.

    Attributes:
      recent: the entries of each layer in loops 1 … T − 1, for the window.
    """

    def __init__(self, config: PreTrainedConfig, cache: MeltCache, previous: list | None = None):
        """`previous` holds the chunk's entries of each layer after the sweep before."""
        self.loops, self.cache, self.previous = config.total_ut_steps, cache, previous
        self.masks = [cache.mask(last_loop, previous is not None) for last_loop in (False, True)]
        self.recent: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(config.num_hidden_layers)]

    def __call__(self, layer_idx: int, loop: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Writes the chunk's entries of this loop; returns keys, values [B, K, N, E] and the mask."""
        last_loop = loop == self.loops
        parts = [self.cache.update(key, value, layer_idx, self.cache.start)]
        if self.cache.window and not last_loop:
            self.recent[layer_idx].append((key, value))
            window = self.cache.layers[layer_idx].recent
            parts += [] if window is None else [(window[0][loop - 1], window[1][loop - 1])]
        if self.previous is not None:
            parts.append(self.previous[layer_idx])
        keys, values = parts[0] if len(parts) == 1 else (torch.cat(tensors, 2) for tensors in zip(*parts))
        mask = self.masks[last_loop]
        return keys, values, None if mask is None else mask.to(keys.device)

    def final(self) -> list[tuple[Tensor, Tensor]]:
        """The chunk's entries of each layer after this sweep."""
        cut = lambda entries: entries[:, :, self.cache.start :].clone()
        return [(cut(layer.keys), cut(layer.values)) for layer in self.cache.layers]
