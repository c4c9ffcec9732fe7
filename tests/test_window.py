"""The window and the sweeps: chunks that are exactly decoding, their gradients, and cut prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax.config import InputError
from melt_jax.model.cache import bytes_per_sequence, bytes_per_token, create_cache
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import reconfigure
from melt_jax.model.sequence import chunk_sums, plain_chunk_sums
from melt_jax.training.objectives import Distillation, distillation_loss, distillation_sums, normalize, scored_tokens
from tests.helpers.marks import slow
from tests.helpers.tiny import TINY, make_model, packed_segments, random_batch, random_tokens, run

LENGTH = 22
float64 = pytest.mark.usefixtures("float64")


def assert_same(got, want, bound=1e-11):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=bound, atol=bound)


def melt(window=0, sweeps=1, **changes):
    return make_model(dataclasses.replace(TINY, window=window, sweeps=sweeps, **changes), seed=5)


def outcome(model, chunk, alpha=None, packed=False):
    segments = packed_segments(2, LENGTH, seed=1) if packed else None
    out = run(model, random_tokens(2, LENGTH), chunk_size=chunk, alpha=alpha, segments=segments)
    return out.hidden, out.attention_output, out.cache.keys, out.cache.values


@float64
@pytest.mark.parametrize("packed", (False, True), ids=("one document", "packed"))
@pytest.mark.parametrize("alpha", (None, 0.3), ids=("MELT", "transition"))
@pytest.mark.parametrize(
    ("chunk", "window", "sweeps"), [slow(4, 3, 1), slow(3, 5, 1), slow(8, 3, 2), (6, 1, 3), slow(5, 0, 5)]
)
def test_short_chunks_are_decoding(chunk, window, sweeps, alpha, packed):
    """A chunk of at most sweeps · (W + 1) tokens computes what chunks of one token do."""
    assert chunk <= sweeps * (window + 1)
    decoding = outcome(melt(window), 1, alpha, packed)
    assert_same(outcome(melt(window, sweeps), chunk, alpha, packed), decoding)


@float64
@pytest.mark.slow
def test_longer_chunks_are_not_decoding():
    """One token more than sweeps · (W + 1) differs, so that the identity says something."""
    for window, sweeps in ((3, 1), (1, 3)):
        decoding, *_ = outcome(melt(window), 1)
        hidden, *_ = outcome(melt(window, sweeps), sweeps * (window + 1) + 1)
        assert np.max(np.abs(hidden - decoding)) > 1e-4


@float64
@pytest.mark.slow
def test_a_window_matters_and_sweeps_converge():
    decoding, *_ = outcome(melt(2), 1)
    assert np.max(np.abs(outcome(melt(0), 1)[0] - decoding)) > 1e-3
    gaps = [np.max(np.abs(outcome(melt(2, sweeps), 12)[0] - decoding)) for sweeps in (1, 2, 3)]
    assert gaps[0] > gaps[1] > gaps[2] > 0


@float64
def test_a_window_of_the_whole_sequence_makes_all_chunks_equal():
    model = melt(window=LENGTH - 1)
    one = outcome(model, 1)
    for chunk in (5, LENGTH):
        assert_same(outcome(model, chunk), one)


@float64
@pytest.mark.parametrize(("window", "sweeps"), [slow(3, 1), slow(0, 2), (4, 3)])
def test_the_looplm_depends_on_neither(window, sweeps):
    """Nor does the transition at α = 0, for any chunk length."""
    looplm = melt(gate="none")
    want = outcome(looplm, 7)
    assert_same(outcome(reconfigure(looplm, window=window, sweeps=sweeps), 5), want)
    student = reconfigure(looplm, jax.random.key(0), gate="elementwise", window=window, sweeps=sweeps)
    for chunk in (4, 9):
        assert_same(outcome(student, chunk, alpha=0.0)[:2], want[:2])


@float64
@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "reduction"), ((0.4, None), (None, "relative")), ids=("transition", "alignment"))
@pytest.mark.parametrize(("chunk", "window", "sweeps"), [(5, 7, 1), (6, 2, 2)])
def test_gradient_is_that_of_plain_differentiation(alpha, reduction, chunk, window, sweeps):
    student, teacher = melt(window, sweeps), melt(gate="none")
    batch, settings = random_batch(2, LENGTH), Distillation(chunk, reduction)

    def gradient(mechanism):
        def loss(student):
            sums = distillation_sums(student, teacher, batch, settings, alpha, chunk_sums=mechanism)
            return distillation_loss(normalize(sums, scored_tokens(batch)), 0.1)

        return jax.jit(jax.grad(loss))(student)

    got, want = gradient(chunk_sums), gradient(plain_chunk_sums)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    assert largest > 1e-3
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * largest)


def test_the_window_has_a_fixed_size():
    """(T − 1)·W entries per layer and sequence, beside the cache, whatever the length; none for the LoopLM."""
    config = dataclasses.replace(TINY, window=5)
    for length in (8, 64):
        window = create_cache(config, 1, length, jnp.float32).window
        assert sum(x.nbytes for x in window.kv) == bytes_per_sequence(config, 4)
    assert bytes_per_token(config) == bytes_per_token(TINY)
    assert bytes_per_sequence(TINY) == 0
    looplm = dataclasses.replace(config, gate="none")
    assert bytes_per_sequence(looplm) == 0 and create_cache(looplm, 1, 8).window is None
    assert create_cache(dataclasses.replace(config, loops=1), 1, 8).window is None


@float64
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_entries_do_not_depend_on_the_cuts(seed):
    """A prompt run in chunks of random lengths, each within the identity, gives the entries that decoding makes."""
    window, sweeps = 2, 2
    model = melt(window, sweeps)
    rng, tokens = np.random.default_rng(seed), jnp.asarray(random_tokens(2, LENGTH))
    cache, start = create_cache(model.config, 2, LENGTH, model.dtype), 0
    while start < LENGTH:
        length = min(int(rng.integers(1, sweeps * (window + 1) + 1)), LENGTH - start)
        out = run_chunk(model, tokens[:, start : start + length], cache, start)
        cache, start = cache.write(out.kv, out.segments, start), start + length
    _, _, keys, values = outcome(melt(window), 1)
    assert_same((cache.keys, cache.values), (keys, values))


def test_cache_without_the_models_window_is_refused():
    """A cache of another model, or one that `run_sequence` returns, lacks the entries that the window needs."""
    cache = create_cache(melt().config, 2, 8, jnp.float32)
    with pytest.raises(InputError, match=r"^cache: expected one with a window of 3, from `create_cache`, found none$"):
        run_chunk(melt(3), jnp.asarray(random_tokens(2, 4)), cache, 0)
