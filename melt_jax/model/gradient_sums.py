"""Sums of the layers' weight gradients, to which each use of a layer adds in place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ref import addupdate
from jaxtyping import Array, Int


class GradientSums:
    """A ref [L, …] for each weight of all layers. To JAX it is no pytree but a constant, so that a model can hold it.

    Without it, the backward pass over the loops writes the gradients of all layers to memory in every loop and adds
    them to those of the later loops. With it, each layer reads and writes its own sum once per loop.
    """

    def __init__(self, sums: Any):
        """`sums`: a pytree like the stacked weights, [L, …], in the dtype in which gradients are summed."""
        self._refs = jax.tree.map(jax.new_ref, sums)

    def send(self, layer: Any, index: Int[Array, ""]) -> Any:
        """The weights of layer `index`. The backward pass adds their gradients to the sums."""
        return jax.tree.map(lambda weight, ref: _send(weight, ref, index), layer, self._refs)

    def take(self) -> Any:
        """The sums. Nothing can be added afterwards."""
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
