"""Sampling of tokens: temperature, top-k, top-p, and what a draw depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax.inference.sampling import Sampling, filter_logits, sample_tokens


def reference_filter(logits, temperature, top_k, top_p):
    """The probabilities of one token's float64 logits [V], by NumPy."""
    row = logits / temperature
    order = np.argsort(-row, kind="stable")[: top_k or None]
    p = np.exp(row[order] - row[order].max())
    p /= p.sum()
    kept = order[: max(1, int(np.sum(np.cumsum(p) - p < top_p)))]
    out = np.zeros(len(row))
    out[kept] = np.exp(row[kept] - row.max())
    return out / out.sum()


def test_top_k_and_top_p_match_numpy(float64):
    logits = 3 * np.random.default_rng(0).standard_normal((5, 17))
    choices = [(0.7, 0, 1.0), (1.0, 4, 1.0), (1.3, 0, 0.6), (1.0, 6, 0.5), (1.0, 1, 1.0), (1.0, 0, 1e-6)]
    filtered = jax.jit(filter_logits)
    for temperature, top_k, top_p in choices:
        found = jax.nn.softmax(filtered(jnp.asarray(logits), Sampling(temperature, top_k, top_p)), axis=-1)
        want = [reference_filter(row, temperature, top_k, top_p) for row in logits]
        np.testing.assert_allclose(found, want, atol=1e-12)


def test_draws_follow_the_distribution_and_seed():
    """Frequencies are within six standard deviations of the probabilities; a draw is a function of the seed."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    count = 4000
    repeated = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32))[None], (count, 1))
    zeros, steps = jnp.zeros(count, jnp.int32), jnp.arange(count, dtype=jnp.int32)
    draw = jax.jit(lambda sampling: sample_tokens(repeated, sampling, zeros, steps))
    tokens = draw(Sampling(1.0, seed=3))
    deviation = np.sqrt(probabilities * (1 - probabilities) / count)
    assert np.all(np.abs(np.bincount(tokens, minlength=4) / count - probabilities) < 6 * deviation)
    assert np.array_equal(tokens, draw(Sampling(1.0, seed=3)))
    assert not np.array_equal(tokens, draw(Sampling(1.0, seed=4)))
    assert set(np.unique(draw(Sampling(1.0, top_p=0.6, seed=3)))) == {0, 1}
    assert set(np.unique(draw(Sampling(0.0, seed=3)))) == {0}


def test_draw_depends_on_prompt_and_step():
    logits = jnp.zeros((64, 29))
    numbers, zeros = jnp.arange(64, dtype=jnp.int32), jnp.zeros(64, jnp.int32)
    by_prompt = sample_tokens(logits, Sampling(1.0), numbers, zeros)
    by_step = sample_tokens(logits, Sampling(1.0), zeros, numbers)
    reversed_prompts = sample_tokens(logits, Sampling(1.0), numbers[::-1], zeros)
    assert len(set(by_prompt.tolist())) > 1 and len(set(by_step.tolist())) > 1
    assert np.array_equal(by_prompt[::-1], reversed_prompts)


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(-1.0), "temperature: expected 0 (greedy) or"),
        (Sampling(1e-300), "temperature: expected 0 (greedy) or"),
        (Sampling(top_k=2**31), "top_k: expected at least 0"),
        (Sampling(top_k=-2), "top_k: expected at least 0"),
        (Sampling(top_p=0.0), "top_p: expected in"),
        (Sampling(seed=-3), "seed: expected in"),
        (Sampling(float("nan")), "temperature: expected 0 (greedy) or"),
    ],
)
def test_values_out_of_range_are_errors(sampling, name):
    errors = sampling.errors()
    assert len(errors) == 1 and errors[0].startswith(name)
