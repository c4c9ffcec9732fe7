"""Published checkpoints: one table of names between published tensors and modules, for both directions (DESIGN §1, §2)."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from melt_jax.config import ModelConfig
from melt_jax.model.model import init_model


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one weight is published.

    Attributes:
      name: the published tensor's name, after `model.layers.{i}.` for a layer's.
      inputs: how many leading dimensions of the module's weight are inputs: the published matrix is (out, in), flattened.
        None: published as it is.
    """

    name: str
    inputs: int | None = None


MODEL_TABLE = {
    "embed_tokens": Entry("model.embed_tokens.weight"),
    "norm": Entry("model.norm.weight"),
    "early_exit_gate.weight": Entry("model.early_exit_gate.weight", 1),
    "early_exit_gate.bias": Entry("model.early_exit_gate.bias"),
    "lm_head": Entry("lm_head.weight", 1),
}
LAYER_TABLE = {
    "input_layernorm": Entry("input_layernorm.weight"),
    "input_layernorm_2": Entry("input_layernorm_2.weight"),
    "post_attention_layernorm": Entry("post_attention_layernorm.weight"),
    "post_attention_layernorm_2": Entry("post_attention_layernorm_2.weight"),
    "q_proj": Entry("self_attn.q_proj.weight", 1),
    "k_proj": Entry("self_attn.k_proj.weight", 1),
    "v_proj": Entry("self_attn.v_proj.weight", 1),
    "o_proj": Entry("self_attn.o_proj.weight", 3),
    "gate_proj": Entry("mlp.gate_proj.weight", 1),
    "up_proj": Entry("mlp.up_proj.weight", 1),
    "down_proj": Entry("mlp.down_proj.weight", 1),
    "kv_gate.w_z": Entry("self_attn.kv_gate.w_z.weight", 1),
    "kv_gate.b_z": Entry("self_attn.kv_gate.w_z.bias"),
    "kv_gate.u_z": Entry("self_attn.kv_gate.u_z.weight", 1),
}
CONFIG_KEYS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "total_ut_steps": "loops",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "feed_forward",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_eps",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tied",
    "early_exit_threshold": "exit_threshold",
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
}


def module_leaves(model):
    """[(path, weight)] of a model, or of a gradient of one: path as in the tables, `layers.` before a layer's."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(".".join(key.name for key in path[:-1]), leaf) for path, leaf in leaves]


def published_tensors(model):
    """{published name: (path, layer or None, shape)} of every tensor of a (possibly abstract) model."""
    out = {}
    for path, leaf in module_leaves(model):
        if path.startswith("layers."):
            entry = LAYER_TABLE[path.removeprefix("layers.")]
            for i in range(leaf.shape[0]):
                out[f"model.layers.{i}.{entry.name}"] = path, i, published_shape(entry, leaf.shape[1:])
        else:
            entry = MODEL_TABLE[path]
            out[entry.name] = path, None, published_shape(entry, leaf.shape)
    return out


def published_shape(entry, shape):
    """(out, in) of a module's weight."""
    if entry.inputs is None:
        return tuple(shape)
    return math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs])


def to_published(path, weight):
    """A module's weight of one layer → its published (out, in) form."""
    entry = _entry(path)
    if entry.inputs is None:
        return weight
    out, inputs = published_shape(entry, weight.shape)
    return weight.reshape(inputs, out).T


def from_published(path, tensor, shape):
    """A published tensor → the module's weight of that shape."""
    return (tensor if _entry(path).inputs is None else tensor.T).reshape(shape)


def to_hf_tensors(model):
    """{published tensor name: array (out, in)} of a model, or of a gradient of one."""
    leaves = dict(module_leaves(model))
    tensors = {}
    for name, (path, layer, _) in published_tensors(model).items():
        weight = leaves[path]
        tensors[name] = to_published(path, weight if layer is None else weight[layer])
    return tensors


def _entry(path):
    return LAYER_TABLE[path.removeprefix("layers.")] if path.startswith("layers.") else MODEL_TABLE[path]


def read_config(folder):
    """`ModelConfig` from a published folder's config.json."""
    raw = json.loads((pathlib.Path(folder) / "config.json").read_text())
    fields = {ours: raw[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in raw}
    fields["gate"] = raw.get("gate", "elementwise") if raw["model_type"] == "melt" else "none"
    return ModelConfig(**fields)


def load_model(folder, dtype="float32", gate=None, first_loop=None):
    """A model from a published folder.

    Args:
      folder: holds config.json and one or several safetensors files.
      dtype: of the weights in memory.
      gate: a gate variant in place of the checkpoint's; "none" is the LoopLM inside a MELT.
      first_loop: "copy" or "gated" in place of the checkpoint's.

    Returns:
      `LoopedTransformer`.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    changes = {name: value for name, value in (("gate", gate), ("first_loop", first_loop)) if value is not None}
    config = dataclasses.replace(config, **changes)
    abstract = jax.eval_shape(lambda: init_model(config, jax.random.key(0), dtype=jnp.dtype(dtype)))
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    weights = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in module_leaves(abstract)}
    for name, (path, layer, _) in published_tensors(abstract).items():
        target = weights[path] if layer is None else weights[path][layer]
        target[...] = from_published(path, found[name], target.shape)
    structure = jax.tree.structure(abstract)
    return jax.tree.unflatten(structure, [jnp.asarray(weights[path]) for path, _ in module_leaves(abstract)])
