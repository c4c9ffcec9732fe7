"""Sequences in chunks: a token-by-token reference, the memory-linear gradient, program size and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import init_model, run_sequence
from melt_jax.analysis.gradient_memory import temporary_bytes
from melt_jax.model.sequence import chunk_sums, join_chunks, plain_chunk_sums, segment_positions, split_chunks
from melt_jax.training.objectives import (
    Distillation,
    distillation_loss,
    distillation_sums,
    pretraining_loss,
    pretraining_sums,
)
from tests.helpers.marks import slow
from tests.helpers.reference import run_reference
from tests.helpers.tiny import TINY, make_model, numpy_tensors, packed_segments, random_batch, random_tokens, run

change = dataclasses.replace
EQUAL_HEADS = change(TINY, heads=3, kv_heads=3, head_width=8, tied=True)
REFERENCE_CASES = {
    "elementwise, grouped heads, short last chunk": (TINY, 23, 5, None),
    "first loop gated, tied, chunks of one": (change(EQUAL_HEADS, first_loop="gated"), 11, 1, None),
    "transition": (TINY, 17, 4, 0.3),
    "window, short last chunk": (change(TINY, window=6), 17, 5, None),
    "window of 2, two sweeps, transition": (change(TINY, window=2, sweeps=2), 21, 8, 0.3),
    "scalar, one chunk": (change(TINY, gate="scalar"), 16, 16, None),
    "LoopLM": (change(TINY, gate="none"), 19, 6, None),
    "mean": (change(EQUAL_HEADS, gate="mean"), 13, 3, None),
    "ema, transition, first loop gated": (change(TINY, gate="ema", first_loop="gated"), 14, 5, 0.7),
    "last, one layer, one loop": (change(TINY, gate="last", layers=1, loops=1), 12, 5, None),
}


def assert_reference(config, tokens, segments, chunk, alpha):
    model = make_model(config, seed=3)
    out = run(model, tokens, chunk_size=chunk, alpha=alpha, segments=segments)
    assert out.hidden.dtype == np.float64
    for b in range(len(tokens)):
        bounds = range(0, tokens.shape[1], chunk)
        want = run_reference(numpy_tensors(model), config, tokens[b], segments[b], bounds, alpha)
        real = segments[b] != 0
        got = {"hidden": out.hidden[:, b], "attention_output": out.attention_output[:, :, b]}
        got |= {name: x[..., b, :, :, :] for name, x in out.cache.entries._asdict().items()}
        assert got.keys() == want.keys() - {"layer_output", "shared_keys", "shared_values"}
        for name, x in got.items():
            axis = x.ndim - (3 if name in ("keys", "values") else 2)
            x, y = (np.compress(real, tensor, axis=axis) for tensor in (x, want[name]))
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_sequences_match_the_token_by_token_reference(name):
    config, length, chunk, alpha = REFERENCE_CASES[name]
    tokens, segments = random_tokens(2, length, seed=length), packed_segments(2, length, seed=length)
    assert_reference(config, tokens, segments, chunk, alpha)


@pytest.mark.usefixtures("float64")
def test_long_sequences_match_the_reference():
    """At this length even RoPE's slowest frequency rotates visibly, so an error of positions shows."""
    config = change(TINY, layers=1, loops=2, head_width=8, rope_theta=500.0)
    tokens = random_tokens(1, 300)
    assert_reference(config, tokens, np.ones_like(tokens), 48, None)


def test_positions_count_from_each_document():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 1, 1, 1]])
    np.testing.assert_array_equal(segment_positions(segments), [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1, 2]])


def test_chunks_are_split_and_joined():
    x = jnp.arange(2 * 7 * 3).reshape(2, 7, 3)
    chunks = split_chunks(x, 3)
    assert chunks.shape == (3, 2, 3, 3) and not chunks[2, :, 1:].any()
    np.testing.assert_array_equal(join_chunks(chunks, 1)[:, :7], x)


def make_loss(phase, mechanism, chunk, alpha=0.4):
    def loss(student, teacher, batch, perturbation=None):
        if phase == "pretraining":
            sums = pretraining_sums(student, batch, chunk, perturbation, mechanism)
            return pretraining_loss(sums, 0.3)
        transition = phase == "transition"
        settings = Distillation(chunk, None if transition else "sum")
        blend = alpha if transition else None
        sums = distillation_sums(student, teacher, batch, settings, blend, perturbation, mechanism)
        return distillation_loss(sums, beta=0.1)

    return loss


def gradients(config, phase, batch, chunk, mechanisms=(chunk_sums, plain_chunk_sums)):
    """[(loss, gradient)] by each mechanism, compiled as one program."""
    student, teacher = make_model(config, 1), make_model(change(config, gate="none"), 2)
    losses = [make_loss(phase, mechanism, chunk) for mechanism in mechanisms]
    compiled = jax.jit(lambda *args: [jax.value_and_grad(loss)(*args) for loss in losses])
    return jax.device_get(compiled(student, teacher, batch))


