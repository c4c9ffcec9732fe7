"""Precision and layout of activations: einsum, accumulation dtypes, and shardings under a mesh.

Under a mesh, tokens are split over the batch axes and features over the tensor axis. Without a mesh, nothing is split.
`melt_jax.sharding` decides which mesh axis splits each dimension of a weight.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

TENSOR = "tensor"  # the mesh axis that splits heads, latents and KV entries


def accumulation_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype of norms, softmax, sigmoids, logits, losses and gradient sums: at least float32."""
    return np.dtype(jnp.result_type(*dtypes, jnp.float32))


def upcast(x: Shaped[Array | np.ndarray, "..."]) -> Shaped[Array, "..."]:
    """x in its accumulation dtype."""
    return jnp.asarray(x, accumulation_dtype(x.dtype))


def einsum(
    equation: str,
    *operands: Shaped[Array | np.ndarray, "..."],
    accumulate: bool = False,
    out_sharding: jax.P | None = None,
) -> Shaped[Array, "..."]:
    """`jnp.einsum` that keeps float32 exact on accelerators, which by default round float32 operands to bfloat16.

    With `accumulate` the result has the accumulation dtype of the operands.
    """
    exact = all(x.dtype == jnp.float32 for x in operands)
    return jnp.einsum(
        equation,
        *operands,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=accumulation_dtype(*(x.dtype for x in operands)) if accumulate else None,
        out_sharding=out_sharding,
    )


def token_sharding(x: Shaped[Array, "B C ..."]) -> jax.P | None:
    """The spec of a [B, C, features] array with tokens split as in x and features not split; None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else jax.P(*sharding.spec[:2], None)


def batch_axes(x: Shaped[Array | np.ndarray, "B ..."]) -> Any:
    """The mesh axes that split the leading dimension of x, as an entry of a `PartitionSpec`; None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding.spec[0]


def replicated(tree: Any) -> Any:
    """Copies host arrays, equal in every process, to all devices of the current mesh; without a mesh, to one device."""
    spec = None if jax.sharding.get_abstract_mesh().empty else jax.P()
    return jax.tree.map(lambda x: jax.device_put(x, spec), tree)


def whole_features(x: Shaped[Array, "... D"]) -> Shaped[Array, "... D"]:
    """x with its last dimension whole on every device, as a matrix product, norm or sort over it requires."""
    return _reshard_features(x, None)


def split_features(x: Shaped[Array, "... D"]) -> Shaped[Array, "... D"]:
    """x with its last dimension split over the tensor axis, for storage."""
    return _reshard_features(x, TENSOR)


def _reshard_features(x, axis):
    sharding = jax.typeof(x).sharding
    return x if sharding.mesh.empty else jax.reshard(x, jax.P(*sharding.spec[:-1], axis))


def split_zeros(
    shape: Sequence[int], dtype: DTypeLike, batch_axis: int, batch_axes: Any, tensor_axis: int | None = None
) -> Shaped[Array, "..."]:
    """Zeros with dimension `batch_axis` split over the mesh axes `batch_axes`, and `tensor_axis` over tensor.

    Without a mesh, nothing is split.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(shape, dtype)
    spec: list[Any] = [None] * len(shape)
    spec[batch_axis] = batch_axes
    if tensor_axis is not None:
        spec[tensor_axis] = TENSOR
    return jnp.zeros(shape, dtype, out_sharding=jax.P(*spec))
