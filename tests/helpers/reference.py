"""The mathematics of the LoopLM (Ouro, arXiv 2510.25741) and MELT (arXiv 2605.07721) token by token, in float64 numpy.

Slow and plain on purpose: one token, one head, one row at a time, from published tensors; no code of melt_jax's.
"""

import numpy as np


def run_reference(tensors, config, tokens, segments=None, bounds=(0,), alpha=None):
    """Runs one sequence.

    Args:
      tensors: {published name: float64 array (out, in)}.
      config: anything with the fields of `ModelConfig`.
      tokens: [S] token ids.
      segments: [S]; a token sees its own document only; 0 is padding.
      bounds: the first token of each chunk, from 0; chunks may have any lengths.
      alpha: the transition's blend, or None.

    Returns:
      dict: hidden [T, S, D], attention_output [T, L, S, D]; shared_keys, shared_values [L, S, K, E] of the last loop
      (MELT); per_loop_keys, per_loop_values [T, L, S, K, E] (LoopLM and transition).
    """
    length = len(tokens)
    segments = np.ones(length, int) if segments is None else segments
    positions = [s - first_of_run(segments, s) for s in range(length)]
    melt = config.gate != "none"
    layers = [Layer(tensors, config, i) for i in range(config.layers)]
    shared, per_loop, hidden, attended = {}, {}, {}, {}

    def visible_row(loop, layer, token):
        if not melt:
            return per_loop[loop, layer, token]
        if alpha is None:
            return shared[layer, token]
        return alpha * shared[layer, token] + (1 - alpha) * per_loop[loop, layer, token]

    for start, stop in zip(bounds, [*bounds[1:], length]):
        chunk = range(start, stop)
        x = {s: tensors["model.embed_tokens.weight"][tokens[s]] for s in chunk}
        latent = {(i, s): np.zeros(config.width) for i in range(config.layers) for s in chunk}
        for t in range(1, config.loops + 1):
            for i, layer in enumerate(layers):
                u = {s: layer.norm("input_layernorm", x[s]) for s in chunk}
                for s in chunk:
                    if melt:
                        latent[i, s] = layer.next_latent(u[s], latent[i, s], t)
                        shared[i, s] = layer.row(latent[i, s], positions[s])
                    per_loop[t, i, s] = layer.row(u[s], positions[s])
                for s in chunk:
                    seen = [r for r in range(s + 1) if r == s or segments[r] == segments[s] != 0]
                    rows = np.array([visible_row(t, i, r) for r in seen])
                    attended[t, i, s] = layer.attend(u[s], positions[s], rows)
                    x[s] = x[s] + layer.norm("input_layernorm_2", attended[t, i, s])
                    m = layer.mlp(layer.norm("post_attention_layernorm", x[s]))
                    x[s] = x[s] + layer.norm("post_attention_layernorm_2", m)
            for s in chunk:
                x[s] = hidden[t, s] = rms(x[s], tensors["model.norm.weight"], config.rms_eps)

    loops, depth, span = range(1, config.loops + 1), range(config.layers), range(length)
    out = {
        "hidden": np.array([[hidden[t, s] for s in span] for t in loops]),
        "attention_output": np.array([[[attended[t, i, s] for s in span] for i in depth] for t in loops]),
    }
    if melt:
        rows = np.array([[shared[i, s] for s in span] for i in depth])
        out |= {"shared_keys": rows[:, :, 0], "shared_values": rows[:, :, 1]}
    if not melt or alpha is not None:
        rows = np.array([[[per_loop[t, i, s] for s in span] for i in depth] for t in loops])
        out |= {"per_loop_keys": rows[:, :, :, 0], "per_loop_values": rows[:, :, :, 1]}
    return out


class Layer:
    """One layer's published tensors and what they compute for one token."""

    def __init__(self, tensors, config, index):
        prefix = f"model.layers.{index}."
        self.tensors = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        self.config = config

    def norm(self, name, x):
        return rms(x, self.tensors[f"{name}.weight"], self.config.rms_eps)

    def project(self, name, x):
        return self.tensors[f"{name}.weight"] @ x

    def next_latent(self, u, latent, t):
        """hᵗ = z ⊙ hᵗ⁻¹ + (1 − z) ⊙ u."""
        kind = self.config.gate
        if t == 1 and self.config.first_loop == "copy":
            return u
        if kind == "mean":
            z = (t - 1) / t
        elif kind in ("ema", "last"):
            z = {"ema": 0.8, "last": 0.0}[kind]
        else:
            gate = "self_attn.kv_gate."
            z = self.project(gate + "w_z", u) + self.project(gate + "u_z", latent) + self.tensors[gate + "w_z.bias"]
            z = 1 / (1 + np.exp(-(z if kind == "elementwise" else z[0])))
        return z * latent + (1 - z) * u

    def row(self, stream, position):
        """The key and the value of every key/value head: [2, K, E]."""
        keys = self.project("self_attn.k_proj", stream).reshape(self.config.kv_heads, -1)
        values = self.project("self_attn.v_proj", stream).reshape(self.config.kv_heads, -1)
        return np.array([[rotate(key, position, self.config.rope_theta) for key in keys], values])

    def attend(self, u, position, rows):
        """Attention of one token over rows [n, 2, K, E], and W_O."""
        queries = self.project("self_attn.q_proj", u).reshape(self.config.heads, -1)
        mixed = []
        for head, query in enumerate(queries):
            query = rotate(query, position, self.config.rope_theta)
            kv_head = head // (self.config.heads // self.config.kv_heads)
            weights = np.exp([key @ query / np.sqrt(len(query)) for key in rows[:, 0, kv_head]])
            mixed.append(weights / weights.sum() @ rows[:, 1, kv_head])
        return self.project("self_attn.o_proj", np.concatenate(mixed))

    def mlp(self, x):
        gate = self.project("mlp.gate_proj", x)
        return self.project("mlp.down_proj", gate / (1 + np.exp(-gate)) * self.project("mlp.up_proj", x))


def rms(x, scale, eps):
    return scale * x / np.sqrt(np.mean(x * x) + eps)


def rotate(head, position, theta):
    """Rotates component j with component j + E/2 by position · theta^(−2j/E)."""
    half = len(head) // 2
    out = np.empty_like(head)
    for j in range(half):
        angle = position * theta ** (-2 * j / len(head))
        out[j] = head[j] * np.cos(angle) - head[j + half] * np.sin(angle)
        out[j + half] = head[j + half] * np.cos(angle) + head[j] * np.sin(angle)
    return out


def first_of_run(segments, token):
    """The first token of the run of equal segment ids that holds `token`."""
    while token > 0 and segments[token - 1] == segments[token]:
        token -= 1
    return token
