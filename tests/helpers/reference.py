"""The LoopLM (Ouro, arXiv 2510.25741) and MELT (arXiv 2605.07721), token by token, in float64 NumPy.

Deliberately slow and simple: one token and one head at a time, from published tensors, with no code of melt_jax.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401, adds the bfloat16 of published files to NumPy
import numpy as np
from safetensors import safe_open

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """The fields of a checkpoint's config.json that the mathematics needs, with the names of `ModelConfig`."""

    width: int
    layers: int
    loops: int
    heads: int
    kv_heads: int
    rope_theta: float
    rms_eps: float
    gate: str
    first_loop: str = "copy"
    window: int = 0
    sweeps: int = 1


def read_folder(folder: str | pathlib.Path) -> tuple[Tensors, ReferenceConfig]:
    """({published name: float64 array (out, in)}, config) of a checkpoint folder."""
    folder, tensors = pathlib.Path(folder), {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            tensors |= {name: opened.get_tensor(name).astype(np.float64) for name in opened.keys()}
    names = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "loops": "total_ut_steps",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "rope_theta": "rope_theta",
        "rms_eps": "rms_norm_eps",
    }
    published = json.loads((folder / "config.json").read_text())
    gate = "elementwise" if published["model_type"] == "melt" else "none"
    return tensors, ReferenceConfig(**{name: published[key] for name, key in names.items()}, gate=gate)


def run_reference(
    tensors: Tensors,
    config: Any,
    tokens: Sequence[int] | np.ndarray,
    segments: np.ndarray | None = None,
    bounds: Sequence[int] = (0,),
    alpha: float | None = None,
) -> dict[str, np.ndarray]:
    """Runs one sequence.

    Args:
      tensors: {published name: float64 array (out, in)}.
      config: `ReferenceConfig`, `ModelConfig` or anything with these fields.
      tokens: [S] token ids.
      segments: [S]; a token sees only its own document; 0 is padding.
      bounds: the index of the first token of each chunk, beginning with 0; chunks may have any lengths.
      alpha: the transition's blend, or None.

    Returns:
      The arrays of `ReferenceRun.arrays`.
    """
    run = ReferenceRun(tensors, config, alpha)
    segments = np.ones(len(tokens), int) if segments is None else segments
    for start, stop in zip(bounds, [*bounds[1:], len(tokens)]):
        run.append(tokens[start:stop], segments[start:stop])
    return run.arrays()


class ReferenceRun:
    """One sequence, extended chunk by chunk.

    An entry is an array [2, K, E] of key and value. Dicts have keys (layer, token) or (loop, layer, token); loops count
    from 1. `current` has the entries that a loop reads of nearby tokens, `final` those that it reads of all others.
    """

    def __init__(self, tensors: Tensors, config: Any, alpha: float | None = None):
        self.tensors, self.config, self.alpha = tensors, config, alpha
        self.layers = [Layer(tensors, config, i) for i in range(config.layers)]
        self.segments, self.positions = [], []
        self.shared, self.per_loop, self.current, self.final = {}, {}, {}, {}
        self.hidden, self.attended, self.layer_out = {}, {}, {}

    def append(self, tokens, segments=None) -> np.ndarray:
        """Runs all sweeps and loops of the next chunk; returns the final hidden state [D] of its last token."""
        chunk = range(len(self.segments), len(self.segments) + len(tokens))
        for segment in np.ones(len(tokens), int) if segments is None else segments:
            follows = bool(self.segments) and self.segments[-1] == segment
            self.positions.append(self.positions[-1] + 1 if follows else 0)
            self.segments.append(segment)
        for sweep in range(self.config.sweeps):
            self._run_loops(dict(zip(chunk, tokens)), sweep)
        return self.hidden[self.config.loops, chunk[-1]]

    def _run_loops(self, tokens, sweep):
        """Runs all loops of a chunk {index: token id}; then its entries are the final ones."""
        loops, depth = range(1, self.config.loops + 1), range(self.config.layers)
        x = {s: self.tensors["model.embed_tokens.weight"][token] for s, token in tokens.items()}
        latent = {(i, s): np.zeros(self.config.width) for i in depth for s in x}
        for t in loops:
            for i in depth:
                self._run_layer(t, i, x, latent, sweep)
            for s in x:
                x[s] = self.hidden[t, s] = rms(x[s], self.tensors["model.norm.weight"], self.config.rms_eps)
        self.final |= {(t, i, s): self._blend(t, i, s) for t in loops for i in depth for s in x}

    def _run_layer(self, t, i, x, latent, sweep):
        """Replaces the streams x {token: [D]} and the latents by those after layer i of loop t."""
        layer = self.layers[i]
        u = {s: layer.norm("input_layernorm", x[s]) for s in x}
        for s in x:
            if self.config.gate != "none":
                latent[i, s] = layer.next_latent(u[s], latent[i, s], t)
                self.shared[i, s] = layer.entry(latent[i, s], self.positions[s])
            self.per_loop[t, i, s] = layer.entry(u[s], self.positions[s])
            self.current[t, i, s] = self._blend(t, i, s)
        for s in x:
            visible = [r for r in range(s + 1) if r == s or self.segments[r] == self.segments[s] != 0]
            near = {r for r in visible if s - r <= self.config.window or (r in x and sweep == 0)}
            entries = np.array([(self.current if r in near else self.final)[t, i, r] for r in visible])
            self.attended[t, i, s] = layer.attend(u[s], self.positions[s], entries)
            x[s] = x[s] + layer.norm("input_layernorm_2", self.attended[t, i, s])
            m = layer.mlp(layer.norm("post_attention_layernorm", x[s]))
            x[s] = self.layer_out[t, i, s] = x[s] + layer.norm("post_attention_layernorm_2", m)

    def _blend(self, loop, layer, token):
        """The entry that a loop reads, from the shared and per-loop entries as they are."""
        if self.config.gate == "none":
            return self.per_loop[loop, layer, token]
        if self.alpha is None:
            return self.shared[layer, token]
        return self.alpha * self.shared[layer, token] + (1 - self.alpha) * self.per_loop[loop, layer, token]

    def arrays(self) -> dict[str, np.ndarray]:
        """hidden [T, S, D], attention_output and layer_output [T, L, S, D]; keys and values, the entries that later
        chunks read: [L, S, K, E] for a MELT, [T, L, S, K, E] for a LoopLM and in the transition; for a MELT also
        shared_keys and shared_values [L, S, K, E], not blended.
        """
        loops, depth, span = range(1, self.config.loops + 1), range(self.config.layers), range(len(self.segments))
        stack = lambda values: np.array([[[values[t, i, s] for s in span] for i in depth] for t in loops])
        out = {
            "hidden": np.array([[self.hidden[t, s] for s in span] for t in loops]),
            "attention_output": stack(self.attended),
            "layer_output": stack(self.layer_out),
        }
        entries = stack(self.final)
        if self.config.gate != "none":
            shared = np.array([[self.shared[i, s] for s in span] for i in depth])
            out |= {"shared_keys": shared[:, :, 0], "shared_values": shared[:, :, 1]}
            entries = shared if self.alpha is None else entries
        out |= {"keys": entries[..., 0, :, :], "values": entries[..., 1, :, :]}
        return out


