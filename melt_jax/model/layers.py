"""The layers of a looped transformer (Ouro, arXiv 2510.25741): norm, rotary embedding, attention, feed-forward.

Letters in shapes: B batch, C chunk length, D model width, K key/value heads, G query heads per key/value head, E head
width, F feed-forward width. Query head h is the pair (k, g) with h = k·G + g, so grouped heads need no reshape.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from melt_jax.config import ModelConfig
from melt_jax.model.cache import KV
from melt_jax.model.gate import Gate, gate_columns
from melt_jax.model.layout import einsum, token_sharding, upcast

RopeTable = tuple[Float[Array, "B C 1 R"], Float[Array, "B C 1 R"]]  # cosines and sines; R = E/2


def rms_norm(x: Float[Array, "B C D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "B C D"]:
    """scale · x / sqrt(mean(x²) + eps) over the last axis, computed in at least float32, returned in x's dtype."""
    normed = upcast(x)
    normed *= jax.lax.rsqrt(jnp.mean(jnp.square(normed), axis=-1, keepdims=True) + eps)
    return (normed * upcast(scale)[None, None]).astype(x.dtype)


def rope_table(positions: Int[Array, "B C"], head_width: int, theta: float, dtype: DTypeLike) -> RopeTable:
    """Cosines and sines of the angles position · theta^(−2j/E), j < E/2."""
    frequencies = theta ** (-jnp.arange(0, head_width, 2, dtype=dtype) / head_width)
    angles = positions[..., None, None].astype(dtype) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B C *heads E"], table: tuple[Float[Array, "..."], Float[Array, "..."]]):
    """Rotates component j of each head with component j + E/2; the table broadcasts against x."""
    cos, sin = table
    first, second = jnp.split(upcast(x), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class DecoderLayer(nnx.Module):
    """The weights of one layer, or of L layers stacked on a leading axis, which `jax.lax.scan` slices."""

    def __init__(self, config: ModelConfig, init):
        """Declares every weight: shape, logical axes, initial values (see `model.Initializer`)."""
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
        self.kv_gate = Gate(config, init) if gate_columns(config) else None

    def project_kv(self, stream: Float[Array, "B C D"], rope: RopeTable) -> KV:
        """The KV entries of a stream: k = rope(stream W_K), v = stream W_V."""
        with jax.named_scope("projections"):
            return KV(
                apply_rope(einsum("bcd,dke->bcke", stream, self.k_proj[...]), rope),
                einsum("bcd,dke->bcke", stream, self.v_proj[...]),
            )

    def project_query(self, stream: Float[Array, "B C D"], rope: RopeTable) -> Float[Array, "B C K G E"]:
        """q = rope(stream W_Q)."""
        cos, sin = rope
        with jax.named_scope("projections"):
            query = einsum("bcd,dkge->bckge", stream, self.q_proj[...])
            return apply_rope(query, (cos[..., None, :], sin[..., None, :]))

    def project_output(self, heads: Float[Array, "B C K G E"]) -> Float[Array, "B C D"]:
        """W_O applied to the heads' attention results."""
        with jax.named_scope("projections"):
            return einsum("bcxyz,xyzd->bcd", heads, self.o_proj[...], out_sharding=token_sharding(heads))

    def add_attention(
        self, y: Float[Array, "B C D"], heads: Float[Array, "B C K G E"]
    ) -> tuple[Float[Array, "B C D"], Float[Array, "B C D"]]:
        """(y + rms(a; input_layernorm_2), a), where a is W_O applied to the heads' attention results."""
        output = self.project_output(heads)
        return y + self.norm(output, "input_layernorm_2"), output

    def add_mlp(self, y: Float[Array, "B C D"]) -> Float[Array, "B C D"]:
        """y + rms(mlp(rms(y; post_attention_layernorm)); post_attention_layernorm_2)."""
        m = self.mlp(self.norm(y, "post_attention_layernorm"))
        return y + self.norm(m, "post_attention_layernorm_2")

    def mlp(self, x: Float[Array, "B C D"]) -> Float[Array, "B C D"]:
        """down(silu(gate x) · up x)."""
        hidden = jax.nn.silu(einsum("bcd,df->bcf", x, self.gate_proj[...]))
        hidden *= einsum("bcd,df->bcf", x, self.up_proj[...])
        return einsum("bcf,fd->bcd", hidden, self.down_proj[...], out_sharding=token_sharding(hidden))

    def norm(self, x: Float[Array, "B C D"], name: str) -> Float[Array, "B C D"]:
        """RMS norm of x with the scale called `name`."""
        return rms_norm(x, getattr(self, name)[...], self.config.rms_eps)
