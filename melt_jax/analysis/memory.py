"""Memory of generation, from configs: bytes of cache per token and per sequence, and bytes of weights.

Numbers of the cache and the weights take 2 bytes. `tests/test_memory.py` compares the cache with what generation
allocates.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from melt_jax.config import ModelConfig
from melt_jax.model.cache import bytes_per_sequence, bytes_per_token
from melt_jax.model.model import abstract_model, parameter_count

ITEMSIZE = 2  # bytes per number, as in bfloat16
PAPER_LENGTH = 32_000  # generated tokens in the paper's table


class PaperFigures(NamedTuple):
    """A row of the MELT paper's Table 2 (arXiv 2605.07721): MB per token, and GB at `PAPER_LENGTH` tokens."""

    per_token: float
    cache: float
    weights: float
    total: float


PAPER = {
    "Ouro-1.4B": PaperFigures(0.786, 25.17, 2.869, 27.97),
    "MELT-1.6B": PaperFigures(0.197, 6.29, 3.272, 9.49),
    "Qwen3-1.7B": PaperFigures(0.115, 3.67, 3.442, 7.07),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose memory is computed.

    Attributes:
      name: for tables and figures; a key of `PAPER` if the paper has figures.
      config: its cache follows from it.
      weights: bytes.
      looped: whether T can be changed.
    """

    name: str
    config: ModelConfig
    weights: int
    looped: bool = True

    def with_loops(self, loops: int) -> "Model":
        """The model with T loops; itself if it is not looped."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, loops=loops)) if self.looped else self

    @property
    def per_token(self) -> int:
        """Bytes of cache per token."""
        return bytes_per_token(self.config, ITEMSIZE)

    @property
    def per_sequence(self) -> int:
        """Bytes of cache per sequence, whatever its length: its window."""
        return bytes_per_sequence(self.config, ITEMSIZE)

    def cache(self, length: int) -> int:
        """Bytes of the cache of one sequence of `length` tokens, which may exceed the model's positions."""
        return length * self.per_token + self.per_sequence

    def total(self, length: int) -> int:
        """Bytes of the weights and of the cache of one sequence."""
        return self.weights + self.cache(length)


# A Qwen3-1.7B's cache is that of a LoopLM with one loop; this package does not run it. The paper states its weights.
QWEN3 = Model("Qwen3-1.7B", ModelConfig(layers=28, loops=1, kv_heads=8), weights=3_442_000_000, looped=False)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of a model's weights."""
    return parameter_count(abstract_model(config)) * ITEMSIZE


def looplm_and_melts(
    config: ModelConfig, names: tuple[str, str], windows: Sequence[int], gate: str = "elementwise"
) -> list[Model]:
    """A LoopLM, its MELT without a window, and its MELT with each window.

    Args:
      config: of the LoopLM or of the MELT; its gate and window are ignored.
      names: of the LoopLM and of the MELT.
      windows: W of each further MELT.
      gate: gate variant of the MELTs.
    """
    looplm = dataclasses.replace(config, gate="none", window=0)
    melts = [dataclasses.replace(config, gate=gate, window=window) for window in (0, *windows)]
    weights = weight_bytes(melts[0])
    return [
        Model(names[0], looplm, weight_bytes(looplm)),
        *(Model(names[1] + (f", W = {melt.window}" if melt.window else ""), melt, weights) for melt in melts),
    ]


def published_models(windows: Sequence[int]) -> list[Model]:
    """Ouro-1.4B and 2.6B, their MELTs with and without windows, and Qwen3-1.7B.

    MELT-1.6B and MELT-3.1B are named after their weights, gates included.
    """
    small = looplm_and_melts(ModelConfig(), ("Ouro-1.4B", "MELT-1.6B"), windows)
    large = looplm_and_melts(ModelConfig(layers=48), ("Ouro-2.6B", "MELT-3.1B"), windows)
    return [*small, *large, QWEN3]