class Layer:
    """The published tensors of one layer, and its computation for one token."""

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

    def entry(self, stream, position):
        """The KV entry [2, K, E] projected from a stream [D]."""
        keys = self.project("self_attn.k_proj", stream).reshape(self.config.kv_heads, -1)
        values = self.project("self_attn.v_proj", stream).reshape(self.config.kv_heads, -1)
        return np.array([[rotate(key, position, self.config.rope_theta) for key in keys], values])

    def attend(self, u, position, entries):
        """The attention output of one token over entries [n, 2, K, E], after W_O."""
        queries = self.project("self_attn.q_proj", u).reshape(self.config.heads, -1)
        mixed = []
        for head, query in enumerate(queries):
            query = rotate(query, position, self.config.rope_theta)
            kv_head = head // (self.config.heads // self.config.kv_heads)
            weights = np.exp([key @ query / np.sqrt(len(query)) for key in entries[:, 0, kv_head]])
            mixed.append(weights / weights.sum() @ entries[:, 1, kv_head])
        return self.project("self_attn.o_proj", np.concatenate(mixed))

    def mlp(self, x):
        gate = self.project("mlp.gate_proj", x)
        return self.project("mlp.down_proj", gate / (1 + np.exp(-gate)) * self.project("mlp.up_proj", x))


def rms(x, scale, eps):
    return scale * x / np.sqrt(np.mean(x * x) + eps)


def rotate(head, position, theta):
    """Rotates component j with component j + E/2 by position · theta^(−2j/E)."""
    half = len(head) // 2
    angles = position * theta ** (-2 * np.arange(half) / len(head))
    first, second = head[:half], head[half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def logits(tensors: Tensors, hidden: np.ndarray) -> np.ndarray:
    """The head's output: hidden [..., D] → [..., V]."""
    return hidden @ tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).T


def exit_logits(tensors: Tensors, hidden: np.ndarray) -> np.ndarray:
    """w·x + b of the exit gate: hidden [..., D] → [...]."""
    return hidden @ tensors["model.early_exit_gate.weight"][0] + tensors["model.early_exit_gate.bias"][0]


def exit_pdf(gate: np.ndarray) -> np.ndarray:
    """pₜ = λₜ Πₛ<ₜ(1−λₛ), and the rest for the last loop; from the exit gate's logits [T, ...] to [..., T]."""
    probability = 1 / (1 + np.exp(-gate))
    remaining, out = np.ones(gate.shape[1:]), []
    for stop in probability[:-1]:
        out.append(stop * remaining)
        remaining = remaining * (1 - stop)
    return np.stack([*out, remaining], axis=-1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
