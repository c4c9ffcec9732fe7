"""Products of activations, and how activations lie under a mesh: tokens over the batch axes, features over tensor.

Inside a training step the batch axes are not seen here (`melt_jax.sharding.over_batch`); elsewhere they may be. Without a mesh nothing is done.
"""

import jax
import jax.numpy as jnp

TENSOR = "tensor"  # the mesh axis that splits heads, latents and rows


def einsum(equation, *operands, out_sharding=None, **kwargs):
    """`jnp.einsum` that keeps float32 exact on accelerators, where the default would round operands to bfloat16."""
    exact = all(x.dtype == jnp.float32 for x in operands)
    return jnp.einsum(
        equation,
        *operands,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        out_sharding=out_sharding,
        **kwargs,
    )


def token_sharding(x):
    """The sharding of a [batch, chunk, features] array whose tokens lie as those of `x` do; None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else jax.P(*sharding.spec[:2], None)


def batch_axes(x):
    """The mesh axes over which the leading dimension of x is split; None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding.spec[0]


def whole_features(x):
    """[batch, chunk, features] x with its features whole on every device, as a matrix product over them needs it."""
    sharding = token_sharding(x)
    return x if sharding is None else jax.reshard(x, sharding)


def split_features(x):
    """[batch, chunk, features] x with its features split over the mesh's tensor axis: how it is kept, not used."""
    sharding = token_sharding(x)
    return x if sharding is None else jax.reshard(x, jax.P(*sharding[:2], TENSOR))


def split_zeros(shape, dtype, batch_axis, batch_axes, tensor_axis=None):
    """Zeros, laid out under a mesh: one dimension over `batch_axes`, one over the tensor axis."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(shape, dtype)
    spec = [None] * len(shape)
    spec[batch_axis] = batch_axes
    if tensor_axis is not None:
        spec[tensor_axis] = TENSOR
    return jnp.zeros(shape, dtype, out_sharding=jax.P(*spec))
