"""The training objectives: Ouro's pretraining, the transition and the alignment.

An objective computes *sums* over scored tokens, with one number per loop, or per loop and layer. All sums are divided
once, at the end, by the number of scored tokens of the whole batch, so that micro-batches, padding and hosts cannot
change a loss or a metric. Letters in shapes: N chunks, T loops, L layers, B batch, C chunk length, D model width, V
vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from melt_jax.data.batch import Batch
from melt_jax.model.cache import Cache, ChunkKV, create_cache
from melt_jax.model.layout import accumulation_dtype, batch_axes, upcast
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import LoopedTransformer
from melt_jax.model.sequence import (
    Alpha,
    ChunkStep,
    chunk_sums,
    perturb_weights,
    run_chunks,
    segment_positions,
    split_chunks,
)
from melt_jax.training.optimizer import group_labels

Sums = dict[str, Float[Array, "..."]]
Tokens = Int[Array | np.ndarray, "B S"]
Mask = Real[Array | np.ndarray, "B S"]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a student is compared with its teacher.

    Attributes:
      chunk_size: C of the student.
      reduction: of the alignment. "sum": ‖o_student − o_teacher‖² per token. "relative": the same, divided by the mean
        of ‖o_teacher‖² over the scored tokens of the sequence, for each layer and loop. None: no alignment.
      divergence: "forward", KL(teacher ‖ student), or "reverse", KL(student ‖ teacher).
      gradient: "full", or "chunk", which treats the entries of earlier chunks as constants.
    """

    chunk_size: int
    reduction: str | None = None
    divergence: str = "forward"
    gradient: str = "full"


class Targets(NamedTuple):
    """The teacher's outputs by chunk, as in `ChunkOutput`; None if they are not needed."""

    hidden: Float[Array, "N T B C D"]
    attention_output: Float[Array, "N T L B C D"] | None = None
    layer_input: Float[Array, "N T L B C D"] | None = None


def pretraining_sums(
    model: LoopedTransformer,
    batch: Batch,
    chunk_size: int,
    perturbation: LoopedTransformer | None = None,
    chunk_sums: Callable = chunk_sums,
) -> Sums:
    """Sums of Ouro's objective over a batch (arXiv 2510.25741).

    Args:
      model: a LoopLM, in the dtype of the computation.
      batch: with targets.
      chunk_size: C.
      perturbation: receives the gradient instead of the model; see `plain_chunk_sums`.
      chunk_sums: computes the sums over chunks and their gradient; `plain_chunk_sums` is the reference.

    Returns:
      Sums over scored tokens: cross_entropy [T] of each loop, nats; expected_cross_entropy [] under the exit
      distribution, nats; exit_probability [T], the exit distribution; exit_entropy [], its entropy in nats.
    """
    chunks = _split(batch, chunk_size)
    return _sum_over_chunks(_pretraining_step, model, (*chunks, None), None, False, perturbation, chunk_sums)


def pretraining_loss(metrics: Sums, entropy_bonus: float) -> Float[Array, ""]:
    """Expected cross-entropy − `entropy_bonus` · entropy of the exit distribution, nats per token."""
    return metrics["expected_cross_entropy"] - entropy_bonus * metrics["exit_entropy"]


def distillation_sums(
    student: LoopedTransformer,
    teacher: LoopedTransformer,
    batch: Batch,
    settings: Distillation,
    alpha: Alpha = None,
    perturbation: LoopedTransformer | None = None,
    chunk_sums: Callable = chunk_sums,
) -> Sums:
    """Sums over a batch of the differences between student and teacher, differentiable in the student's weights only.

    Args:
      student: a MELT, in the dtype of the computation.
      teacher: the frozen LoopLM; it runs on its own stream over the same tokens, in the dtype of its weights.
      batch: `Batch`.
      settings: chunk, alignment, divergence and gradient.
      alpha: the transition's blend; None in the alignment phase.
      perturbation: receives the gradient instead of the student; see `plain_chunk_sums`.
      chunk_sums: computes the sums over chunks and their gradient; `plain_chunk_sums` is the reference.

    Returns:
      Sums over scored tokens: kd [T], the KL of each loop in nats; gate_openness [T, L]; with `alpha` also alpha [];
      with a reduction also alignment [T, L].
    """
    teacher = jax.lax.stop_gradient(teacher)
    batch, positions = _split(batch, settings.chunk_size)
    targets = teacher_targets(teacher, (batch.tokens, positions, batch.segments))
    targets = targets._replace(layer_input=None)
    if settings.reduction is None:
        targets = targets._replace(attention_output=None)
    if alpha is not None:
        alpha = jnp.asarray(alpha, accumulation_dtype(student.dtype))
    power = _teacher_power(targets, jnp.asarray(batch.loss_mask)) if settings.reduction == "relative" else None
    step = functools.partial(_distillation_step, settings)
    chunks, data = (batch, positions, targets), (teacher, alpha, power)
    return _sum_over_chunks(step, student, chunks, data, alpha is not None, perturbation, chunk_sums)


