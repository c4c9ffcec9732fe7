"""Synthetic published checkpoints of any config, written tensor by tensor, so that large ones need little memory."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np

from melt_jax.checkpoints.published import INDEX, STORED_DTYPES, abstract_model, published_tensors
from melt_jax.checkpoints.published_config import published_config, write_config

OURO_KEYS = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    },
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 28,
    "model_type": "ouro",
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.55.0",
    "use_cache": True,
    "use_sliding_window": False,
}
TOKENIZER_FILES = {
    "tokenizer.json": b'{"version": "1.0"}\n',
    "tokenizer_config.json": '{"chat_template": "{{ messages }} …"}'.encode(),
    "special_tokens_map.json": b"{}",
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2\r\n",
    "generation_config.json": b'{"temperature": 1.0, "top_p": 0.7}',
}


def write_published(folder, config, files=1, metadata=False, seed=0, dtype="bfloat16"):
    """Writes a random published checkpoint of a `ModelConfig`: config.json, safetensors, tokenizer files.

    Tensors go into files in a scattered order, as if sorted by size. `metadata` is whether files have `__metadata__`.
    Nothing larger than one tensor is held.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    source = {**OURO_KEYS, "layer_types": ["full_attention"] * config.layers}
    raw = {
        key: value
        for key, value in published_config(config, dtype).items()
        if key not in source or config.gate != "none"
    }
    write_config(folder, {**source, **raw})
    for name, content in TOKENIZER_FILES.items():
        (folder / name).write_bytes(content)
    shapes = {name: shape for name, (*_, shape) in published_tensors(abstract_model(config)).items()}
    names = sorted(shapes, key=lambda name: (name[::-1], name)) if files > 1 else sorted(shapes)
    rng = np.random.default_rng(seed)
    index = {}
    for i in range(files):
        own = names[i::files]
        file = folder / ("model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors")
        tensors = ((name, random_tensor(rng, name, shapes[name], dtype)) for name in own)
        write_safetensors(file, {name: shapes[name] for name in own}, dtype, tensors, metadata)
        index |= dict.fromkeys(own, file.name)
    if files > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    return folder


def random_tensor(rng, name, shape, dtype):
    """Random values of a plausible size; norms about one."""
    values = rng.standard_normal(shape, np.float32)
    return (1 + 0.1 * values if "norm" in name else 0.02 * values).astype(jnp.dtype(dtype))


def write_safetensors(file, shapes, dtype, tensors, metadata=False):
    """The safetensors format: the header's length, 8 bytes; the header, JSON; the tensors, in the order of `shapes`."""
    size = jnp.dtype(dtype).itemsize
    header, end = {"__metadata__": {"format": "pt"}} if metadata else {}, 0
    code = {ours: code for code, ours in STORED_DTYPES.items()}.get(dtype, {"int8": "I8", "int32": "I32"}.get(dtype))
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            out.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1))
