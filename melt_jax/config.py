"""Frozen configurations."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A looped transformer: Ouro's LoopLM when `gate` is "none", MELT otherwise. Defaults are Ouro-1.4B's.

    Attributes:
      vocab: V.
      width: D, the model width.
      layers: L.
      loops: T, passes over all layers.
      heads: H, query heads.
      kv_heads: K; divides H.
      head_width: E; need not be D/H.
      feed_forward: F.
      rope_theta: the base of RoPE's frequencies.
      rms_eps: added to the mean square in every norm.
      max_positions: the longest sequence, in tokens.
      tied: the head is the embedding.
      gate: "none", or a gate variant: elementwise, scalar, mean, ema, last.
      first_loop: "copy" (h¹ = u) or "gated" (h⁰ = 0, the gate applied at loop 1 too).
      exit_threshold: cumulative exit probability at which generation takes a loop's output; 1 is the last loop.
      bos, eos, pad: token ids, None where there is none.
      remat: what the backward pass recomputes: "none", "attention" (scores and softmax) or "layer".
    """

    vocab: int = 49152
    width: int = 2048
    layers: int = 24
    loops: int = 4
    heads: int = 16
    kv_heads: int = 16
    head_width: int = 128
    feed_forward: int = 5632
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    max_positions: int = 65536
    tied: bool = False
    gate: str = "none"
    first_loop: str = "copy"
    exit_threshold: float = 1.0
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    remat: str = "none"

    @property
    def group(self):
        """G = H/K, the query heads that share a key/value head."""
        return self.heads // self.kv_heads