def warm_start_sums(
    student: LoopedTransformer,
    teacher: LoopedTransformer,
    batch: Batch,
    chunk_size: int,
    perturbation: LoopedTransformer | None = None,
    chunk_sums: Callable = chunk_sums,
) -> Sums:
    """Sums over a batch of the differences of attention outputs, if each layer reads the teacher's stream.

    No error of one layer or loop reaches another, so that each gate learns its own task from the first step on.
    Differentiable in the gates only.

    Args:
      student: a MELT, in the dtype of the computation.
      teacher: the frozen LoopLM, in the dtype of its weights.
      batch: `Batch`.
      chunk_size: C of the student.
      perturbation: receives the gradient instead of the student; see `plain_chunk_sums`.
      chunk_sums: computes the sums over chunks and their gradient; `plain_chunk_sums` is the reference.

    Returns:
      Sums over scored tokens: alignment [T, L], relative as in `Distillation`; gate_openness [T, L].
    """
    batch, positions = _split(batch, chunk_size)
    targets = teacher_targets(jax.lax.stop_gradient(teacher), (batch.tokens, positions, batch.segments))
    power = _teacher_power(targets, jnp.asarray(batch.loss_mask))
    chunks = (batch, positions, targets)
    return _sum_over_chunks(_warm_start_step, student, chunks, power, False, perturbation, chunk_sums)


def transition_loss(
    student: LoopedTransformer,
    teacher: LoopedTransformer,
    tokens: Tokens,
    loss_mask: Mask,
    alpha: Alpha,
    chunk_size: int,
) -> Float[Array, ""]:
    """L_KD of phase 1 (arXiv 2605.07721), nats; differentiable in the student's weights only.

    The mean over loops and scored tokens of KL(teacher ‖ student), with shared and per-loop entries blended by α. Each
    sequence is one document.
    """
    batch = whole_documents(tokens, loss_mask)
    sums = distillation_sums(student, teacher, batch, Distillation(chunk_size), alpha)
    return distillation_loss(normalize(sums, scored_tokens(batch)))


def alignment_loss(
    student: LoopedTransformer,
    teacher: LoopedTransformer,
    tokens: Tokens,
    loss_mask: Mask,
    beta: Float[Array, ""] | float,
    chunk_size: int,
    reduction: str = "sum",
) -> Float[Array, ""]:
    """L_KD + β·L_align of phase 2 (arXiv 2605.07721); differentiable in the student's weights only.

    L_align is the mean over layers, loops and scored tokens of ‖o_student − o_teacher‖². With `reduction`
    "relative" it is divided by the mean of ‖o_teacher‖² over the scored tokens of the same sequence, layer and loop.
    `loss_mask` is 1 where the prediction that is made at a token is scored. Each sequence is one document.
    """
    batch = whole_documents(tokens, loss_mask)
    sums = distillation_sums(student, teacher, batch, Distillation(chunk_size, reduction))
    return distillation_loss(normalize(sums, scored_tokens(batch)), beta)


def distillation_terms(
    metrics: Sums, beta: Float[Array, ""] | float = 0.0, loops: str = "all"
) -> dict[str, Float[Array, ""]]:
    """The terms of the loss: "kd", L_KD, and "alignment", β·L_align, if there is an alignment metric.

    Args:
      metrics: from `distillation_sums`, sums or means per scored token.
      beta: β.
      loops: "all": L_KD is the mean over the loops; "last": the last loop's KL alone.
    """
    terms = {"kd": jnp.mean(metrics["kd"]) if loops == "all" else metrics["kd"][-1]}
    return terms | ({"alignment": beta * jnp.mean(metrics["alignment"])} if "alignment" in metrics else {})


