"""Scoring: perplexity and KL to a teacher per loop, and the evaluation of a run.

Perplexity and KL are measured with the training chunk over whole sequences, and in decoding (chunk 1) over the first
tokens of each sequence. The difference between the two on the same tokens is the training-inference gap of the model
(MELT, arXiv 2605.07721).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from melt_jax.config import InputError, TrainConfig
from melt_jax.data import arithmetic, stream
from melt_jax.data.batch import Batch
from melt_jax.inference.answers import BeforePiece, exact_answers, fresh_problems, silent
from melt_jax.model.cache import Cache, bytes_per_sequence, bytes_per_token, create_cache
from melt_jax.model.layout import batch_axes
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import LoopedTransformer
from melt_jax.model.sequence import join_chunks, segment_positions, split_chunks
from melt_jax.sharding import (
    batch_groups,
    batch_sharding,
    for_inference,
    gather_at_use,
    local_batch_indices,
    place_batch,
)
from melt_jax.training.objectives import cross_entropy_per_loop, kl_per_loop

PIECE_TOKENS = 512  # tokens of a sequence that a LoopLM runs as one chunk, and whose logits are in memory at a time


@dataclasses.dataclass(frozen=True)
class LoopScores:
    """Perplexity and KL(teacher ‖ model) over scored tokens.

    Attributes:
      chunk: C, tokens per chunk.
      tokens: scored tokens.
      perplexity: exp of the mean cross-entropy, per loop.
      kl: nats per token, per loop that both models have; empty without a teacher.
      final_kl: nats per token, between the last loops of both; None without a teacher.
      gate_openness: the gate's mean 1 − z over the same tokens, per loop and layer; empty for a LoopLM.
    """

    chunk: int
    tokens: int
    perplexity: list[float]
    kl: list[float]
    final_kl: float | None
    gate_openness: list[list[float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores with the training chunk and in decoding.

    Attributes:
      chunked: with the training chunk, over whole sequences.
      chunked_start: with the training chunk, over the first tokens of each sequence; None: decoding is not measured.
      decoding: with chunk 1, over the same first tokens; None: not measured.
    """

    chunked: LoopScores
    chunked_start: LoopScores | None
    decoding: LoopScores | None

    def __str__(self) -> str:
        """One line: the KL of the last loops with the training chunk, in decoding, and their difference."""
        of = lambda scores: "–" if scores.final_kl is None else f"{scores.final_kl:.4f}"
        line = f"KL to the teacher {of(self.chunked)} nats per token in chunks of {self.chunked.chunk}"
        if self.decoding is None or self.chunked_start is None:
            return line
        if self.chunked_start != self.chunked:
            line += f"; on the first tokens {of(self.chunked_start)}"
        line += f", {of(self.decoding)} in decoding"
        if self.decoding.final_kl is None or self.chunked_start.final_kl is None:
            return line
        return f"{line}, difference {self.decoding.final_kl - self.chunked_start.final_kl:+.4f}"


def compare(
    model: LoopedTransformer,
    teacher: LoopedTransformer | None,
    batch: Batch,
    chunk_size: int,
    decoding_tokens: int,
    rows: int = 16,
    before_piece: BeforePiece = silent,
) -> Comparison:
    """Perplexity and KL with the training chunk and in decoding.

    Args:
      model, teacher, batch, chunk_size, rows, before_piece: see `perplexity_and_kl`.
      decoding_tokens: tokens at the start of each sequence on which decoding is measured; 0: not measured. The same
        tokens are also scored with `chunk_size`, for comparison.

    Raises:
      InputError: see `perplexity_and_kl`.
    """
    start = first_tokens(batch, decoding_tokens) if decoding_tokens else None
    chunked = perplexity_and_kl(model, teacher, batch, chunk_size, rows, before_piece)
    if start is None:
        return Comparison(chunked, None, None)
    same = start.tokens.shape == np.shape(batch.tokens)
    again = chunked if same else perplexity_and_kl(model, teacher, start, chunk_size, rows, before_piece)
    return Comparison(chunked, again, perplexity_and_kl(model, teacher, start, 1, rows, before_piece))


