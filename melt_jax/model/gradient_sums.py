"""Sums of the layers' weight gradients; the backward pass of each use of a layer adds to them in place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ref import addupdate
from jaxtyping import Array, Int


class GradientSums:
    """A ref [L, …] for each stacked weight. It is not a pytree: to JAX it is a static attribute of a model.

    Without it, the backward pass over the loops writes the gradients of all layers to memory in every loop and adds
    them to those of the later loops. With it, each layer reads and writes its own sum once per loop.
    """

    def __init__(self, sums: Any):
        """`sums`: a pytree like the stacked weights, [L, …], in the dtype in which gradients are summed."""
        self._refs = jax.tree.map(jax.new_ref, sums)

    def send(self, layer: Any, index: Int[Array, ""]) -> Any:
        """Returns `layer`, the weights of layer `index`, unchanged.

        The backward pass adds the gradients of the result to the sums; `layer` itself gets zeros.
        """
        return jax.tree.map(lambda weight, ref: _send(weight, ref, index), layer, self._refs)

    def take(self) -> Any:
        """Returns the sums and frees the refs, to which nothing can be added afterwards."""
        return jax.tree.map(jax.freeze, self._refs)


@jax.custom_vjp
def _send(weight: Array, ref: Any, index: Int[Array, ""]) -> Array:
    return weight


def _send_forward(weight, ref, index):
    return weight, (ref, index)


def _send_backward(residuals, weight_bar):
    ref, index = residuals
    with jax.named_scope("gradient_sums"):
        place: Any = (jax.ds(index, 1), ...)
        addupdate(ref, place, weight_bar.astype(ref.dtype)[None])
    return jnp.zeros_like(weight_bar), None, None


_send.defvjp(_send_forward, _send_backward)