def distillation_loss(metrics: Sums, beta: Float[Array, ""] | float = 0.0) -> Float[Array, ""]:
    """L_KD + β·L_align from metrics per scored token; L_KD alone if there is no alignment metric."""
    return sum_terms(distillation_terms(metrics, beta))


def sum_terms(terms: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
    """The loss: the sum of its terms."""
    return functools.reduce(jnp.add, terms.values())


def scored_tokens(batch: Batch) -> Float[Array, ""]:
    """The count that divides every sum, float32."""
    return jnp.sum(batch.loss_mask, dtype=jnp.float32)


def freeze_backbone(model: LoopedTransformer) -> LoopedTransformer:
    """The model without gradients of any weight except those of the gates."""
    labels = group_labels(model)
    return jax.tree.map(lambda x, group: x if group == "gate" else jax.lax.stop_gradient(x), model, labels)


def normalize(sums: Sums, count: Float[Array, ""]) -> Sums:
    """Sums over scored tokens → means per scored token; zeros if no token is scored."""
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1.0), sums)


def whole_documents(tokens: Tokens, loss_mask: Mask) -> Batch:
    """A `Batch` of sequences that are one document each."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return Batch(tokens, jnp.ones_like(tokens), jnp.asarray(loss_mask, jnp.int32))


def teacher_targets(teacher: LoopedTransformer, chunks: tuple[Int[Array | np.ndarray, "N B C"], ...]) -> Targets:
    """Runs the frozen teacher over (tokens, positions, segments) chunks; its cache is freed after the last one."""
    with jax.named_scope("teacher"):
        (hidden, layer_input, attention_output, _), _ = run_chunks(teacher, chunks, differentiable=False)
    return jax.lax.stop_gradient(Targets(hidden, attention_output, layer_input))


def kl_per_loop(
    teacher: LoopedTransformer,
    student: LoopedTransformer,
    teacher_hidden: Float[Array, "T B C D"],
    student_hidden: Float[Array, "T B C D2"],
    mask: Float[Array, "B C"],
) -> Float[Array, " T"]:
    """KL(teacher's next-token distribution ‖ student's), nats, summed over the tokens of `mask`.

    With teacher and student exchanged it is the reverse KL. Only one loop's logits [B, C, V] are in memory at a time,
    in the backward pass too.
    """

    @jax.checkpoint
    def one_loop(_, hidden):
        log_p = jax.nn.log_softmax(teacher.logits(hidden[0]))
        log_q = jax.nn.log_softmax(student.logits(hidden[1]))
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return None, jnp.sum(kl * mask)

    return jax.lax.scan(one_loop, None, (teacher_hidden, student_hidden))[1]


def cross_entropy_per_loop(
    model: LoopedTransformer, hidden: Float[Array, "T B C D"], targets: Int[Array, "B C"]
) -> Float[Array, "T B C"]:
    """−log of the targets' probability, nats. Only one loop's logits are in memory at a time."""

    @jax.checkpoint
    def one_loop(_, hidden):
        log_q = jax.nn.log_softmax(model.logits(hidden))
        # A masked sum instead of an index works on a vocabulary that is split over devices.
        at_target = jnp.arange(log_q.shape[-1])[None, None] == targets[..., None]
        return None, -jnp.sum(jnp.where(at_target, log_q, 0.0), axis=-1)

    return jax.lax.scan(one_loop, None, hidden)[1]


def _distillation_step(
    settings: Distillation, student: LoopedTransformer, cache: Cache, start: Any, data: Any, chunk: Any
) -> tuple[Sums, ChunkKV, Int[Array, "B C"]]:
    (teacher, alpha, power), (batch, positions, targets) = data, chunk
    if settings.gradient == "chunk":
        cache = cache.stop_gradient()
    out = run_chunk(student, batch.tokens, cache, start, positions=positions, segments=batch.segments, alpha=alpha)
    mask = batch.loss_mask.astype(jnp.float32)
    pairs = (teacher, targets.hidden), (student, out.hidden)
    (p, p_hidden), (q, q_hidden) = pairs if settings.divergence == "forward" else pairs[::-1]
    with jax.named_scope("distillation"):
        sums = {
            "kd": kl_per_loop(p, q, p_hidden, q_hidden, mask),
            "gate_openness": jnp.sum(out.gate_openness * mask[None, None], axis=(2, 3)),
        }
    if alpha is not None:
        sums["alpha"] = alpha * jnp.sum(mask)
    if targets.attention_output is not None:
        with jax.named_scope("alignment"):
            sums["alignment"] = _alignment(out.attention_output, targets.attention_output, mask, power)
    return sums, out.kv, out.segments


def _warm_start_step(
    student: LoopedTransformer, cache: Cache, start: Any, power: Float[Array, "T L B"], chunk: Any
) -> tuple[Sums, ChunkKV, Int[Array, "B C"]]:
    batch, positions, targets = chunk
    out = run_chunk(
        freeze_backbone(student),
        batch.tokens,
        cache,
        start,
        positions=positions,
        segments=batch.segments,
        layer_inputs=targets.layer_input,
    )
    mask = batch.loss_mask.astype(jnp.float32)
    sums = {
        "alignment": _alignment(out.attention_output, targets.attention_output, mask, power),
        "gate_openness": jnp.sum(out.gate_openness * mask[None, None], axis=(2, 3)),
    }
    return sums, out.kv, out.segments


def _alignment(
    student: Float[Array, "T L B C D"],
    teacher: Float[Array, "T L B C D"],
    mask: Float[Array, "B C"],
    power: Float[Array, "T L B"] | None,
) -> Float[Array, "T L"]:
    """‖o_student − o_teacher‖², divided by `power` if it is given, summed over the tokens of `mask`."""
    gap = upcast(student) - upcast(teacher)
    if power is None:
        return jnp.sum(jnp.square(gap) * mask[None, None, ..., None], axis=(2, 3, 4))
    return jnp.sum(jnp.sum(jnp.square(gap) * mask[None, None, ..., None], axis=(3, 4)) / power, axis=2)


def _teacher_power(targets: Targets, mask: Int[Array, "N B C"]) -> Float[Array, "T L B"]:
    """The mean of ‖o_teacher‖² over the scored tokens of each sequence, at least 1e-8."""
    assert targets.attention_output is not None
    mask = mask.astype(jnp.float32)

    def chunk_power(chunk):
        output, mask = chunk
        return jnp.sum(jnp.square(upcast(output)) * mask[None, None, ..., None], axis=(3, 4))

    total = jnp.sum(jax.lax.map(chunk_power, (targets.attention_output, mask)), axis=0)
    count = jnp.maximum(jnp.sum(mask, axis=(0, 2)), 1.0)
    return jnp.maximum(total / count[None, None], 1e-8)


def _pretraining_step(
    model: LoopedTransformer, cache: Cache, start: Any, data: None, chunk: Any
) -> tuple[Sums, ChunkKV, Int[Array, "B C"]]:
    batch, positions, _ = chunk
    out = run_chunk(model, batch.tokens, cache, start, positions=positions, segments=batch.segments)
    mask = batch.loss_mask.astype(jnp.float32)[None]
    cross_entropy = cross_entropy_per_loop(model, out.hidden, batch.targets)
    pdf = jnp.moveaxis(model.exit_pdf(out.hidden), -1, 0)
    sums = {
        "cross_entropy": jnp.sum(cross_entropy * mask, axis=(1, 2)),
        "expected_cross_entropy": jnp.sum(pdf * cross_entropy * mask),
        "exit_entropy": jnp.sum(jax.scipy.special.entr(pdf) * mask),
        "exit_probability": jnp.sum(pdf * mask, axis=(1, 2)),
    }
    return sums, out.kv, out.segments


def _split(batch: Batch, chunk_size: int) -> tuple[Batch, Int[Array, "N B C"]]:
    """The batch and its positions, by chunk."""
    chunk_size = min(chunk_size, batch.tokens.shape[1])
    return split_chunks((batch, segment_positions(batch.segments)), chunk_size)


def _sum_over_chunks(
    step: ChunkStep,
    model: LoopedTransformer,
    chunks: tuple[Batch, Int[Array, "N B C"], Targets | None],
    data: Any,
    transition: bool,
    perturbation: LoopedTransformer | None,
    chunk_sums: Callable,
) -> Sums:
    tokens = chunks[0].tokens
    count, batch, chunk_size = tokens.shape
    slots = count * chunk_size if count > 1 else 0
    cache = create_cache(model.config, batch, slots, model.dtype, transition, batch_axes(tokens[0]))
    with jax.named_scope("student"):
        if count == 1:
            only = jax.tree.map(lambda x: x[0], chunks)
            return step(perturb_weights(model, perturbation), cache, 0, data, only)[0]
        return chunk_sums(step, model, perturbation, cache, data, chunks)
