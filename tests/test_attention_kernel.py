"""The attention kernel, interpreted on a CPU, equals attention in XLA; `tests/test_attention.py` has further cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import run_sequence
from melt_jax.model.attention import AttentionMask, blockwise_attention
from melt_jax.model.cache import KV, EntryView
from tests.helpers.tiny import TINY, make_model

# Two KV heads with two query heads each; the 140 rows of a KV head are padded to 256. The 149 near entries of a sweep
# are two blocks of 128.
B, C, K, G, E, S, W = 2, 70, 2, 2, 8, 300, 9


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def arguments(start, last_loop, sweep=1):
    """Float32 arguments of `blockwise_attention` with documents and padding.

    There are a window and the entries of a sweep, unless `sweep` is None.
    """
    random = np.random.default_rng(7)
    segments = lambda length: jnp.asarray(np.sort(random.integers(0, 4, (B, length)), axis=1)[:, ::-1], jnp.int32)
    entries = lambda seed, length: KV(numbers(seed, B, length, K, E), numbers(seed + 1, B, length, K, E))
    mask = AttentionMask(segments(C), segments(S), jnp.int32(start))
    if sweep is not None:
        mask = mask._replace(
            width=W, recent=segments(W), last_loop=jnp.asarray(last_loop), sweep=jnp.asarray(sweep, jnp.int32)
        )
    near = entries(30, C if sweep is None else W + 2 * C)
    return numbers(1, B, C, K, G, E), entries(10, S), near, mask


@pytest.mark.parametrize(
    ("start", "last_loop", "sweep"),
    [(299, False, 1), (131, False, 0), (131, True, 1), (0, False, 1), (299, False, None)],
)
def test_kernel_equals_blocks(start, last_loop, sweep):
    """Values and gradients, in float32: sums of at most n = S + W + 2C products, with relative errors of n · 2⁻²⁴."""
    query, earlier, near, mask = arguments(start, last_loop, sweep)
    weight = numbers(2, B, C, K, G, E)

    def outcome(kernel):
        def run(*inputs) -> jax.Array:
            return blockwise_attention(*inputs, mask, 128, kernel)

        loss = lambda *inputs: jnp.sum(run(*inputs) * weight)
        return jax.jit(lambda *inputs: (run(*inputs), jax.grad(loss, (0, 1, 2))(*inputs)))(query, earlier, near)

    def compare(got, want):
        np.testing.assert_allclose(got, want, rtol=0, atol=(S + W + 2 * C) * 2**-24 * np.abs(want).max())

    jax.tree.map(compare, outcome("pallas"), outcome("blocks"))


@pytest.mark.parametrize(("start", "place"), [(0, (1,)), (131, (0, 1))])
def test_gradients_of_views_are_added_to_their_sums(start, place):
    """The view is one layer of a stack; the sums of other layers and of blocks that are not read do not change."""
    query, earlier, near, mask = arguments(start, False)
    stack = jax.tree.map(lambda x: jnp.stack([jnp.full_like(x, jnp.nan), x]), earlier)
    if len(place) == 2:
        stack = jax.tree.map(lambda x: x[None], stack)
    before = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) % 7, stack)
    weight = numbers(2, B, C, K, G, E)

    def attend(query, earlier):
        return blockwise_attention(query, earlier, near, mask, 128, "pallas")

    @jax.jit
    def with_views(query):
        refs = jax.tree.map(jax.new_ref, before)
        view = EntryView(stack, jnp.int32(place), refs)
        out, pull_back = jax.vjp(lambda query: attend(query, view), query)
        return out, *pull_back(weight), jax.tree.map(jax.freeze, refs)

    @jax.jit
    def with_arrays(query, earlier):
        out, pull_back = jax.vjp(attend, query, earlier)
        return out, *pull_back(weight)

    out, query_bar, sums = with_views(query)
    want_out, want_query_bar, earlier_bar = with_arrays(query, earlier)
    np.testing.assert_array_equal(out, want_out)
    np.testing.assert_array_equal(query_bar, want_query_bar)

    def compare(got, old, bar):
        got, old = (x[place[:-1]] for x in (got, old))
        np.testing.assert_array_equal(got[0], old[0])
        np.testing.assert_array_equal(got[1, :, -(-start // 128) * 128 :], old[1, :, -(-start // 128) * 128 :])
        np.testing.assert_allclose(got[1] - old[1], bar, rtol=0, atol=2**-20)  # sums are below 8

    jax.tree.map(compare, sums, before, earlier_bar)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_models_have_the_same_gradient():
    """With a window and two sweeps; 13 tokens in chunks of 5."""
    config = dataclasses.replace(TINY, loops=2, layers=1, window=1, sweeps=2, remat="products")
    model, tokens = make_model(config), np.random.default_rng(0).integers(0, config.vocab, (2, 13))

    def gradient(attention):
        def loss(model):
            out = run_sequence(model, tokens, 5)
            return jnp.sum(jnp.sin(out.hidden)) + jnp.sum(jnp.cos(out.attention_output))

        changed = jax.tree.unflatten(
            jax.tree.structure(make_model(dataclasses.replace(config, attention=attention))), jax.tree.leaves(model)
        )
        return jax.tree.leaves(jax.jit(jax.grad(loss))(changed))

    for got, want in zip(gradient("pallas"), gradient("blocks"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11 * np.abs(want).max())


def test_forward_kernel_does_not_run_again():
    """Its results are saved for the backward pass, also with remat."""
    model = make_model(dataclasses.replace(TINY, loops=1, layers=1, attention="pallas", remat="layer"))
    loss = lambda model: jnp.sum(run_sequence(model, np.ones((1, 4), np.int32), 2).hidden)
    text = str(jax.make_jaxpr(jax.grad(loss))(model))
    branches = text.count("name=attention_forward"), text.count("name=attention_backward")
    assert branches == (2, 2)  # for a TPU and for other platforms
