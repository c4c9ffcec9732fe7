"""The objectives in float64: their formulas, sums over micro-batches, padding, a student equal to its teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import alignment_loss, transition_loss
from melt_jax.training.objectives import (
    Distillation,
    distillation_loss,
    distillation_sums,
    distillation_terms,
    normalize,
    pretraining_loss,
    pretraining_sums,
    scored_tokens,
)
from tests.helpers.reference import log_softmax
from tests.helpers.tiny import TINY, looplm, make_model, random_batch, random_tokens, run

pytestmark = pytest.mark.usefixtures("float64")

change = dataclasses.replace
B, S, CHUNK = 4, 10, 4
SUM, RELATIVE = Distillation(CHUNK, "sum"), Distillation(CHUNK, "relative")
PHASES = {"transition": (0.3, Distillation(CHUNK)), "alignment": (None, SUM), "relative": (None, RELATIVE)}
by_phase = pytest.mark.parametrize("alpha, settings", PHASES.values(), ids=PHASES)

distill = jax.jit(distillation_sums, static_argnames="settings")
pretrain = jax.jit(pretraining_sums, static_argnames="chunk_size")


def models(config=TINY):
    return make_model(config, 1), make_model(change(config, gate="none"), 2)


@by_phase
def test_distillation_sums_follow_their_formulas(alpha, settings):
    """KL(teacher ‖ student) per loop, squared attention gap and gate openness per layer, over scored tokens."""
    student, teacher = models()
    batch = random_batch(B, S)
    got = distill(student, teacher, batch, settings, alpha)
    theirs = run(teacher, batch.tokens, chunk_size=S, segments=batch.segments)
    ours = run(student, batch.tokens, chunk_size=CHUNK, alpha=alpha, segments=batch.segments)
    log_p, log_q = (
        log_softmax(np.asarray(model.logits(x.hidden))) for model, x in ((teacher, theirs), (student, ours))
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(got["kd"], (kl * batch.loss_mask).sum((1, 2)), rtol=1e-10)
    np.testing.assert_allclose(got["gate_openness"], (ours.gate_openness * batch.loss_mask).sum((2, 3)), rtol=1e-10)
    assert ("alignment" in got) == (settings.reduction is not None)
    if settings.reduction:
        square = ((ours.attention_output - theirs.attention_output) ** 2).sum(-1)
        if settings.reduction == "relative":
            power = (theirs.attention_output**2).sum(-1) * batch.loss_mask
            square = square / (power.sum(-1) / batch.loss_mask.sum(-1))[..., None]
        np.testing.assert_allclose(got["alignment"], (square * batch.loss_mask).sum((2, 3)), rtol=1e-10)


def test_losses_are_means_per_scored_token():
    student, teacher = models()
    batch = random_batch(B, S, packed=False)
    count = batch.loss_mask.sum()
    sums = distill(student, teacher, batch, SUM)
    want = np.sum(sums["kd"]) / count / TINY.loops + 0.7 * np.sum(sums["alignment"]) / count / TINY.loops / TINY.layers
    args = student, teacher, batch.tokens, batch.loss_mask
    loss = jax.jit(lambda *args: alignment_loss(*args, beta=0.7, chunk_size=CHUNK))
    np.testing.assert_allclose(loss(*args), want, rtol=1e-10)
    blended = distill(student, teacher, batch, Distillation(CHUNK), 0.3)
    want = np.sum(blended["kd"]) / count / TINY.loops
    loss = jax.jit(lambda *args: transition_loss(*args, alpha=0.3, chunk_size=CHUNK))
    np.testing.assert_allclose(loss(*args), want, rtol=1e-10)


def test_pretraining_sums_follow_their_formulas():
    """Cross-entropy per loop, its expectation under the exit pdf, and the pdf's entropy."""
    model = make_model(change(TINY, gate="none"))
    batch = random_batch(B, S)
    got = pretrain(model, batch, chunk_size=CHUNK)
    out = run(model, batch.tokens, chunk_size=S, segments=batch.segments)
    log_q = log_softmax(np.asarray(model.logits(out.hidden)))
    cross_entropy = -np.take_along_axis(log_q, np.asarray(batch.targets)[None, ..., None], axis=-1)[..., 0]
    pdf = np.moveaxis(np.asarray(model.exit_pdf(out.hidden), np.float64), -1, 0)
    want = {
        "cross_entropy": (cross_entropy * batch.loss_mask).sum((1, 2)),
        "expected_cross_entropy": (pdf * cross_entropy * batch.loss_mask).sum(),
        "exit_entropy": -(pdf * np.log(pdf) * batch.loss_mask).sum(),
        "exit_probability": (pdf * batch.loss_mask).sum((1, 2)),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(
        pretraining_loss(got, 0.2), want["expected_cross_entropy"] - 0.2 * want["exit_entropy"], rtol=1e-10
    )


def assert_sums(got, want, factor=1.0):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], factor * np.asarray(want[name]), rtol=1e-10, atol=1e-12, err_msg=name)


