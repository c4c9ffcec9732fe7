"""Temporary memory of the training gradient, by the compiler's own analysis: melt_jax's against plain differentiation.

Both gradients are compiled, not run, and `memory_analysis` says what they need beside their arguments and results.
Plain differentiation of the scan over chunks keeps a copy of the cache for every chunk: it grows with the square of the
sequence. `model.sequence.chunk_sums` keeps one. The teacher's pass and its targets are part of both.

    python -m melt_jax.memory                    the table: both phases, 4 to 32 chunks, about two minutes
    python -m melt_jax.memory --chunks 4,8 --phases alignment --remat layer
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from melt_jax.config import ModelConfig
from melt_jax.data.batch import Batch
from melt_jax.model.model import init_model
from melt_jax.model.sequence import chunk_sums, plain_chunk_sums
from melt_jax.training.objectives import distillation_loss, distillation_sums, normalize, scored_tokens

PHASES = {"transition": {"alpha": 0.5}, "alignment": {"align": True}}
CHUNKS = (4, 8, 16, 20, 32)

# Ouro's proportions at a sixteenth of its width: K·E = D and several layers, so that rows weigh what they do there.
MINIATURE = ModelConfig(
    vocab=512, width=128, layers=6, loops=4, heads=4, kv_heads=4, head_width=32, feed_forward=352, gate="elementwise"
)


def temporary_bytes(config, phase, batch, chunk, chunks, mechanism=chunk_sums):
    """Bytes that the compiled gradient of one phase's loss needs beside its arguments and results.

    Args:
      config: `ModelConfig` of the student, with a gate; the teacher is the LoopLM of the same shapes. Both are float32.
      phase: a name of `PHASES`.
      batch: B, sequences.
      chunk: C, tokens.
      chunks: chunks in a sequence.
      mechanism: `chunk_sums` or `plain_chunk_sums`.

    Returns:
      Bytes, an integer.
    """
    abstract = lambda config: jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((batch, chunk * chunks), jnp.int32)

    def loss(student, teacher, batch):
        sums = distillation_sums(student, teacher, batch, chunk, chunk_sums=mechanism, **PHASES[phase])
        return distillation_loss(normalize(sums, scored_tokens(batch)), beta=0.1)

    arguments = abstract(config), abstract(dataclasses.replace(config, gate="none")), Batch(tokens, tokens, tokens)
    return jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def print_table(config, phases, batch, chunk, counts):
    """Compiles and prints a line per phase and number of chunks."""
    print(
        f"temporary memory of one gradient, MB (1e6 bytes), float32: {config.layers} layers, {config.loops} loops, "
        f"width {config.width}, chunks of {chunk} tokens, {batch} sequence(s), remat {config.remat!r}"
    )
    print(f"{'phase':<12}{'chunks':>8}{'tokens':>8}{'plain':>12}{'melt_jax':>12}{'of plain':>10}{'growth':>9}")
    for phase in phases:
        before = {}
        for count in counts:
            plain = temporary_bytes(config, phase, batch, chunk, count, plain_chunk_sums)
            ours = before[count] = temporary_bytes(config, phase, batch, chunk, count)
            growth = f"x {ours / before[count / 2]:.2f}" if count / 2 in before else ""
            sizes = f"{plain / 1e6:>12.1f}{ours / 1e6:>12.1f}{ours / plain:>10.1%}"
            print(f"{phase:<12}{count:>8}{count * chunk:>8}{sizes}{growth:>9}", flush=True)
    print("growth: melt_jax's memory over that at half the chunks; 2 is linear in the sequence")


def main():
    """Reads the flags and prints the table."""
    parser = argparse.ArgumentParser("python -m melt_jax.memory", description=__doc__.splitlines()[0])
    numbers = lambda text: tuple(int(word) for word in text.split(","))
    parser.add_argument("--chunks", type=numbers, default=CHUNKS, help="chunks in a sequence, e.g. 4,8,16,20,32")
    parser.add_argument("--chunk_size", type=int, default=32, help="tokens in a chunk")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--phases", type=lambda text: text.split(","), default=list(PHASES), help=", ".join(PHASES))
    parser.add_argument("--remat", choices=("none", "products", "layer"), default="none", help="see ModelConfig")
    flags = parser.parse_args()
    if unknown := [phase for phase in flags.phases if phase not in PHASES]:
        parser.error(f"--phases: {', '.join(unknown)} unknown; there are {', '.join(PHASES)}")
    config = dataclasses.replace(MINIATURE, remat=flags.remat)
    print_table(config, flags.phases, flags.batch, flags.chunk_size, flags.chunks)


if __name__ == "__main__":
    main()
