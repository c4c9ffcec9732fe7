"""Identities between LoopLM, MELT, transition and decoding, in float64, and the exit gate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import exit_loop, run_chunk
from melt_jax.config import InputError
from melt_jax.model.cache import ChunkKV, create_cache
from melt_jax.model.model import reconfigure
from tests.helpers.reference import run_reference
from tests.helpers.tiny import TINY, jit_run, looplm, make_model, numpy_tensors, random_tokens, run

pytestmark = pytest.mark.usefixtures("float64")
change = dataclasses.replace
CONFIGS = {
    "grouped heads": TINY,
    "first loop gated, tied": change(TINY, kv_heads=4, head_width=8, tied=True, first_loop="gated"),
}


def assert_equal(got, want):
    """Equal up to rounding in float64."""
    assert got.dtype == want.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def assert_same_run(got, want):
    assert_equal(got.hidden, want.hidden)
    assert_equal(got.attention_output, want.attention_output)


@pytest.mark.parametrize("name", CONFIGS)
def test_transition_at_zero_is_the_looplm(name):
    """This holds for any chunk length."""
    model, tokens = make_model(CONFIGS[name]), random_tokens(2, 10)
    want = run(looplm(model), tokens, chunk_size=10)
    for chunk in (1, 4, 10):
        out = run(model, tokens, chunk_size=chunk, alpha=0.0)
        assert_same_run(out, want)
        assert_equal(out.cache.keys, want.cache.keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_transition_at_one_is_melt(name):
    model, tokens = make_model(CONFIGS[name]), random_tokens(2, 10)
    for chunk in (4, 10):
        out, want = run(model, tokens, chunk_size=chunk, alpha=1.0), run(model, tokens, chunk_size=chunk)
        assert_same_run(out, want)
        for keys in out.cache.keys:
            assert_equal(keys, want.cache.keys)


def test_last_gate_in_one_chunk_is_the_looplm():
    model, tokens = make_model(change(TINY, gate="last")), random_tokens(2, 10)
    want = run(looplm(model), tokens, chunk_size=10)
    out = run(model, tokens, chunk_size=10)
    assert_same_run(out, want)
    assert_equal(out.cache.keys, want.cache.keys[-1])
    chunked = run(model, tokens, chunk_size=5)
    assert np.abs(chunked.hidden - want.hidden).max() > 0.01


def test_looplm_does_not_depend_on_the_chunk():
    model, tokens = make_model(change(TINY, gate="none")), random_tokens(2, 10)
    want = run(model, tokens, chunk_size=10)
    for chunk in (1, 3):
        out = run(model, tokens, chunk_size=chunk)
        assert_same_run(out, want)
        assert_equal(out.cache.values, want.cache.values)


def test_melt_depends_on_the_chunk():
    """A loop reads entries of the same loop within the chunk and final entries of earlier chunks."""
    model, tokens = make_model(TINY), random_tokens(2, 10)
    short, long = run(model, tokens, chunk_size=2), run(model, tokens, chunk_size=10)
    assert_equal(short.hidden[:, :, 0], long.hidden[:, :, 0])
    assert np.abs(short.hidden - long.hidden)[:, :, 4:].max() > 0.01


def test_fewer_loops_are_the_first_loops():
    """The first loops of a LoopLM do not depend on the number of later loops, so `reconfigure` can change T."""
    model, tokens = make_model(change(TINY, gate="none")), random_tokens(2, 9)
    full, part = run(model, tokens, chunk_size=4), run(reconfigure(model, loops=2), tokens, chunk_size=4)
    assert_equal(part.hidden, full.hidden[:2])
    assert part.cache.keys.shape[0] == 2


@jax.jit
def decode_token(model, cache, tokens, starts):
    """A chunk of one token [B] per sequence, each at its own slot [B]."""
    out = run_chunk(model, tokens[:, None], cache, starts)
    return cache.write(out.kv, out.segments, starts), out.hidden[:, :, 0]


def decode(model, tokens, lengths, new, chunk):
    """Prefills prompts of `lengths` in chunks, then decodes `new` tokens: hidden [T, B, new, D] and the cache.

    All prompts are prefilled to the longest length. The surplus entries of a shorter one are not read, and decoding
    overwrites them.
    """
    longest, lengths = max(lengths), np.array(lengths, np.int32)
    prompt = run(model, tokens[:, :longest], chunk_size=chunk).cache
    cache = create_cache(model.config, len(tokens), longest + new, model.dtype)
    cache = cache.write(ChunkKV(jax.tree.map(jnp.asarray, prompt.entries)), jnp.asarray(prompt.segments), 0)
    states = []
    for step in range(new):
        following = tokens[np.arange(len(tokens)), lengths + step]
        cache, hidden = decode_token(model, cache, following, lengths + step)
        states.append(hidden)
    return np.stack(jax.device_get(states), axis=2), jax.device_get(cache)


@pytest.mark.parametrize("gate", ["none", "elementwise", "mean"])
def test_chunks_of_one_equal_decoding(gate):
    """This holds for prompts of different lengths in one batch, each with its own slots."""
    model, tokens = make_model(change(TINY, gate=gate)), random_tokens(2, 9)
    lengths, new = (2, 5), 4
    got, cache = decode(model, tokens, lengths, new, chunk=1)
    want = run(model, tokens, chunk_size=1)
    for b, length in enumerate(lengths):
        assert_equal(got[:, b], want.hidden[:, b, length : length + new])
        entries = [np.moveaxis(keys, -4, 0)[b][..., : length + new, :, :] for keys in (cache.keys, want.cache.keys)]
        assert_equal(*entries)


def test_prefill_then_decoding_matches_the_reference():
    """The last prompt chunk of the reference ends with its prompt, however short it is."""
    model, tokens = make_model(TINY), random_tokens(2, 10)
    lengths, new = (3, 7), 3
    got, _ = decode(model, tokens, lengths, new, chunk=4)
    for b, length in enumerate(lengths):
        bounds = [*range(0, length, 4), *range(length, length + new)]
        want = run_reference(numpy_tensors(model), TINY, tokens[b, : length + new], bounds=bounds)
        assert_equal(got[:, b], want["hidden"][:, length:])


def test_alpha_needs_a_transition_cache():
    model, tokens = make_model(TINY), jnp.asarray(random_tokens(1, 3))
    with pytest.raises(InputError, match="alpha"):
        run_chunk(model, tokens, create_cache(TINY, 1, 8, jnp.float32), 0, alpha=0.5)
    with pytest.raises(InputError, match="alpha"):
        run_chunk(model, tokens, create_cache(TINY, 1, 8, jnp.float32, transition=True), 0)
    with pytest.raises(InputError, match="gate"):
        run(make_model(change(TINY, gate="none")), tokens, chunk_size=2, alpha=0.5)


def test_forward_pass_keeps_bfloat16():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_model(TINY))
    out = jax.eval_shape(lambda m: jit_run(m, random_tokens(1, 5), chunk_size=2), model)
    assert {out.hidden.dtype, out.attention_output.dtype, out.cache.entries.keys.dtype} == {jnp.dtype("bfloat16")}
    assert out.gate_openness.dtype == jnp.float32


def test_exit_pdf_follows_its_formula():
    """pₜ = λₜ Πₛ<ₜ(1 − λₛ), and the last loop takes the rest, so the sum is one."""
    model = make_model(TINY)
    hidden = jnp.asarray(3 * np.random.default_rng(0).standard_normal((4, 2, 50, TINY.width)))
    gate = model.early_exit_gate
    leave = 1 / (1 + np.exp(-(hidden @ gate.weight[...] + gate.bias[...][0])))
    want = [*(leave[t] * np.prod(1 - leave[:t], axis=0) for t in range(3)), np.prod(1 - leave[:3], axis=0)]
    pdf = np.asarray(jax.jit(lambda model: model.exit_pdf(hidden))(model))
    assert_equal(pdf, np.stack(want, axis=-1))
    assert_equal(pdf.sum(-1), np.ones((2, 50)))
    assert (pdf >= 0).all()


def test_exit_loop_is_first_to_reach_threshold():
    pdf = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]])
    for threshold, want in (
        (0.25, [0, 3, 0, 1]),
        (0.5, [1, 3, 0, 1]),
        (0.6, [2, 3, 0, 2]),
        (1.0, [3] * 4),
        (1.5, [3] * 4),
    ):
        np.testing.assert_array_equal(exit_loop(pdf, threshold), want, err_msg=str(threshold))


def test_rounding_causes_no_early_exit():
    """A threshold of 1 means the last loop, although a float32 sum may reach 1 earlier."""
    above = jnp.array([0.7, 0.2, 0.1 + 1e-6, 1e-7], jnp.float32)
    assert jnp.cumsum(above)[2] >= 1
    assert exit_loop(above, 1.0) == exit_loop(above, 2.0) == 3
    below = jnp.array([0.1, 0.2, 0.3, 0.39999], jnp.float32)
    assert jnp.sum(below) < 0.99999999
    assert exit_loop(below, 0.99999999) == 3
