"""Sums of the layers' weight gradients, to which each use of a layer adds in place."""

from typing import Any

import jax
from jaxtyping import Array, Int

from melt_jax.model.layers import DecoderLayer


class GradientSums:
    """Refs [L, …] for the weights of all layers. A pytree without leaves, so that a model can hold it.

    Without it, the backward pass over the loops writes the gradients of all layers to memory in every loop and adds
    them to those of the later loops. With it, each layer reads and writes its own sum once per loop.
    """

    def __init__(self, layers_bar: DecoderLayer):
        """`layers_bar` [L, …]: the sums so far, in the dtype in which gradients are summed."""
        self._refs = jax.tree.map(jax.new_ref, layers_bar)

    def send(self, layer: DecoderLayer, index: Int[Array, ""]) -> DecoderLayer:
        """The weights of layer `index`. The backward pass adds their gradients to the sums."""
        return jax.tree.map(lambda weight, ref: _send(weight, ref, index), layer, self._refs)

    def take(self) -> DecoderLayer:
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
        jax.ref.addupdate(ref, (jax.ds(index, 1), ...), weight_bar.astype(ref.dtype)[None])
    return jax.numpy.zeros_like(weight_bar), None, None


_send.defvjp(_send_forward, _send_backward)
