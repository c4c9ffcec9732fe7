"""The FLOPs that a training step, a prefill and a decoding step need, by formula.

A multiply-add is 2 FLOPs and only matrix products count: norms, softmax, RoPE, the exit gate (one column) and the
optimizer do not. For one token, with D width, H query heads, K key/value heads, E head width, F feed-forward width,
V vocabulary, L layers, T loops, and `rows` the mean number of rows that a query sees, its own included:

    projections   T · L · 2·D·E·(2·H + 2·K)     W_Q, W_K, W_V, W_O; in the transition 4·K: rows of h and of u
    gate          (T − 1) · L · 4·D²            W_z, U_z; T times where the gate is applied at loop 1 too
    attention     T · L · 4·H·E·rows            scores and mixed values
    mlp           T · L · 6·D·F
    head          2·D·V for each loop whose logits are wanted

A backward pass is twice its forward pass. This is what the mathematics needs: a program that masks rows instead of
leaving them out, or computes something twice, does more; `melt_jax.analysis.hlo` counts what a compiled program does.
"""

import dataclasses

from melt_jax.config import PHASES


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass by part, of a token from `forward_flops`."""

    projections: float
    gate: float
    attention: float
    mlp: float
    head: float

    @property
    def total(self):
        """All parts."""
        return self.projections + self.gate + self.attention + self.mlp + self.head


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step, all devices together, from `step_flops`.

    Attributes:
      teacher: the teacher's forward pass.
      forward: the student's.
      recomputation: the student's second forward pass, from which the gradient of a sequence of chunks is taken.
      backward: the student's backward pass.
    """

    teacher: float
    forward: float
    recomputation: float
    backward: float

    @property
    def total(self):
        """All parts."""
        return self.mfu_flops + self.recomputation

    @property
    def mfu_flops(self):
        """What model FLOPs utilisation counts, divided by the time and the devices' peak: all but the recomputation.

        The teacher's pass is part of it, since no step of distillation can do without.
        """
        return self.teacher + self.forward + self.backward


def causal_entries(length, earlier=0):
    """Mean rows that the queries of `length` consecutive tokens see, of one document with `earlier` tokens before."""
    return earlier + (length + 1) / 2


def forward_flops(config, rows, logits=None, transition=False):
    """FLOPs of one token's forward pass.

    Args:
      config: `ModelConfig`; gate "none" is the LoopLM.
      rows: mean number of rows a query sees, its own included: `causal_entries` of a sequence; while decoding, the
        tokens
        so far.
      logits: loops whose logits are computed; all by default, as in training. Decoding computes 1, and a prefill that
        many for its last token alone.
      transition: per-loop entries are kept beside the shared ones.

    Returns:
      `ForwardFlops`.

    Raises:
      ValueError: `transition` with a model that has no gate.
    """
    if transition and config.gate == "none":
        raise ValueError("a transition needs a model with a gate; this one has gate='none' (a LoopLM)")
    D, H, K, E = config.width, config.heads, config.kv_heads, config.head_width
    passes = config.loops * config.layers
    streams = 2 if transition else 1
    gated = (config.loops - (config.first_loop == "copy")) * config.layers
    outputs = {"elementwise": D, "scalar": 1}.get(config.gate, 0)
    return ForwardFlops(
        projections=passes * 2 * D * E * (2 * H + 2 * K * streams),
        gate=gated * 2 * 2 * D * outputs,
        attention=passes * 4 * H * E * rows,
        mlp=passes * 6 * D * config.feed_forward,
        head=(config.loops if logits is None else logits) * 2 * D * config.vocab,
    )


def step_flops(config, phase, batch, length, chunk_size=None):
    """FLOPs of a training step on sequences of one document each; packed documents see fewer rows.

    Args:
      config: `ModelConfig` of what is trained: the LoopLM in pre-training, else the student. A teacher has the same
        shapes and no gate.
      phase: "pretraining", "transition" or "alignment".
      batch: sequences.
      length: tokens of one.
      chunk_size: C; where the sequence has several chunks, each is recomputed once. By default it is one chunk.

    Returns:
      `StepFlops`.

    Raises:
      ValueError: an unknown phase.
    """
    if phase not in PHASES:
        raise ValueError(f"phase: expected one of {PHASES}, found {phase!r}")
    rows, tokens = causal_entries(length), batch * length
    forward = tokens * forward_flops(config, rows, transition=phase == "transition").total
    teacher = 0
    if phase != "pretraining":
        teacher = tokens * forward_flops(dataclasses.replace(config, gate="none"), rows).total
    chunked = chunk_size is not None and chunk_size < length
    return StepFlops(teacher, forward, forward if chunked else 0, 2 * forward)
