"""What is minimised: Ouro's pre-training, the transition and the alignment.

An objective adds up *sums* over scored tokens, each with one number per loop, or per loop and layer. All are divided
by the same count, the scored tokens of the whole batch, after everything is added up: so micro-batches, padding and
hosts cannot change a loss or a metric.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from melt_jax.data.batch import Batch
from melt_jax.model.cache import create_cache
from melt_jax.model.layout import batch_axes
from melt_jax.model.loops import run_chunk
from melt_jax.model.sequence import chunk_sums, perturb_weights, run_chunks, segment_positions, split_chunks


class Targets(NamedTuple):
    """The teacher's outputs by chunk: hidden [N, T, B, C, D], and attention outputs [N, T, L, B, C, D] or None."""

    hidden: jax.Array
    attention_output: jax.Array | None


def pretraining_sums(model, batch, chunk_size, perturbation=None, chunk_sums=chunk_sums):
    """Sums of Ouro's objective over a batch (arXiv 2510.25741).

    Returns:
      dict, nats summed over scored tokens: cross_entropy [T] of each loop, expected_cross_entropy [] under the exit
      distribution, exit_probability [T], that distribution, and exit_entropy [], its entropy.
    """
    return _sum_over_chunks(_pretraining_step, model, batch, None, None, chunk_size, False, perturbation, chunk_sums)


def pretraining_loss(metrics, entropy_bonus):
    """Expected cross-entropy minus `entropy_bonus` × the entropy of the exit distribution, nats a token."""
    return metrics["expected_cross_entropy"] - entropy_bonus * metrics["exit_entropy"]


def distillation_sums(
    student, teacher, batch, chunk_size, alpha=None, align=False, perturbation=None, chunk_sums=chunk_sums
):
    """Sums over a batch of what a student differs in from its teacher.

    Args:
      student: a MELT model, in the dtype of the computation.
      teacher: the frozen LoopLM; it runs over its own stream of the same tokens, in the dtype of its weights.
      batch: `Batch`.
      chunk_size: C of the student.
      alpha: the transition's blend; None in the alignment phase.
      align: also compare attention outputs.
      perturbation: what the gradient falls on in place of the student; see `plain_chunk_sums`.
      chunk_sums: the gradient's mechanism; `plain_chunk_sums` is the reference.

    Returns:
      dict, summed over scored tokens: kd [T], KL(teacher ‖ student) of each loop in nats; gate_openness [T, L]; with
      alpha
      also alpha []; with align also alignment [T, L], ‖o_student − o_teacher‖². Differentiable in the student alone.
    """
    teacher = jax.lax.stop_gradient(teacher)
    targets = functools.partial(teacher_targets, teacher, align=align)
    data = (teacher, None if alpha is None else jnp.asarray(alpha, jnp.float32))
    return _sum_over_chunks(
        _distillation_step, student, batch, targets, data, chunk_size, alpha is not None, perturbation, chunk_sums
    )


def transition_loss(student, teacher, tokens, loss_mask, alpha, chunk_size):
    """L_KD of phase 1, nats: mean over loops and scored tokens of KL(teacher ‖ student), rows blended by α.

    tokens and loss_mask are [B, S]; one document a sequence. A scalar, differentiable in the student.
    """
    batch = whole_documents(tokens, loss_mask)
    metrics = normalize(distillation_sums(student, teacher, batch, chunk_size, alpha), scored_tokens(batch))
    return distillation_loss(metrics)


def alignment_loss(student, teacher, tokens, loss_mask, beta, chunk_size):
    """L_KD + β·L_align of phase 2; the latter is the mean over layers, loops and tokens of ‖o_student − o_teacher‖²."""
    batch = whole_documents(tokens, loss_mask)
    metrics = normalize(distillation_sums(student, teacher, batch, chunk_size, align=True), scored_tokens(batch))
    return distillation_loss(metrics, beta)


def distillation_loss(metrics, beta=0.0):
    """L_KD + β·L_align from metrics per scored token; L_KD alone where nothing is aligned."""
    loss = jnp.mean(metrics["kd"])
    return loss + beta * jnp.mean(metrics["alignment"]) if "alignment" in metrics else loss


def scored_tokens(batch):
    """The count by which every sum is divided, float32."""
    return jnp.sum(batch.loss_mask, dtype=jnp.float32)


def normalize(sums, count):
    """Sums over scored tokens → means per scored token; zeros where none is scored."""
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1.0), sums)