def first_tokens(batch: Batch, decoding_tokens: int) -> Batch:
    """The first tokens of each sequence of a batch.

    Raises:
      InputError: none of them is scored.
    """
    start = Batch(*(np.asarray(field)[:, :decoding_tokens] for field in batch))
    scored = np.flatnonzero(np.any(np.asarray(batch.loss_mask), axis=0))
    if len(scored) and not np.any(start.loss_mask):
        raise InputError(
            f"decoding_tokens: expected 0 or at least {scored[0] + 1}, because no earlier token is scored, found"
            f" {decoding_tokens}"
        )
    return start


def perplexity_and_kl(
    model: LoopedTransformer,
    teacher: LoopedTransformer | None,
    batch: Batch,
    chunk_size: int,
    rows: int = 16,
    before_piece: BeforePiece = silent,
    teacher_chunk: int | None = None,
) -> LoopScores:
    """Perplexity of a model over a batch and its KL to a teacher, per loop.

    Under a mesh (`jax.set_mesh`) the sequences are split over its batch axes. The result is a ratio of sums, so it does
    not depend on the mesh, the number of processes or `rows`.

    Args:
      model: the model to score.
      teacher: a model with the same vocabulary, run over the same tokens with all its loops; or None.
      batch: [B, S] host arrays with targets, the same in every process.
      chunk_size: C of the model.
      rows: sequences run at a time; under a mesh a multiple of its batch groups.
      before_piece: see `answers.BeforePiece`.
      teacher_chunk: C of a teacher that is a MELT; a divisor of `chunk_size`; None: the same.

    Raises:
      InputError: the vocabularies differ, or no token is scored.
    """
    check_vocabularies(model, teacher)
    count = int(np.sum(batch.loss_mask))
    if count == 0:
        raise InputError("loss_mask: expected at least one scored token, found none")
    total_rows, length = np.shape(batch.tokens)
    rows = min(rows, -(-total_rows // batch_groups()) * batch_groups())
    totals: dict[str, Any] = {}
    for first in range(0, total_rows, rows):
        last = min(first + rows, total_rows)
        before_piece(f"chunk {chunk_size}, {length} tokens of sequences {first + 1} to {last} of {total_rows}")
        piece = place_padded(Batch(*(np.asarray(field)[first:last] for field in batch)), rows)
        sums = comparison_sums(model, teacher, piece, min(chunk_size, length), teacher_chunk)
        totals = {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
    perplexity = np.exp(totals["cross_entropy"] / count).tolist()
    kl = (totals["kl"] / count).tolist() if teacher is not None else []
    openness = (totals["gate_openness"] / count).tolist() if model.config.gate != "none" else []
    return LoopScores(chunk_size, count, perplexity, kl[:-1], kl[-1] if kl else None, openness)


def kl_to_decoding(
    model: LoopedTransformer,
    batch: Batch,
    chunk_size: int,
    decoding_tokens: int,
    rows: int = 16,
    before_piece: BeforePiece = silent,
) -> float:
    """KL(decoding ‖ chunks) between a model's own last loops, nats per token.

    It is 0 up to rounding if C ≤ sweeps · (W + 1). Otherwise it measures by how much a prefill in chunks of C tokens
    differs from token-by-token decoding, and so how far the outcome depends on where a prompt is cut.

    Args:
      model, batch, chunk_size, rows, before_piece: see `perplexity_and_kl`.
      decoding_tokens: tokens at the start of each sequence on which it is measured.
    """
    start = first_tokens(batch, decoding_tokens)
    kl = perplexity_and_kl(model, model, start, chunk_size, rows, before_piece, teacher_chunk=1).final_kl
    assert kl is not None
    return kl


def check_vocabularies(model: LoopedTransformer, teacher: LoopedTransformer | None) -> None:
    """Raises InputError if a model and its teacher have vocabularies of different sizes."""
    if teacher is not None and teacher.config.vocab != model.config.vocab:
        raise InputError(
            f"teacher: expected a vocabulary of {model.config.vocab} tokens, the model's, found {teacher.config.vocab};"
            " a KL needs a common vocabulary"
        )


def rows_at_a_time(config: TrainConfig) -> int:
    """Sequences that an evaluation scores at a time, over all devices: those of a training micro-batch."""
    return config.data.batch // config.micro_batches


@functools.partial(jax.jit, static_argnames=("chunk_size", "teacher_chunk"))
def comparison_sums(
    model: LoopedTransformer,
    teacher: LoopedTransformer | None,
    batch: Batch,
    chunk_size: int,
    teacher_chunk: int | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Sums over the scored tokens of a batch, in memory linear in the sequence.

    One scan over the chunks carries the caches of both models and adds up each chunk's sums, so that only one piece's
    hidden states and logits are in memory at a time. A piece is several short chunks, up to `PIECE_TOKENS` tokens, or
    one long chunk. A LoopLM teacher runs a piece as one chunk, because its result does not depend on the chunk.

    Under a mesh, sequences are split over the batch axes, and weights that are split over fsdp are gathered at each
    use; weights from `sharding.for_inference` are whole already.

    Args:
      model: the model to score.
      teacher: a model with the same vocabulary, or None.
      batch: [B, S], with targets; under a mesh split by `sharding.batch_sharding`.
      chunk_size: C of the model; static.
      teacher_chunk: C of a MELT teacher, a divisor of `chunk_size`; static; None: the same.

    Returns:
      cross_entropy [T], nats; with a teacher kl [n + 1], nats: KL(teacher ‖ model) of each of the n loops that both
      have, then of the last loop of each; for a MELT gate_openness [T, L].
    """
    model, teacher = gather_at_use(model), gather_at_use(teacher)
    size = piece_size(batch.tokens.shape[1], chunk_size)
    pieces = split_chunks((batch, segment_positions(batch.segments)), size)
    count, rows, _ = pieces[0].tokens.shape
    axes = batch_axes(batch.tokens)
    empty = lambda m: create_cache(m.config, rows, count * size, m.dtype, batch_axes=axes)
    if teacher is not None and teacher.config.gate == "none":
        teacher_chunk = size
    elif teacher_chunk is None:
        teacher_chunk = chunk_size

    def piece_sums(caches, xs):
        start, (piece, positions) = xs
        cache, hidden, openness = run_piece(model, caches[0], piece, positions, start, chunk_size)
        mask = piece.loss_mask.astype(jnp.float32)
        with jax.named_scope("cross_entropy"):
            cross_entropy = cross_entropy_per_loop(model, hidden, piece.targets)
            sums = {"cross_entropy": jnp.sum(cross_entropy * mask[None], axis=(1, 2))}
        if model.config.gate != "none":
            sums["gate_openness"] = jnp.sum(openness * mask[None, None], axis=(2, 3))
        if teacher is None:
            return (cache, None), sums
        teacher_cache, teacher_hidden, _ = run_piece(teacher, caches[1], piece, positions, start, teacher_chunk)
        with jax.named_scope("distillation"):
            common = min(len(hidden), len(teacher_hidden))
            of_teacher, of_model = (jnp.concatenate([x[:common], x[-1:]]) for x in (teacher_hidden, hidden))
            sums["kl"] = kl_per_loop(teacher, model, of_teacher, of_model, mask)
        return (cache, teacher_cache), sums

    caches = empty(model), None if teacher is None else empty(teacher)
    starts = jnp.arange(count, dtype=jnp.int32) * size
    _, sums = jax.lax.scan(piece_sums, caches, (starts, pieces))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def piece_size(length: int, chunk_size: int) -> int:
    """Tokens of a piece: a whole number of chunks, about PIECE_TOKENS, with little padding at the sequence's end."""
    chunks = -(-length // chunk_size)
    pieces = -(-chunks // max(1, PIECE_TOKENS // chunk_size))
    return -(-chunks // pieces) * chunk_size


def run_piece(
    model: LoopedTransformer,
    cache: Cache,
    batch: Batch,
    positions: Int[Array, "B P"],
    start: Int[Array, ""],
    chunk_size: int,
) -> tuple[Cache, Float[Array, "T B P D"], Float[Array, "T L B P"]]:
    """Runs consecutive tokens from slot `start` on, chunk by chunk.

    Returns:
      (the cache with them, hidden states, gate openness).
    """
    chunks = split_chunks((batch.tokens, positions, batch.segments), chunk_size)

    def one_chunk(cache, xs):
        start, (tokens, positions, segments) = xs
        out = run_chunk(model, tokens, cache, start, positions=positions, segments=segments)
        return cache.write(out.kv, out.segments, start), (out.hidden, out.gate_openness)

    starts = start + jnp.arange(len(chunks[0]), dtype=jnp.int32) * chunk_size
    cache, (hidden, openness) = jax.lax.scan(one_chunk, cache, (starts, chunks))
    return cache, join_chunks(hidden, 2), join_chunks(openness, 3)


def place_padded(batch: Batch, rows: int) -> Batch:
    """A batch on the devices, padded to `rows` sequences, so that all pieces share one compilation."""
    pad = lambda x: np.pad(np.asarray(x, np.int32), ((0, rows - len(x)), (0, 0)))
    batch = jax.tree.map(pad, batch)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.asarray, batch)
    sharding = batch_sharding(mesh)
    indices = local_batch_indices(sharding, rows)
    return place_batch(jax.tree.map(lambda x: x[indices], batch), sharding, indices, rows)


# ---- the evaluation of a run


@dataclasses.dataclass(frozen=True)
class Scores:
    """A row of the table of results; `dataclasses.asdict` of it is plain JSON.

    Attributes:
      answers: fraction of problems with an exact answer; None without problems.
      completions: fraction of problems with every token exact; None without problems.
      problems: number of problems.
      comparison: with the teacher; None if it was not measured.
      cache_bytes_per_token: in the dtype of the computation.
      cache_bytes_per_sequence: the same for what a sequence needs whatever its length, the window.
      loops: T.
    """

    answers: float | None
    completions: float | None
    problems: int
    comparison: Comparison | None
    cache_bytes_per_token: int
    cache_bytes_per_sequence: int
    loops: int


def score(
    model: LoopedTransformer, teacher: LoopedTransformer | None, config: TrainConfig, before_piece: BeforePiece = silent
) -> Scores:
    """Runs the evaluation of a `TrainConfig`.

    Problems and arithmetic sequences depend on `evaluation.seed`; other sequences are read from `evaluation.path`.

    Args:
      model: in any dtype, its weights split over the mesh in any way.
      teacher: the LoopLM to compare with; None: no sequence is scored.
      config: the run's config.
      before_piece: see `answers.BeforePiece`.
    """
    evaluation, data = config.evaluation, config.data
    answers = comparison = None
    if evaluation.problems:
        problems = fresh_problems(evaluation.seed, evaluation.problems, data.low, data.high, data.hops)
        whole = for_inference(model, config.dtype)
        answers = exact_answers(whole, problems, config.chunk_size, before_piece=before_piece)
        del whole
    if evaluation.sequences and teacher is not None:
        batch = stream.evaluation_batch(config)
        model, teacher = scoring_weights(model, config), scoring_weights(teacher, config)
        tokens, rows = evaluation.decoding_tokens, rows_at_a_time(config)
        comparison = compare(model, teacher, batch, config.chunk_size, tokens, rows, before_piece)
    itemsize = jnp.dtype(config.dtype).itemsize
    return Scores(
        None if answers is None else float(answers.answer_exact.mean()),
        None if answers is None else float(answers.completion_exact.mean()),
        evaluation.problems,
        comparison,
        bytes_per_token(model.config, itemsize),
        bytes_per_sequence(model.config, itemsize),
        model.config.loops,
    )


def check_evaluation(config: TrainConfig) -> None:
    """Raises InputError if the evaluation of a run would score no token in decoding."""
    evaluation = config.evaluation
    if evaluation.sequences and evaluation.decoding_tokens:
        first_tokens(stream.evaluation_batch(config), evaluation.decoding_tokens)


def scoring_weights(model: LoopedTransformer, config: TrainConfig) -> LoopedTransformer:
    """A model in the dtype of the computation, with its weights split as in the training step (`config.gather`).

    "step": not split over the batch axes. "layer": split as stored; `comparison_sums` gathers them at each use.
    """
    if config.gather == "step":
        return for_inference(model, config.dtype)
    return jax.jit(lambda model: jax.tree.map(lambda x: x.astype(config.dtype), model))(model)


def sample(model: LoopedTransformer, config: TrainConfig) -> str:
    """A problem of a run's evaluation as text: the question, the model's completion, whether its answer is exact."""
    data = config.data
    problem = fresh_problems(config.evaluation.seed, 4, data.low, data.high, data.hops)[-1]
    answers = exact_answers(model, [problem], config.chunk_size)
    names = dict(enumerate(arithmetic.VOCABULARY))
    text = lambda tokens: "".join(names.get(token, "\N{REPLACEMENT CHARACTER}") for token in tokens)
    verdict = "exact" if answers.answer_exact[0] else f"wrong: the answer is {problem.answer}"
    return f"{text(problem.prompt)}{text(answers.completions[0])}   ({verdict})"
