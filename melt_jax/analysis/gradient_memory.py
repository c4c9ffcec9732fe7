"""Compares the temporary memory of the training gradient with that of plain differentiation, as reported by XLA.

Plain differentiation of the scan over chunks keeps a copy of the cache for every chunk, so its memory grows with the
square of the sequence length; `model.sequence.chunk_sums` keeps one copy. Both gradients are compiled, not run, and
include the teacher's pass. `launch/gradient_table.py` prints the table.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from melt_jax.config import InputError, ModelConfig
from melt_jax.data.batch import Batch
from melt_jax.model.model import init_model
from melt_jax.model.sequence import chunk_sums, plain_chunk_sums
from melt_jax.training.objectives import Distillation, distillation_loss, distillation_sums, normalize, scored_tokens

PHASES = {"transition": (None, 0.5), "alignment": ("sum", None)}  # (reduction, α)
CHUNKS = (4, 8, 16, 20, 32)

# Ouro's proportions at a sixteenth of its width: K·E = D and several layers, for the same share of KV entries.
MINIATURE = ModelConfig(
    vocab=512, width=128, layers=6, loops=4, heads=4, kv_heads=4, head_width=32, feed_forward=352, gate="elementwise"
)


def temporary_bytes(
    config: ModelConfig, phase: str, batch: int, chunk: int, chunks: int, mechanism: Callable[..., Any] = chunk_sums
) -> int:
    """The bytes that the compiled gradient of a phase's loss needs besides its arguments and results.

    Args:
      config: `ModelConfig` of the student, with a gate; the teacher is the LoopLM of the same shapes. Both are float32.
      phase: a key of `PHASES`.
      batch: B, sequences.
      chunk: C, tokens.
      chunks: number of chunks in a sequence.
      mechanism: `chunk_sums` or `plain_chunk_sums`.
    """
    abstract = lambda config: jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    tokens: Any = jax.ShapeDtypeStruct((batch, chunk * chunks), jnp.int32)

    def loss(student, teacher, batch):
        reduction, alpha = PHASES[phase]
        settings = Distillation(chunk, reduction)
        sums = distillation_sums(student, teacher, batch, settings, alpha, chunk_sums=mechanism)
        return distillation_loss(normalize(sums, scored_tokens(batch)), beta=0.1)

    arguments = abstract(config), abstract(dataclasses.replace(config, gate="none")), Batch(tokens, tokens, tokens)
    analysis: Any = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def print_table(config: ModelConfig, phases: Sequence[str], batch: int, chunk: int, counts: Sequence[int]) -> None:
    """Compiles and prints a line per phase and number of chunks.

    Args:
      config: `ModelConfig` of the student.
      phases: keys of `PHASES`.
      batch: B, sequences.
      chunk: C, tokens.
      counts: numbers of chunks.

    Raises:
      InputError: a phase is unknown or a number is below 1.
    """
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise InputError(f"phases: expected some of {', '.join(PHASES)}, found {', '.join(unknown)}")
    if not counts or min(batch, chunk, *counts) < 1:
        raise InputError(f"chunks, chunk_size, batch: expected at least 1, found {[*counts]}, {chunk} and {batch}")
    print(
        f"temporary memory of one gradient, MB (1e6 bytes), float32: {config.layers} layers, {config.loops} loops, "
        f"width {config.width}, chunks of {chunk} tokens, {batch} sequence(s), remat {config.remat!r}"
    )
    print(f"{'phase':<12}{'chunks':>8}{'tokens':>8}{'plain':>12}{'melt_jax':>12}{'of plain':>10}{'growth':>9}")
    for phase in phases:
        before: dict[float, int] = {}
        for count in counts:
            plain = temporary_bytes(config, phase, batch, chunk, count, plain_chunk_sums)
            ours = before[count] = temporary_bytes(config, phase, batch, chunk, count)
            growth = f"x {ours / before[count / 2]:.2f}" if count / 2 in before else ""
            sizes = f"{plain / 1e6:>12.1f}{ours / 1e6:>12.1f}{ours / plain:>10.1%}"
            print(f"{phase:<12}{count:>8}{count * chunk:>8}{sizes}{growth:>9}", flush=True)
    print("growth: melt_jax's memory over that at half the chunks; 2 is linear in the sequence")
