"""The layers of a looped transformer (Ouro, arXiv 2510.25741): norm, rotary embedding, attention, feed-forward.

Letters in shapes: B batch, S cached slots, C chunk length, D width, K key/value heads, G query heads per key/value
head, E head width, F feed-forward width. Query head h is the pair (k, g) with h = k·G + g, so grouped heads need no
reshape.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from melt_jax.model.cache import KV
from melt_jax.model.gate import Gate
from melt_jax.model.layout import einsum, token_sharding


def rms_norm(x, scale, eps):
    """scale · x / sqrt(mean(x²) + eps) over the last axis, computed in float32, returned in x's dtype."""
    x_float = x.astype(jnp.float32)
    x_float *= jax.lax.rsqrt(jnp.mean(jnp.square(x_float), axis=-1, keepdims=True) + eps)
    return (x_float * scale.astype(jnp.float32)).astype(x.dtype)


def rope_table(positions, head_width, theta):
    """Cosines and sines, float32, each [B, C, 1, E/2], of the angles position · theta^(−2j/E), j < E/2."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x, table):
    """Rotates component j of each head with component j + E/2. x is [B, C, heads, E]."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class DecoderLayer(nnx.Module):
    """One layer's weights, or L layers' stacked on a leading axis, to be sliced by `jax.lax.scan`."""

    def __init__(self, config, init):
        """Declares every weight: shape, logical axes, initial value (see `model.Initializer`)."""
        D, K, G, E, F = config.width, config.kv_heads, config.group, config.head_width, config.feed_forward
        self.config = config
        self.input_layernorm = init.ones((D,), ("norm",))
        self.input_layernorm_2 = init.ones((D,), ("norm",))
        self.post_attention_layernorm = init.ones((D,), ("norm",))
        self.post_attention_layernorm_2 = init.ones((D,), ("norm",))
        self.q_proj = init.normal((D, K, G, E), ("embed", "heads", None, None))
        self.k_proj = init.normal((D, K, E), ("embed", "heads", None))
        self.v_proj = init.normal((D, K, E), ("embed", "heads", None))
        self.o_proj = init.normal((K, G, E, D), ("heads", None, None, "embed"))
        self.gate_proj = init.normal((D, F), ("embed", "mlp"))
        self.up_proj = init.normal((D, F), ("embed", "mlp"))
        self.down_proj = init.normal((F, D), ("mlp", "embed"))
        self.kv_gate = Gate(config, init) if config.gate in ("elementwise", "scalar") else None

    def project_kv(self, stream, rope):
        """KV of a [B, C, D] key/value stream: k = rope(stream W_K), v = stream W_V."""
        return KV(
            apply_rope(einsum("bcd,dke->bcke", stream, self.k_proj[...]), rope),
            einsum("bcd,dke->bcke", stream, self.v_proj[...]),
        )

    def project_query(self, stream, rope):
        """q = rope(stream W_Q), [B, C, K, G, E]."""
        cos, sin = rope
        query = einsum("bcd,dkge->bckge", stream, self.q_proj[...])
        return apply_rope(query, (cos[..., None, :], sin[..., None, :]))

    def project_output(self, heads):
        """W_O over the heads' mixed values: [B, C, K, G, E] → [B, C, D]."""
        return einsum("bckge,kged->bcd", heads, self.o_proj[...], out_sharding=token_sharding(heads))

    def mlp(self, x):
        """down(silu(gate x) · up x)."""
        hidden = jax.nn.silu(einsum("bcd,df->bcf", x, self.gate_proj[...]))
        hidden *= einsum("bcd,df->bcf", x, self.up_proj[...])
        return einsum("bcf,fd->bcd", hidden, self.down_proj[...], out_sharding=token_sharding(hidden))

    def norm(self, x, name):
        """RMS norm of x with the scale of that name."""
        return rms_norm(x, getattr(self, name)[...], self.config.rms_eps)
