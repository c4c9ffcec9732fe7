"""The bytes that decoding must move for one token of each sequence, by arithmetic.

    weights    every layer's in each of the T loops, those of the gate only in loops that apply it; the head once
    cache      the live entries of every layer in each loop: of one loop for the LoopLM, the shared ones for MELT
    written    the new entries

Activations are small and not counted. `melt_jax.compile --phase=decode` compares the compiled program with the sum.
"""

from typing import NamedTuple

from melt_jax.config import ModelConfig
from melt_jax.model.model import abstract_model, module_leaves


class DecodingBytes(NamedTuple):
    """Bytes for one token of each sequence, all devices that share the weights together; from `decoding_bytes`."""

    weights: float
    cache: float
    written: float

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self)


def decoding_bytes(config: ModelConfig, batch: int, entries: float, itemsize: int = 2) -> DecodingBytes:
    """The least bytes that a decoding step moves.

    Args:
      config: `ModelConfig`; gate "none" is the LoopLM.
      batch: B, sequences.
      entries: mean number of cached tokens per sequence.
      itemsize: bytes per number.
    """
    gated = config.loops - (config.first_loop == "copy")
    weights = 0.0
    for path, leaf in module_leaves(abstract_model(config)):
        part = path.split(".")[0]
        rows = batch * config.width if part == "embed_tokens" and not config.tied else leaf.size
        times = (gated if ".kv_gate." in path else config.loops) if part in ("layers", "norm") else 1
        weights += rows * times
    # A window only replaces final entries by those of the loop.
    entry = 2 * config.layers * config.kv_heads * config.head_width
    stored = config.loops if config.gate == "none" else 1
    return DecodingBytes(
        weights=weights * itemsize,
        cache=batch * entry * config.loops * entries * itemsize,
        written=batch * entry * stored * itemsize,
    )
