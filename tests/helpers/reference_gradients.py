"""The losses of MELT's two phases as one differentiable function, in jax.numpy and float64, with no code of melt_jax.

The same mathematics as `reference`, written for all tokens of a chunk at once so that `jax.grad` is affordable.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.reference import Tensors

LOOPLM = "none"


def loss_and_gradient(
    tensors: Tensors,
    config: Any,
    tokens: np.ndarray,
    loss_mask: np.ndarray,
    chunk: int,
    alpha: float | None = None,
    beta: float = 0.0,
) -> tuple[float, Tensors]:
    """L_KD + beta·L_align of a MELT against the LoopLM of the same tensors, and its gradient.

    Args:
      tensors: {published name: float64 array (out, in)}.
      config: `ReferenceConfig` of the MELT, with its window and sweeps.
      tokens: [B, S] token ids, one document each.
      loss_mask: [B, S], 1 if the token is scored.
      chunk: C of the MELT.
      alpha: the transition's blend, or None.
      beta: weight of the attention alignment, summed over D.

    Returns:
      (loss, {published name: float64 array (out, in)}).
    """
    with jax.enable_x64(True):
        student = {name: jnp.asarray(x) for name, x in tensors.items()}
        ids, mask = jnp.asarray(tokens), jnp.asarray(loss_mask, jnp.float64)
        run = lambda weights, *how: jax.vmap(lambda row: _run(weights, config, row, *how))(ids)
        teacher_hidden, teacher_attended = run(student, tokens.shape[1], None, LOOPLM)
        log_p = _log_probabilities(student, teacher_hidden)

        def loss(student):
            hidden, attended = run(student, chunk, alpha, config.gate)
            kl = jnp.sum(jnp.exp(log_p) * (log_p - _log_probabilities(student, hidden)), axis=-1)
            gap = jnp.sum((attended - teacher_attended) ** 2, axis=-1)
            loops = mask.sum() * config.loops
            kd, align = jnp.sum(kl * mask[:, None]) / loops, jnp.sum(gap * mask[:, None, None]) / loops
            return kd + beta * align / config.layers

        value, gradient = jax.value_and_grad(loss)(student)
        return float(value), {name: np.asarray(x) for name, x in gradient.items()}


class _Entries(NamedTuple):
    """{(loop, layer): (keys, values) [n, K, E]} as a loop reads tokens: nearby ones, and all others."""

    current: dict[tuple[int, int], Any]
    final: dict[tuple[int, int], Any]

    def append(self, chunk: "_Entries") -> "_Entries":
        return _Entries(*({key: _append(old.get(key), new[key]) for key in new} for old, new in zip(self, chunk)))


def _run(tensors, config, tokens, chunk, alpha, gate):
    """(hidden [T, S, D], attention outputs [T, L, S, D]) of one sequence [S]."""
    earlier, parts = _Entries({}, {}), []
    for start in range(0, len(tokens), chunk):
        x = tensors["model.embed_tokens.weight"][tokens[start : start + chunk]]
        own = None
        for _ in range(config.sweeps):
            hidden, attended, own = _sweep(tensors, config, (x, start), earlier, own, alpha, gate)
        earlier = earlier.append(own)
        parts.append((hidden, attended))
    return jnp.concatenate([part[0] for part in parts], 1), jnp.concatenate([part[1] for part in parts], 2)


def _sweep(tensors, config, chunk, earlier, previous, alpha, gate):
    """One sweep over a chunk (x [C, D], start): (hidden [T, C, D], attention outputs [T, L, C, D], its `_Entries`).

    `earlier` are the entries of earlier chunks, `previous` those of this chunk after the sweep before, or None.
    """
    x, start = chunk
    positions, depth = np.arange(start, start + len(x)), range(config.layers)
    far = earlier.final if previous is None else earlier.append(previous).final
    visible = _visible(config.window, start, positions, previous is None)
    hidden, attended, latents, melt, looplm, current = [], [], {}, {}, {}, {}
    for t in range(config.loops):
        outputs = []
        for i in depth:
            w = {name: tensors[f"model.layers.{i}.{name}.weight"] for name in _LAYER_WEIGHTS}
            u = _rms(x, w["input_layernorm"], config)
            looplm[t, i] = _entries(u, w, positions, config)
            if gate != LOOPLM:
                latents[i] = _latent(tensors, i, u, latents.get(i), t)
                melt[i] = _entries(latents[i], w, positions, config)
            current[t, i] = _blend(melt.get(i), looplm[t, i], alpha)
            entries = _append(far.get((t, i)), _append(earlier.current.get((t, i)), current[t, i]))
            out = _attention(u, w, positions, entries, visible, config)
            outputs.append(out)
            x = x + _rms(out, w["input_layernorm_2"], config)
            m = _rms(x, w["post_attention_layernorm"], config)
            m = (jax.nn.silu(m @ w["mlp.gate_proj"].T) * (m @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
            x = x + _rms(m, w["post_attention_layernorm_2"], config)
        x = _rms(x, tensors["model.norm.weight"], config)
        hidden.append(x)
        attended.append(jnp.stack(outputs))
    final = {(t, i): _blend(melt.get(i), looplm[t, i], alpha) for t in range(config.loops) for i in depth}
    return jnp.stack(hidden), jnp.stack(attended), _Entries(current, final)


def _visible(window, start, positions, first_sweep):
    """[C, n]: the final entries, then the current ones, that each token of a chunk attends to.

    In the first sweep the chunk has no final entries yet, and all its tokens are read as they are in the loop.
    """
    token = np.arange(positions[-1] + 1)[None]
    distance = positions[:, None] - token
    near = (distance <= window) | (first_sweep & (token >= start))
    final = (distance >= 0) & ~near
    return np.concatenate([final[:, :start] if first_sweep else final, (distance >= 0) & near], axis=1)


def _blend(melt, looplm, alpha):
    """The entries that attention reads: the LoopLM's, MELT's, or α · MELT's + (1 − α) · the LoopLM's."""
    if melt is None:
        return looplm
    return melt if alpha is None else jax.tree.map(lambda a, b: alpha * a + (1 - alpha) * b, melt, looplm)


_NORMS = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
_LAYER_WEIGHTS = (*_NORMS, *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))


def _rms(x, scale, config):
    return scale[None] * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.rms_eps)


def _latent(tensors, layer, u, latent, loop):
    """hᵗ = z ⊙ hᵗ⁻¹ + (1 − z) ⊙ u with an elementwise gate, and h¹ = u."""
    if loop == 0:
        return u
    name = f"model.layers.{layer}.self_attn.kv_gate."
    products = u @ tensors[name + "w_z.weight"].T + latent @ tensors[name + "u_z.weight"].T
    z = jax.nn.sigmoid(products + tensors[name + "w_z.bias"][None])
    return z * latent + (1 - z) * u


def _entries(stream, w, positions, config):
    """(keys, values) [C, K, E] projected from a stream [C, D]."""
    keys, values = ((stream @ w[f"self_attn.{x}_proj"].T).reshape(len(stream), config.kv_heads, -1) for x in ("k", "v"))
    return _rotate(keys, positions, config), values


def _append(earlier, own):
    return own if earlier is None else tuple(jnp.concatenate(pair) for pair in zip(earlier, own))


def _attention(u, w, positions, entries, visible, config):
    """W_O of attention of a chunk's tokens [C, D] over entries [n, K, E]; `visible` is [C, n]."""
    queries = (u @ w["self_attn.q_proj"].T).reshape(len(u), config.heads, -1)
    queries = _rotate(queries, positions, config)
    keys, values = (jnp.repeat(x, config.heads // config.kv_heads, axis=1) for x in entries)
    scores = jnp.einsum("che,nhe->chn", queries, keys) / np.sqrt(queries.shape[-1])
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    mixed = jnp.einsum("chn,nhe->che", jax.nn.softmax(scores, axis=-1), values)
    return mixed.reshape(len(u), -1) @ w["self_attn.o_proj"].T


def _rotate(x, positions, config):
    """Rotates component j with component j + E/2 by position · theta^(−2j/E): [C, heads, E]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * config.rope_theta ** (-np.arange(half) / half)[None, None]
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _log_probabilities(tensors, hidden):
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return jax.nn.log_softmax(hidden @ head.T, axis=-1)
