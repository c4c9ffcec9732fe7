"""One model, two ways to keep rows: the identities between LoopLM, MELT, transition and decoding, and the exit gate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import exit_loop, run_chunk
from melt_jax.inference.generation import prefill
from melt_jax.model.cache import create_cache
from melt_jax.model.gate import VARIANTS
from tests.helpers.reference import run_reference
from tests.helpers.tiny import TINY, jit_run, make_model, numpy_tensors, random_tokens, run, with_config

change = dataclasses.replace
CONFIGS = {
    "grouped heads": TINY,
    "first loop gated, tied": change(TINY, kv_heads=4, head_width=8, tied=True, first_loop="gated"),
}


def looplm(model):
    return with_config(model, change(model.config, gate="none"))


def assert_same_run(got, want, atol=2e-5):
    np.testing.assert_allclose(got.hidden, want.hidden, atol=atol)
    np.testing.assert_allclose(got.attention_output, want.attention_output, atol=atol)


@pytest.mark.parametrize("name", CONFIGS)
def test_transition_at_zero_is_the_looplm(name):
    """For any chunk length, though the shared rows differ."""
    model, tokens = make_model(CONFIGS[name]), random_tokens(2, 10)
    want = run(looplm(model), tokens, chunk_size=10)
    for chunk in (1, 4, 10):
        out = run(model, tokens, chunk_size=chunk, alpha=0.0)
        assert_same_run(out, want)
        np.testing.assert_allclose(out.cache.per_loop.keys, want.cache.keys, atol=2e-5)
        assert np.abs(out.cache.shared.keys - want.cache.keys[-1]).max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_transition_at_one_is_melt(name):
    model, tokens = make_model(CONFIGS[name]), random_tokens(2, 10)
    for chunk in (4, 10):
        out, want = run(model, tokens, chunk_size=chunk, alpha=1.0), run(model, tokens, chunk_size=chunk)
        assert_same_run(out, want)
        np.testing.assert_allclose(out.cache.shared.keys, want.cache.keys, atol=2e-5)


def test_one_chunk_with_the_last_row_is_the_looplm():
    model, tokens = make_model(change(TINY, gate="last")), random_tokens(2, 10)
    want = run(looplm(model), tokens, chunk_size=10)
    out = run(model, tokens, chunk_size=10)
    assert_same_run(out, want)
    np.testing.assert_allclose(out.cache.keys, want.cache.keys[-1], atol=2e-5)
    chunked = run(model, tokens, chunk_size=5)
    assert np.abs(chunked.hidden - want.hidden).max() > 0.01


def test_looplm_does_not_depend_on_the_chunk_length():
    model, tokens = make_model(change(TINY, gate="none")), random_tokens(2, 10)
    want = run(model, tokens, chunk_size=10)
    for chunk in (1, 3):
        out = run(model, tokens, chunk_size=chunk)
        assert_same_run(out, want)
        np.testing.assert_allclose(out.cache.values, want.cache.values, atol=2e-5)


def test_melt_depends_on_the_chunk_length():
    """Inside a chunk a loop sees rows of its own loop, across chunks final ones."""
    model, tokens = make_model(TINY), random_tokens(2, 10)
    short, long = run(model, tokens, chunk_size=2), run(model, tokens, chunk_size=10)
    np.testing.assert_allclose(short.hidden[:, :, 0], long.hidden[:, :, 0], atol=2e-5)
    assert np.abs(short.hidden - long.hidden)[:, :, 4:].max() > 0.01


@jax.jit
def decode_token(model, cache, tokens, lengths):
    """A chunk of one token [B] per sequence, each at a slot of its own [B]."""
    out = run_chunk(model, tokens[:, None], cache, lengths)
    return cache.write(out.kv, out.segments, lengths), out.hidden[:, :, 0]


def decode(model, prompts, following, chunk):
    """Hidden states [T, B, 1 + N, D]: of each prompt's last token and of N forced tokens [B, N] that follow."""
    cache, hidden, lengths, *_ = prefill(model, prompts, following.shape[1], chunk)
    states = [hidden]
    for step in range(following.shape[1]):
        cache, hidden = decode_token(model, cache, following[:, step], lengths + step)
        states.append(hidden)
    return np.stack(jax.device_get(states), axis=2), jax.device_get(cache)


