"""Synthetic published checkpoints of any config, written one tensor at a time, which takes little memory."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from melt_jax.checkpoints.published import INDEX, STORED_DTYPES, Shape, published_tensors
from melt_jax.checkpoints.published_config import published_config, write_config
from melt_jax.config import ModelConfig
from melt_jax.model.model import abstract_model

OURO = ModelConfig(
    vocab=29, width=16, layers=3, loops=2, heads=4, kv_heads=2, head_width=6, feed_forward=20, bos=1, eos=2
)
MELT = dataclasses.replace(OURO, gate="elementwise")
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


def write_published(
    folder: str | pathlib.Path,
    config: ModelConfig,
    files: int = 1,
    metadata: bool = False,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> pathlib.Path:
    """Writes a random published checkpoint: config.json, safetensors and tokenizer files; returns its folder.

    Tensors are distributed over the files in a scattered order. `metadata` adds `__metadata__` to every file. At most
    one tensor is in memory at a time.
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
        tensors = (random_tensor(rng, name, shapes[name], dtype) for name in own)
        write_safetensors(file, {name: shapes[name] for name in own}, dtype, tensors, metadata)
        index |= dict.fromkeys(own, file.name)
    if files > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    return folder


def random_tensor(rng: np.random.Generator, name: str, shape: Shape, dtype: str) -> np.ndarray:
    """Random values of a realistic magnitude; norm weights are about one."""
    values = rng.standard_normal(shape, np.float32)
    return (1 + 0.1 * values if "norm" in name else 0.02 * values).astype(jnp.dtype(dtype))


def write_safetensors(
    file: pathlib.Path, shapes: Mapping[str, Shape], dtype: str, tensors: Iterable[np.ndarray], metadata: bool = False
) -> None:
    """Writes a safetensors file: the length of the header in 8 bytes, the header as JSON, the tensors of `shapes`."""
    size = jnp.dtype(dtype).itemsize
    header, end = {"__metadata__": {"format": "pt"}} if metadata else {}, 0
    code = next(code for code, name in STORED_DTYPES.items() if name == dtype)
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            out.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data)


def stored_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: array} of all safetensors files of a folder."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def edit_config(folder: pathlib.Path, remove: Iterable[str] = (), **changes: object) -> None:
    """Rewrites config.json with some keys changed or removed."""
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: value for key, value in (raw | changes).items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(file: pathlib.Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrites a safetensors file with `edit` applied to its {name: array}."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def assert_same_bits(tensors: Mapping, others: Mapping) -> None:
    """Asserts that both have the same names, dtypes, shapes and bytes."""
    assert sorted(tensors) == sorted(others)
    for name, tensor in tensors.items():
        other = np.asarray(others[name])
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert np.asarray(tensor).tobytes() == other.tobytes(), name
