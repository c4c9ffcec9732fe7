"""The cache recurrence (MELT, arXiv 2605.07721): a token's latent, from which its row is projected, loop by loop.

z  = σ(u W_z + hᵗ⁻¹ U_z + b_z)
hᵗ = z ⊙ hᵗ⁻¹ + (1 − z) ⊙ u          z = 1 keeps, z = 0 overwrites
"""

import jax
import jax.numpy as jnp
from flax import nnx

from melt_jax.model.layout import whole_features

EMA_KEEP = 0.8  # z of the `ema` variant


class Gate(nnx.Module):
    """The learned gate of one layer, shared by all loops; W_z and U_z are (in, out)."""

    def __init__(self, config, init):
        D = config.width
        self.w_z = init.normal((D, D), ("embed", "latent"))
        self.u_z = init.normal((D, D), ("embed", "latent"))
        self.b_z = init.zeros((D,), ("latent",))


def elementwise_gate(gate, u, latent, loop):
    """z = σ(u W_z + h U_z + b_z), one number per component."""
    return _sigmoid_gate(gate.w_z[...], gate.u_z[...], gate.b_z[...], u, latent)


def scalar_gate(gate, u, latent, loop):
    """The first output column of W_z, U_z and b_z gates the whole vector."""
    first = lambda weight: whole_features(weight[...])[..., :1]
    return _sigmoid_gate(first(gate.w_z), first(gate.u_z), first(gate.b_z), u, latent)


def mean_gate(gate, u, latent, loop):
    """z = (t − 1)/t: the latent is the mean of its inputs."""
    return (loop - 1).astype(jnp.float32) / loop


def ema_gate(gate, u, latent, loop):
    """z = 0.8: an exponential moving average of the inputs."""
    return jnp.float32(EMA_KEEP)


def last_gate(gate, u, latent, loop):
    """z = 0: the latent is the last input. One chunk of it is the LoopLM."""
    return jnp.float32(0)


VARIANTS = {
    "elementwise": elementwise_gate,
    "scalar": scalar_gate,
    "mean": mean_gate,
    "ema": ema_gate,
    "last": last_gate,
}


def update_latent(kind, first_loop, gate, u, latent, loop):
    """One step of the recurrence for every token of a chunk.

    Args:
      kind: a name of `VARIANTS`.
      first_loop: "copy": h¹ = u; "gated": the gate is applied at loop 1 too, to h⁰ = 0.
      gate: a `Gate`, or None for the variants without weights.
      u: [B, C, D], the normed input.
      latent: [B, C, D], hᵗ⁻¹; zeros before loop 1.
      loop: t, an int32 scalar counted from 1.

    Returns:
      (hᵗ [B, C, D] in u's dtype, gate_openness [B, C] float32: the mean of 1 − z over the components).
    """
    z = VARIANTS[kind](gate, u, latent, loop)
    if first_loop == "copy":
        z = jnp.where(loop == 1, 0.0, z)
    u_float, latent_float = u.astype(jnp.float32), latent.astype(jnp.float32)
    new_latent = z * latent_float + (1 - z) * u_float
    gate_openness = jnp.mean(jnp.broadcast_to(1 - z, (*u.shape[:-1], z.shape[-1] if z.ndim else 1)), axis=-1)
    return new_latent.astype(u.dtype), gate_openness


def _sigmoid_gate(w_z, u_z, b_z, u, latent):
    precision = jax.lax.Precision.HIGHEST if u.dtype == jnp.float32 else None
    dot = lambda x, w: jnp.einsum("bcd,de->bce", x, w, precision=precision, preferred_element_type=jnp.float32)
    latent = whole_features(latent)
    return jax.nn.sigmoid(dot(u, w_z) + dot(latent, u_z) + b_z.astype(jnp.float32))