@pytest.mark.parametrize("gate", ["none", *VARIANTS])
def test_chunks_of_one_are_decoding(gate):
    """Prompts of different lengths in one call, each as it would be alone: rows are written at a slot of their own."""
    model, tokens = make_model(change(TINY, gate=gate)), random_tokens(2, 9)
    lengths, new = (2, 5), 4
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths)]
    following = np.stack([row[length : length + new] for row, length in zip(tokens, lengths)])
    got, cache = decode(model, prompts, following, chunk=1)
    want = run(model, tokens, chunk_size=1)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(got[:, b], want.hidden[:, b, length - 1 : length + new], atol=2e-5)
        rows = [np.moveaxis(keys, -4, 0)[b][..., : length + new, :, :] for keys in (cache.keys, want.cache.keys)]
        np.testing.assert_allclose(*rows, atol=2e-5)


def test_prefill_in_chunks_then_decoding():
    """Against the reference with a last prompt chunk as short as the prompt leaves it."""
    model, tokens = make_model(TINY), random_tokens(2, 10)
    lengths, new = (3, 7), 3
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths)]
    following = np.stack([row[length : length + new] for row, length in zip(tokens, lengths)])
    got, _ = decode(model, prompts, following, chunk=4)
    for b, length in enumerate(lengths):
        bounds = [*range(0, length, 4), *range(length, length + new)]
        want = run_reference(numpy_tensors(model), TINY, tokens[b, : length + new], bounds=bounds)
        np.testing.assert_allclose(got[:, b], want["hidden"][:, length - 1 :], atol=1e-4)


def test_alpha_goes_with_a_transition_cache():
    model, tokens = make_model(TINY), random_tokens(1, 3)
    with pytest.raises(ValueError, match="alpha"):
        run_chunk(model, tokens, create_cache(TINY, 1, 8, jnp.float32), 0, alpha=0.5)
    with pytest.raises(ValueError, match="alpha"):
        run_chunk(model, tokens, create_cache(TINY, 1, 8, jnp.float32, transition=True), 0)
    with pytest.raises(ValueError, match="gate"):
        run(make_model(change(TINY, gate="none")), tokens, chunk_size=2, alpha=0.5)


def test_forward_pass_keeps_bfloat16():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_model(TINY))
    out = jax.eval_shape(lambda m: jit_run(m, random_tokens(1, 5), chunk_size=2), model)
    assert {out.hidden.dtype, out.attention_output.dtype, out.cache.keys.dtype} == {jnp.dtype("bfloat16")}
    assert out.gate_openness.dtype == jnp.float32


def test_exit_pdf():
    """pₜ = λₜ Πₛ<ₜ(1 − λₛ), the last loop takes the rest: it sums to one."""
    model = make_model(TINY)
    hidden = 3 * np.random.default_rng(0).standard_normal((4, 2, 50, TINY.width), np.float32)
    gate = model.early_exit_gate
    leave = 1 / (1 + np.exp(-(hidden @ np.asarray(gate.weight[...], np.float64) + np.asarray(gate.bias[...]))))
    want = [*(leave[t] * np.prod(1 - leave[:t], axis=0) for t in range(3)), np.prod(1 - leave[:3], axis=0)]
    pdf = np.asarray(jax.jit(lambda model: model.exit_pdf(hidden))(model))
    np.testing.assert_allclose(pdf, np.stack(want, axis=-1), atol=1e-5)
    np.testing.assert_allclose(pdf.sum(-1), 1, atol=1e-6)
    assert (pdf >= 0).all()


def test_exit_loop_is_the_first_that_reaches_the_threshold():
    pdf = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]])
    for threshold, want in (
        (0.25, [0, 3, 0, 1]),
        (0.5, [1, 3, 0, 1]),
        (0.6, [2, 3, 0, 2]),
        (1.0, [3] * 4),
        (1.5, [3] * 4),
    ):
        np.testing.assert_array_equal(exit_loop(pdf, threshold), want, err_msg=str(threshold))


def test_rounding_is_no_early_exit():
    """A pdf's float sum may pass or miss the threshold by an ulp: at 1 it is the last loop, and never one beyond it."""
    above = jnp.array([0.7, 0.2, 0.1 + 1e-6, 1e-7], jnp.float32)
    assert jnp.cumsum(above)[2] >= 1
    assert exit_loop(above, 1.0) == exit_loop(above, 2) == 3
    below = jnp.array([0.1, 0.2, 0.3, 0.39999], jnp.float32)
    assert jnp.sum(below) < 0.99999999
    assert exit_loop(below, 0.99999999) == 3