SHORT = change(TINY, loops=2)
GRADIENT_CASES = {
    "transition, grouped heads, packed, short last chunk": (SHORT, "transition", 11, 4),
    "transition, ema, chunks of one, remat of layers": (change(SHORT, gate="ema", remat="layer"), "transition", 4, 1),
    "alignment, remat of all but products": (change(EQUAL_HEADS, remat="products"), "alignment", 12, 4),
    "alignment, scalar gated, packed, short last chunk, remat of layers": (
        change(SHORT, gate="scalar", first_loop="gated", remat="layer"), "alignment", 10, 3,
    ),
    "pretraining over a per-loop cache, packed": (change(SHORT, gate="none"), "pretraining", 10, 4),
}  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [name if i == 0 else slow(name) for i, name in enumerate(GRADIENT_CASES)])
def test_gradient_equals_plain_differentiation(name):
    config, phase, length, chunk = GRADIENT_CASES[name]
    (value, gradient), (plain_value, plain_gradient) = gradients(
        config, phase, random_batch(2, length, seed=length, packed="packed" in name), chunk
    )
    np.testing.assert_allclose(value, plain_value, rtol=1e-12)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(plain_gradient))
    assert largest > 1e-3 and largest.dtype == np.float64
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain_gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12 * largest)


@pytest.mark.usefixtures("float64")
def test_unrolled_loops_have_the_same_gradient():
    config, batch = change(SHORT, window=1, remat="products"), random_batch(2, 6, packed=True)
    (value, gradient), (want_value, want_gradient) = (
        gradients(change(config, unroll=unroll), "transition", batch, 3, (chunk_sums,))[0] for unroll in (True, False)
    )
    np.testing.assert_allclose(value, want_value, rtol=1e-12)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want_gradient))
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3, 10])
def test_perturbation_gets_float32_gradients_of_bfloat16_weights(chunk):
    """They have the direction of plain differentiation's gradients and of float32 gradients."""
    batch = random_batch(2, 10, packed=True)
    low = lambda model: jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    student, teacher = make_model(SHORT, 1), make_model(change(SHORT, gate="none"), 2)
    perturbation = jax.tree.map(jnp.zeros_like, student)
    gradient, plain = (
        jax.jit(jax.grad(make_loss("alignment", mechanism, chunk), 3))(low(student), low(teacher), batch, perturbation)
        for mechanism in (chunk_sums, plain_chunk_sums)
    )
    [(_, exact)] = gradients(SHORT, "alignment", batch, chunk, mechanisms=(chunk_sums,))
    flat = lambda tree: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])
    cosine = lambda a, b: flat(a) @ flat(b) / np.linalg.norm(flat(a)) / np.linalg.norm(flat(b))
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    assert cosine(gradient, plain) > 0.999
    assert cosine(gradient, exact) > 0.98


def program_lines(phase, layers, loops):
    """(lines, matrix products) of the gradient's program before compilation."""
    config = change(TINY, layers=layers, loops=loops)
    abstract = lambda config: jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(1, 8))
    loss = jax.grad(make_loss(phase, chunk_sums, 3))
    text = jax.jit(loss).lower(abstract(config), abstract(change(config, gate="none")), batch).as_text()
    return text.count("\n"), text.count("stablehlo.dot_general")


@pytest.mark.parametrize("phase", ["transition", "alignment"])
def test_program_does_not_grow_with_layers_or_loops(phase):
    # 5, 7, 11 and 13 are no other dimension: helper functions of equal shapes would be printed once.
    small = program_lines(phase, 5, 7)
    assert small[1] > 20
    assert program_lines(phase, 11, 7) == program_lines(phase, 5, 13) == small


MEMORY = change(TINY, vocab=64, width=64, layers=4, loops=3, heads=4, kv_heads=4, head_width=16, feed_forward=176)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["transition", "alignment"])
def test_memory_is_linear_in_the_sequence(phase):
    """At most 2.2 times as much for twice the sequence, and at most 40 % of plain differentiation."""
    config = change(MEMORY, remat="layer" if phase == "alignment" else "none")
    temporary = lambda chunks, mechanism=chunk_sums: temporary_bytes(config, phase, 1, 16, chunks, mechanism)
    long = temporary(32)
    assert long <= 2.2 * temporary(16)
    assert long <= 0.4 * temporary(32, plain_chunk_sums)


@pytest.mark.usefixtures("float64")
def test_sequence_runs_outside_jit():
    model, tokens = make_model(TINY), random_tokens(1, 7)
    got, want = run_sequence(model, tokens.tolist(), 3), run(model, tokens, chunk_size=3)
    np.testing.assert_allclose(got.hidden, want.hidden, rtol=1e-11, atol=1e-11)
