"""Formulas for the necessary FLOPs of a training step, a prefill and a decoding step, and for the weights they read.

A multiply-add is 2 FLOPs and only matrix products count: norms, softmax, RoPE, the exit gate (one column) and the
optimizer do not. For one token, with D width, H query heads, K key/value heads, E head width, F feed-forward width,
V vocabulary, L layers, T loops, and `entries` the mean number of KV entries that a query sees, including its own:

    projections   T · L · 2·D·E·(2·H + 2·K)     W_Q, W_K, W_V, W_O; in the transition 4·K: entries of h and of u
    gate          (T − 1) · L · 4·D²            W_z, U_z; T times if the gate is applied at loop 1 too
    attention     T · L · 4·H·E·entries         scores and weighted values
    mlp           T · L · 6·D·F
    head          2·D·V for each loop whose logits are computed

Each further sweep repeats everything but the head. A window changes nothing: a query sees every earlier token once,
through one entry or another.

A backward pass takes twice the FLOPs of its forward pass. A program that masks entries instead of skipping them, or
that recomputes, executes more than the necessary FLOPs; `melt_jax.analysis.hlo` counts those of a compiled program.
"""

import dataclasses

from melt_jax.config import PHASES, ModelConfig
from melt_jax.model.gate import gate_columns


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass by part, for one token; from `forward_flops`."""

    projections: float
    gate: float
    attention: float
    mlp: float
    head: float

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.projections + self.gate + self.attention + self.mlp + self.head


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step, all devices together, from `step_flops`.

    Attributes:
      teacher: the teacher's forward pass.
      forward: the student's.
      recomputation: the student's second forward pass, chunk by chunk, during the backward pass.
      backward: the student's backward pass.
    """

    teacher: float
    forward: float
    recomputation: float
    backward: float

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.mfu_flops + self.recomputation

    @property
    def mfu_flops(self) -> float:
        """FLOPs that model FLOPs utilization counts: all but the recomputation.

        The teacher's pass is included, because distillation needs it.
        """
        return self.teacher + self.forward + self.backward


def causal_entries(length: int, earlier: int = 0) -> float:
    """The mean number of KV entries seen by `length` consecutive tokens of a document after `earlier` ones."""
    return earlier + (length + 1) / 2


def forward_flops(
    config: ModelConfig, entries: float, logits: int | None = None, transition: bool = False, sweeps: int = 1
) -> ForwardFlops:
    """The FLOPs of one token's forward pass.

    Args:
      config: `ModelConfig`; gate "none" is the LoopLM.
      entries: mean number of KV entries that a query sees, including its own: `causal_entries` for a sequence, the
        number of tokens so far for decoding.
      logits: number of loops whose logits are computed; all by default, as in training. Decoding computes 1; a prefill
        computes 1 for its last token only.
      transition: whether per-loop entries are kept in addition to the shared ones.
      sweeps: times that the loops run; see `ModelConfig.sweeps_of`.

    Raises:
      ValueError: `transition` for a model without a gate.
    """
    if transition and config.gate == "none":
        raise ValueError("transition: expected a model with a gate, found gate='none' (a LoopLM)")
    D, H, K, E = config.width, config.heads, config.kv_heads, config.head_width
    passes = sweeps * config.loops * config.layers
    streams = 2 if transition else 1
    gated = sweeps * (config.loops - (config.first_loop == "copy")) * config.layers
    return ForwardFlops(
        projections=passes * 2 * D * E * (2 * H + 2 * K * streams),
        gate=gated * 2 * 2 * D * gate_columns(config),
        attention=passes * 4 * H * E * entries,
        mlp=passes * 6 * D * config.feed_forward,
        head=(config.loops if logits is None else logits) * 2 * D * config.vocab,
    )


def step_flops(config: ModelConfig, phase: str, batch: int, length: int, chunk_size: int | None = None) -> StepFlops:
    """The FLOPs of a training step on sequences of one document each; packed documents see fewer entries.

    Args:
      config: `ModelConfig` of the trained model: the LoopLM in pretraining, else the student. A teacher has the same
        shapes and no gate.
      phase: one of `PHASES`. The warm start computes attention outputs only, with a frozen backbone.
      batch: number of sequences.
      length: tokens of a sequence.
      chunk_size: C; if a sequence has several chunks, each is recomputed once. By default, a sequence is one chunk.

    Raises:
      ValueError: the phase is unknown.
    """
    if phase not in PHASES:
        raise ValueError(f"phase: expected one of {PHASES}, found {phase!r}")
    entries, tokens = causal_entries(length), batch * length
    student = _student_flops(config, phase, entries, min(chunk_size or length, length))
    forward, backward = tokens * student.total, tokens * _backward_flops(config, phase, student)
    chunked = chunk_size is not None and chunk_size < length
    return StepFlops(tokens * _teacher_flops(config, phase, entries), forward, forward if chunked else 0, backward)


def weight_reads(config: ModelConfig, phase: str, length: int, chunk_size: int) -> float:
    """The least number of weights that a training step reads from memory for the sequences that run at once.

    A pass over a chunk reads the weights of each product once, for all sequences together: half as many weights as it
    has FLOPs per token without attention. Per chunk, the teacher makes one pass, the student a forward pass, a
    recomputation and a backward pass.

    Args:
      config: see `step_flops`.
      phase: see `step_flops`.
      length: tokens of a sequence.
      chunk_size: C.
    """
    chunks = -(-length // chunk_size)
    student = _student_flops(config, phase, 0, min(chunk_size, length)).total / 2
    return chunks * (_teacher_flops(config, phase, 0) / 2 + (3 if chunks > 1 else 2) * student)


def _student_flops(config, phase, entries, chunk_size):
    """`ForwardFlops` of the trained model."""
    transition, sweeps = phase == "transition", config.sweeps_of(chunk_size)
    flops = forward_flops(config, entries, transition=transition, sweeps=sweeps)
    return dataclasses.replace(flops, mlp=0, head=0) if phase == "warm_start" else flops


def _backward_flops(config, phase, forward):
    """FLOPs of the trained model's backward pass, per token.

    A product has two cotangents. In the warm start, queries, their projection and frozen weights have none.
    """
    if phase != "warm_start":
        return 2 * forward.total
    heads, kv_heads = config.heads, config.kv_heads
    projections = forward.projections * (heads + 2 * kv_heads) / (2 * heads + 2 * kv_heads)
    return 2 * forward.gate + 1.5 * forward.attention + projections


def _teacher_flops(config, phase, entries):
    """FLOPs of the teacher's forward pass, per token."""
    if phase == "pretraining":
        return 0
    head = 0 if phase == "warm_start" else None
    return forward_flops(dataclasses.replace(config, gate="none"), entries, logits=head).total