@by_phase
def test_sums_of_micro_batches_add_up(alpha, settings):
    """They add up however unevenly the scored tokens are distributed; the mean of the means differs from the loss."""
    student, teacher = models()
    batch = random_batch(B, S)
    batch = batch._replace(loss_mask=batch.loss_mask * np.array([[1], [0], [1], [1]]))
    sums = lambda part: distill(student, teacher, part, settings, alpha)
    halves = [jax.tree.map(lambda x, part=part: x[part], batch) for part in (slice(0, 2), slice(2, 4))]
    parts = [sums(half) for half in halves]
    counts = [scored_tokens(half) for half in halves]
    whole = sums(batch)
    assert_sums(jax.tree.map(np.add, *parts), whole)
    assert counts[0] != counts[1] and sum(counts) == scored_tokens(batch)
    loss = lambda total, count: distillation_loss(normalize(total, count), beta=0.1)
    together = loss(whole, scored_tokens(batch))
    assert abs(np.mean([loss(*part) for part in zip(parts, counts)]) - together) > 1e-3


@by_phase
def test_padding_adds_nothing(alpha, settings):
    """More padding, sequences of padding alone and the tokens in the padding do not change a sum."""
    student, teacher = models()
    batch = random_batch(B, S)
    sums = lambda batch: distill(student, teacher, batch, settings, alpha)
    want = sums(batch)
    longer = jax.tree.map(lambda x: np.pad(x, ((0, 1), (0, 3))), batch)
    assert_sums(sums(longer), want)
    noise = np.where(batch.segments == 0, (batch.tokens + 1) % TINY.vocab, batch.tokens)
    for name, value in sums(batch._replace(tokens=noise)).items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_batch_without_scored_tokens_has_zero_loss():
    student, teacher = models()
    batch = random_batch(B, S)
    batch = batch._replace(loss_mask=np.zeros_like(batch.loss_mask))
    metrics = normalize(distill(student, teacher, batch, SUM), scored_tokens(batch))
    assert distillation_loss(metrics, beta=0.1) == 0 and scored_tokens(batch) == 0


def test_student_equal_to_its_teacher_has_zero_gradient():
    """The loss is zero too: with gate `last` and one chunk, in both phases and for any α."""
    student = make_model(change(TINY, gate="last"))
    tokens, mask = random_tokens(2, 8), np.ones((2, 8), np.int32)

    @jax.jit
    def phases(student, teacher, alpha):
        transition = lambda s: transition_loss(s, teacher, tokens, mask, alpha, chunk_size=8)
        alignment = lambda s: alignment_loss(s, teacher, tokens, mask, beta=0.1, chunk_size=8)
        return [jax.value_and_grad(loss)(student) for loss in (transition, alignment)]

    for alpha in (0.0, 0.3, 1.0):
        for value, gradient in jax.device_get(phases(student, looplm(student), alpha)):
            assert abs(value) < 1e-13
            assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-12
    other = looplm(make_model(change(TINY, gate="last"), seed=1))
    (value, gradient), _ = jax.device_get(phases(student, other, 0.3))
    assert value > 0.1 and np.abs(gradient.embed_tokens[...]).max() > 1e-3


