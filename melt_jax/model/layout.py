"""Products of activations, and how activations lie under a mesh: tokens over the batch axes, features over tensor.

Without a mesh nothing is done. Which axis splits a weight's dimension is said in `melt_jax.sharding`.
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


def replicated(tree):
    """Host arrays, the same in every process, on the current mesh's devices, whole on each; without a mesh, on one."""
    spec = None if jax.sharding.get_abstract_mesh().empty else jax.P()
    return jax.tree.map(lambda x: jax.device_put(x, spec), tree)


def whole_features(x):
    """[…, features] x with its features whole on every device, as a product, a norm or a sort over them needs it."""
    return _over_features(x, None)


def split_features(x):
    """[…, features] x with its features split over the mesh's tensor axis: how it is kept, not used."""
    return _over_features(x, TENSOR)


def _over_features(x, axis):
    sharding = jax.typeof(x).sharding
    return x if sharding.mesh.empty else jax.reshard(x, jax.P(*sharding.spec[:-1], axis))


def split_zeros(shape, dtype, batch_axis, batch_axes, tensor_axis=None):
    """Zeros, laid out under a mesh: one dimension over `batch_axes`, one over the tensor axis."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(shape, dtype)
    spec = [None] * len(shape)
    spec[batch_axis] = batch_axes
    if tensor_axis is not None:
        spec[tensor_axis] = TENSOR
    return jnp.zeros(shape, dtype, out_sharding=jax.P(*spec))