def whole_documents(tokens, loss_mask):
    """A `Batch` of sequences that are one document each."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return Batch(tokens, jnp.ones_like(tokens), jnp.asarray(loss_mask, jnp.int32))


def teacher_targets(teacher, chunks, align):
    """Runs the frozen teacher over (tokens, positions, segments) chunks; its rows are dropped when the last is done."""
    (hidden, attention_output, _), _ = run_chunks(teacher, chunks)
    return jax.tree.map(jax.lax.stop_gradient, Targets(hidden, attention_output if align else None))


def kl_per_loop(teacher, student, teacher_hidden, student_hidden, mask):
    """KL(teacher's next-token distribution ‖ student's), nats, summed over the tokens of `mask`: [T].

    Hidden states are [T, B, C, D]. One loop's logits [B, C, V] exist at a time, in the backward pass too.
    """

    @jax.checkpoint
    def one_loop(_, hidden):
        log_p = jax.nn.log_softmax(teacher.logits(hidden[0]))
        log_q = jax.nn.log_softmax(student.logits(hidden[1]))
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return None, jnp.sum(kl * mask)

    return jax.lax.scan(one_loop, None, (teacher_hidden, student_hidden))[1]


def cross_entropy_per_loop(model, hidden, targets):
    """−log of the probability of the targets [B, C], nats: hidden [T, B, C, D] → [T, B, C]. One loop's logits exist."""

    @jax.checkpoint
    def one_loop(_, hidden):
        log_q = jax.nn.log_softmax(model.logits(hidden))
        # A masked sum, not an index: it works on a vocabulary that is split over devices.
        at_target = jnp.arange(log_q.shape[-1]) == targets[..., None]
        return None, -jnp.sum(jnp.where(at_target, log_q, 0.0), axis=-1)

    return jax.lax.scan(one_loop, None, hidden)[1]


def _distillation_step(student, cache, start, data, chunk):
    teacher, alpha = data
    batch, positions, targets = chunk
    out = run_chunk(student, batch.tokens, cache, start, positions=positions, segments=batch.segments, alpha=alpha)
    mask = batch.loss_mask.astype(jnp.float32)
    with jax.named_scope("distillation"):
        sums = {
            "kd": kl_per_loop(teacher, student, targets.hidden, out.hidden, mask),
            "gate_openness": jnp.sum(out.gate_openness * mask, axis=(2, 3)),
        }
    if alpha is not None:
        sums["alpha"] = alpha * jnp.sum(mask)
    if targets.attention_output is not None:
        with jax.named_scope("alignment"):
            gap = out.attention_output.astype(jnp.float32) - targets.attention_output.astype(jnp.float32)
            sums["alignment"] = jnp.sum(jnp.square(gap) * mask[..., None], axis=(2, 3, 4))
    return sums, out.kv, out.segments


def _pretraining_step(model, cache, start, data, chunk):
    del data
    batch, positions, _ = chunk
    out = run_chunk(model, batch.tokens, cache, start, positions=positions, segments=batch.segments)
    mask = batch.loss_mask.astype(jnp.float32)

    cross_entropy = cross_entropy_per_loop(model, out.hidden, batch.targets)
    pdf = jnp.moveaxis(model.exit_pdf(out.hidden), -1, 0)
    sums = {
        "cross_entropy": jnp.sum(cross_entropy * mask, axis=(1, 2)),
        "expected_cross_entropy": jnp.sum(pdf * cross_entropy * mask),
        "exit_entropy": jnp.sum(jax.scipy.special.entr(pdf) * mask),
        "exit_probability": jnp.sum(pdf * mask, axis=(1, 2)),
    }
    return sums, out.kv, out.segments


def _sum_over_chunks(step, model, batch, make_targets, data, chunk_size, transition, perturbation, chunk_sums):
    chunk_size = min(chunk_size, batch.tokens.shape[1])
    batch, positions = split_chunks((batch, segment_positions(batch.segments)), chunk_size)
    targets = make_targets((batch.tokens, positions, batch.segments)) if make_targets else None
    chunks = batch, positions, targets
    count, rows, _ = batch.tokens.shape
    slots = count * chunk_size if count > 1 else 0
    cache = create_cache(model.config, rows, slots, model.dtype, transition, batch_axes=batch_axes(batch.tokens[0]))
    if count == 1:
        only = jax.tree.map(lambda x: x[0], chunks)
        return step(perturb_weights(model, perturbation), cache, 0, data, only)[0]
    return chunk_sums(step, model, perturbation, cache, data, chunks)