def test_transition_starts_at_zero_loss():
    """At α = 0 the student equals the LoopLM inside it, for any gates and chunks; at α = 1 it does not."""
    student, tokens = make_model(TINY), random_tokens(2, 10)
    loss = jax.jit(lambda a: transition_loss(student, looplm(student), tokens, np.ones_like(tokens), a, chunk_size=4))
    losses = [float(loss(alpha)) for alpha in (0.0, 0.5, 1.0)]
    assert abs(losses[0]) < 1e-13 and losses[2] > losses[1] > 0.01


def test_no_gradient_reaches_the_teacher():
    student, teacher = models()
    tokens = random_tokens(1, 6)
    for chunk in (3, 6):  # several, one
        loss = lambda teacher: alignment_loss(student, teacher, tokens, np.ones_like(tokens), 1.0, chunk)  # noqa: B023
        gradient = jax.jit(jax.grad(loss))(teacher)
        assert all(not np.any(x) for x in jax.tree.leaves(gradient))


def test_alignment_is_relative_to_the_teacher():
    """Weights of both models that make attention outputs twice as large leave the relative reduction as it is."""
    student, teacher = models()
    double = lambda model: jax.tree_util.tree_map_with_path(
        lambda path, x: 2 * x if any(getattr(part, "name", None) == "o_proj" for part in path) else x, model
    )
    batch = random_batch(B, S)
    one_loop = lambda sums: np.asarray(sums["alignment"][0, 0])  # later layers and loops see the doubled output
    for settings, factor in ((SUM, 4), (RELATIVE, 1)):
        want = factor * one_loop(distill(student, teacher, batch, settings))
        np.testing.assert_allclose(one_loop(distill(double(student), double(teacher), batch, settings)), want)


def test_divergence_is_forward_or_reverse():
    """The reverse KL is the forward KL of a student and a teacher that change places."""
    one, other = (make_model(change(TINY, gate="none"), seed) for seed in (1, 2))
    batch = random_batch(B, S)
    forward = distill(one, other, batch, Distillation(CHUNK))["kd"]
    reverse = distill(other, one, batch, Distillation(CHUNK, divergence="reverse"))["kd"]
    np.testing.assert_allclose(reverse, forward, rtol=1e-10)
    assert np.abs(forward - distill(one, other, batch, Distillation(CHUNK, divergence="reverse"))["kd"]).max() > 1e-3


@pytest.mark.slow
def test_gradient_may_stop_at_the_chunk():
    """The loss stays the same; with one chunk the gradient does too, with several it does not."""
    student, teacher = models()
    batch = random_batch(B, S)

    def value_and_gradient(chunk, gradient):
        settings = Distillation(chunk, gradient=gradient)
        loss = lambda student: distillation_loss(distillation_sums(student, teacher, batch, settings))
        value, gradient = jax.jit(jax.value_and_grad(loss))(student)
        return value, np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])

    for chunk in (S, CHUNK):
        (value, full), (same, stopped) = (value_and_gradient(chunk, gradient) for gradient in ("full", "chunk"))
        np.testing.assert_allclose(same, value, rtol=1e-12)
        assert (np.abs(full - stopped).max() > 1e-3 * np.abs(full).max()) == (chunk == CHUNK)


def test_last_loop_may_be_distilled_alone():
    metrics = {"kd": jnp.array([4.0, 2.0]), "alignment": jnp.array([[3.0], [5.0]])}
    assert distillation_terms(metrics, 0.5) == {"kd": 3.0, "alignment": 2.0}
    assert distillation_terms(metrics, 0.5, "last") == {"kd": 2.0, "alignment": 2.0}


def test_gate_openness_of_fixed_gates():
    """1 for `last`, 1/t for `mean`."""
    batch = random_batch(B, S)
    for kind, want in (("last", np.ones(3)), ("mean", 1 / np.arange(1, 4))):
        student, teacher = models(change(TINY, gate=kind))
        metrics = normalize(distill(student, teacher, batch, Distillation(CHUNK)), scored_tokens(batch))
        np.testing.assert_allclose(metrics["gate_openness"], np.broadcast_to(want[:, None], (3, 2)), rtol=1e-12)
