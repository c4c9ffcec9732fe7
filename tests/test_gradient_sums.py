"""Sums of the layers' weight gradients equal those of plain differentiation, but in the dtype of the sums."""

import jax
import jax.numpy as jnp
import numpy as np

from melt_jax.model.gradient_sums import GradientSums

FACTORS = jnp.asarray([1.0, 1.0, 1.0, 256.0])  # the backward pass starts at the last; in bfloat16, 256 + 1 is 256


def looped(weights, send):
    """Σ over loops and layers of factor · (layer + 1) · weight."""

    def run_layer(total, xs):
        index, weight, factor = xs
        return total + (factor * (index + 1) * send(weight, index)).astype(jnp.float32), None

    def run_loop(total, factor):
        layers = jnp.arange(len(weights))
        return jax.lax.scan(run_layer, total, (layers, weights, jnp.full(len(weights), factor, weights.dtype)))[0], None

    return jax.lax.scan(run_loop, jnp.float32(0), FACTORS.astype(weights.dtype))[0]


def test_gradients_are_added_in_the_dtype_of_the_sums():
    weights = jnp.ones(3, jnp.bfloat16)

    @jax.jit
    def gradient(sums):
        layer_sums = GradientSums(sums)
        own = jax.grad(lambda weights: looped(weights, layer_sums.send))(weights)
        return own, layer_sums.take()

    own, sums = gradient(jnp.asarray([0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(own, np.zeros(3))
    np.testing.assert_array_equal(sums, [259.0, 518.0, 778.0])
    plain = jax.grad(lambda weights: looped(weights, lambda weight, index: weight))(weights)
    assert plain[0] == 256


def test_groups_have_sums_of_their_own():
    """Under `jax.vmap`, as over groups of devices."""
    weights, sums = jnp.ones((2, 3)) * jnp.asarray([[1.0], [2.0]]), jnp.zeros((2, 3))

    def gradient(weights, sums):
        layer_sums = GradientSums(sums)
        jax.grad(lambda weights: looped(weights, layer_sums.send) ** 2)(weights)
        return layer_sums.take()

    plain = jax.grad(lambda weights: looped(weights, lambda weight, index: weight) ** 2)
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(weights, sums), jax.vmap(plain)(weights), rtol=1e-6)
