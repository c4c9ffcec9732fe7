"""The gate of MELT (arXiv 2605.07721): in each loop it updates a token's latent, the source of its KV entry.

z  = σ(u W_z + hᵗ⁻¹ U_z + b_z)
hᵗ = z ⊙ hᵗ⁻¹ + (1 − z) ⊙ u          z = 1 keeps, z = 0 overwrites

A gate variant is an entry of `VARIANTS`: a function `(gate, u, latent, loop) → z`, whose z broadcasts against u, and
the columns of the gate's matrices that it uses.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from melt_jax.config import ModelConfig
from melt_jax.model.layout import accumulation_dtype, einsum, upcast, whole_features

EMA_KEEP = 0.8  # z of the `ema` variant
LOGITS = "gate_logits"  # the `jax.checkpoint` name of a learned gate's values before the sigmoid


class Gate(nnx.Module):
    """The learned gate of one layer, shared by all loops; W_z and U_z are (in, out)."""

    def __init__(self, config: ModelConfig, init):
        D = config.width
        self.w_z = init.normal((D, D), ("embed", "latent"))
        self.u_z = init.normal((D, D), ("embed", "latent"))
        self.b_z = init.zeros((D,), ("latent",))


def elementwise_gate(gate: Gate, u: Float[Array, "B C D"], latent: Float[Array, "B C D"], loop: Int[Array, ""]):
    """z = σ(u W_z + h U_z + b_z), one number per component."""
    return _sigmoid_gate(gate.w_z[...], gate.u_z[...], gate.b_z[...], u, latent)


def scalar_gate(gate: Gate, u: Float[Array, "B C D"], latent: Float[Array, "B C D"], loop: Int[Array, ""]):
    """One z for the whole vector, from the first output column of W_z, U_z and b_z."""
    first = lambda weight: whole_features(weight[...])[..., :1]
    return _sigmoid_gate(first(gate.w_z), first(gate.u_z), first(gate.b_z), u, latent)


def mean_gate(gate: Gate | None, u: Float[Array, "B C D"], latent: Float[Array, "B C D"], loop: Int[Array, ""]):
    """z = (t − 1)/t: the latent is the mean of its inputs."""
    return ((loop - 1).astype(accumulation_dtype(u.dtype)) / loop)[None, None, None]


def ema_gate(gate: Gate | None, u: Float[Array, "B C D"], latent: Float[Array, "B C D"], loop: Int[Array, ""]):
    """z = 0.8: an exponential moving average of the inputs."""
    return jnp.full((1, 1, 1), EMA_KEEP, accumulation_dtype(u.dtype))


def last_gate(gate: Gate | None, u: Float[Array, "B C D"], latent: Float[Array, "B C D"], loop: Int[Array, ""]):
    """z = 0: the latent is the last input. In a single chunk this is the LoopLM."""
    return jnp.zeros((1, 1, 1), accumulation_dtype(u.dtype))


class Variant(NamedTuple):
    """A gate variant.

    Attributes:
      z: `(gate, u, latent, loop) → z`, [B, C, D] or with sizes of 1.
      columns: of W_z and U_z that z uses; None: all D; 0: the variant has no weights.
    """

    z: Callable[..., Float[Array, "B C D"]]
    columns: int | None


VARIANTS = {
    "elementwise": Variant(elementwise_gate, None),
    "scalar": Variant(scalar_gate, 1),
    "mean": Variant(mean_gate, 0),
    "ema": Variant(ema_gate, 0),
    "last": Variant(last_gate, 0),
}


def gate_columns(config: ModelConfig) -> int:
    """The columns of W_z and U_z that the gate uses; 0 for a gate without weights and for a LoopLM."""
    columns = 0 if config.gate == "none" else VARIANTS[config.gate].columns
    return config.width if columns is None else columns


def update_latent(
    kind: str,
    first_loop: str,
    gate: Gate | None,
    u: Float[Array, "B C D"],
    latent: Float[Array, "B C D"],
    loop: Int[Array, ""],
) -> tuple[Float[Array, "B C D"], Float[Array, "B C"]]:
    """One step of the recurrence for every token of a chunk.

    Args:
      kind: a key of `VARIANTS`.
      first_loop: "copy": h¹ = u; "gated": the gate is applied at loop 1 too, to h⁰ = 0.
      gate: None for the variants without weights.
      u: the normed input.
      latent: hᵗ⁻¹; zeros before loop 1.
      loop: t, counted from 1.

    Returns:
      (hᵗ in u's dtype, gate openness: the mean of 1 − z over the components, at least float32).
    """
    z = VARIANTS[kind].z(gate, u, latent, loop)
    if first_loop == "copy":
        z = jnp.where(loop == 1, 0.0, z)
    # hᵗ = z ⊙ hᵗ⁻¹ + (1 − z) ⊙ u
    new_latent = z * upcast(latent) + (1 - z) * upcast(u)
    gate_openness = jnp.mean(jnp.broadcast_to(1 - z, (*u.shape[:-1], z.shape[-1])), axis=-1)
    return new_latent.astype(u.dtype), gate_openness


def _sigmoid_gate(w_z, u_z, b_z, u, latent):
    dot = lambda x, w: einsum("bcd,de->bce", x, w, accumulate=True)
    # z = σ(u W_z + h U_z + b_z)
    logits = dot(u, w_z) + dot(whole_features(latent), u_z) + upcast(b_z)[None, None]
    return jax.nn.sigmoid(checkpoint_name(logits, LOGITS))
