"""Published checkpoints: one table maps published tensors to module weights and back.

A published folder holds config.json, one or several safetensors files and tokenizer files, as Ouro's do
(arXiv 2510.25741). MELT's (arXiv 2605.07721) has the LoopLM's tensors and, in each layer, those of the gate. Weights
are read and written one stacked weight at a time, so each direction needs memory for the model and one more weight.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from melt_jax.checkpoints.folder import KINDS, ModelFolder, assemble
from melt_jax.checkpoints.published_config import (
    STORED_DTYPES,
    add_model_code,
    parse_config,
    published_config,
    raise_errors,
    read_config,
    read_raw_config,
    write_config,
)
from melt_jax.checkpoints.tensor_files import Shape, list_tensors, read_tensor
from melt_jax.config import InputError
from melt_jax.files import Path, PathLike, atomic_folder, copy_companions, written_on_disk
from melt_jax.model.model import LoopedTransformer, abstract_model, module_leaves

__all__ = ["PublishedFolder", "load_model", "read_config", "save_published", "to_hf_tensors"]

INDEX = "model.safetensors.index.json"

StoredTensor = tuple[Path, Shape, str]  # file, shape, safetensors dtype code


@dataclasses.dataclass(frozen=True)
class Entry:
    """The published form of one weight.

    Attributes:
      name: of the published tensor; for a layer's weight, the part after `model.layers.{i}.`.
      inputs: number of leading dimensions of the module's weight that are inputs; the published matrix is the
        flattened (out, in). None: published unchanged.
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


def published_tensors(model: LoopedTransformer) -> dict[str, tuple[str, int | None, Shape]]:
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


def published_shape(entry: Entry, shape: Shape) -> Shape:
    """The published shape of a module's weight; (out, in) for a matrix."""
    if entry.inputs is None:
        return tuple(shape)
    return math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs])


def to_published(path: str, weight: Any) -> Any:
    """One layer's weight of a module, in its published form."""
    entry = _entry(path)
    if entry.inputs is None:
        return weight
    out, inputs = published_shape(entry, weight.shape)
    return weight.reshape(inputs, out).T


def from_published(path: str, tensor: np.ndarray, shape: Shape) -> np.ndarray:
    """A published tensor, as the module's weight of that shape."""
    return (tensor if _entry(path).inputs is None else tensor.T).reshape(shape)


def to_hf_tensors(model: LoopedTransformer) -> dict[str, jax.Array]:
    """{published tensor name: array (out, in)} of a model, or of a gradient of one."""
    leaves = dict(module_leaves(model))
    tensors = {}
    for name, (path, layer, _) in published_tensors(model).items():
        weight = leaves[path]
        tensors[name] = to_published(path, weight if layer is None else weight[layer])
    return tensors


def _entry(path):
    return LAYER_TABLE[path.removeprefix("layers.")] if path.startswith("layers.") else MODEL_TABLE[path]


class PublishedFolder(ModelFolder):
    """A published checkpoint."""

    form = "published"

    def __init__(self, folder: PathLike):
        super().__init__(folder)
        expected = published_tensors(abstract_model(self.config))
        self._names: dict[str, list[str]] = collections.defaultdict(list)
        for name, (path, *_) in expected.items():
            self._names[path].append(name)
        found, errors = scan_tensors(self.folder)
        raise_errors(self.folder, errors + _tensor_errors(expected, found))
        self._files = {name: places[0][0] for name, places in found.items()}
        dtypes = {name: STORED_DTYPES[places[0][2]] for name, places in found.items()}
        several = {path: {dtypes[name] for name in names} for path, names in self._names.items()}
        self.dtypes = {path: names.pop() if len(names) == 1 else None for path, names in several.items()}

    def tensor_name(self, path: str, layer: int | None) -> str:
        return self._names[path][layer or 0]

    def read(self, path: str, dtype: str) -> np.ndarray:
        weight = np.empty(self.shapes[path], jnp.dtype(dtype))
        targets = weight if path.startswith("layers.") else [weight]
        for target, name in zip(targets, self._names[path], strict=True):
            copy_weight(target, from_published(path, read_tensor(self._files[name], name), target.shape))
        return weight

    def load(self, paths: Iterable[str], dtype: str, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
        # Largest first: while a weight is copied to its devices, host memory holds it once more.
        by_size = sorted(paths, key=lambda path: math.prod(self.shapes[path]), reverse=True)
        return {
            path: jax.block_until_ready(device_put_weight(self.read(path, dtype), shardings.get(path)))
            for path in by_size
        }


def scan_tensors(folder: Path) -> tuple[dict[str, list[StoredTensor]], list[str]]:
    """The tensors of a folder's safetensors files, from the files' headers.

    Returns:
      ({name: [(file, shape, stored dtype), …]}, errors); errors are unreadable files and contradictions of the index.
    """
    found: dict[str, list[StoredTensor]] = collections.defaultdict(list)
    errors = []
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        errors.append("*.safetensors: expected one file or several, found none")
    for file in files:
        try:
            for name, (shape, dtype) in list_tensors(file).items():
                found[name].append((file, shape, dtype))
        except SafetensorError as error:
            errors.append(f"{file.name}: expected a safetensors file, found {error}")
    if (folder / INDEX).is_file():
        errors += _index_errors(folder, found)
    return found, errors


def _index_errors(folder, found):
    try:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{INDEX}: expected a weight_map, found {error!r}"]
    errors = []
    for name in sorted({*index, *found}):
        holders = [file.name for file, *_ in found.get(name, [])]
        if name not in index:
            errors.append(f"{name}: expected in {INDEX}, found only in {' and '.join(holders)}")
        elif index[name] not in holders:
            holder = " and ".join(holders) or "no file"
            errors.append(f"{name}: expected in {index[name]} according to {INDEX}, found in {holder}")
    return errors


def _tensor_errors(expected, found):
    """Every tensor that is missing, unknown, stored twice, wrongly shaped or of an unsupported dtype."""
    errors = [
        f"{name}: expected shape {expected[name][2]}, found no such tensor" for name in expected if name not in found
    ]
    for name, places in found.items():
        if len(places) > 1:
            errors.append(f"{name}: expected once, found in " + " and in ".join(file.name for file, *_ in places))
        for file, shape, dtype in places:
            if name not in expected:
                errors.append(f"{name}: expected no such tensor according to config.json, found {shape} in {file.name}")
            elif shape != expected[name][2]:
                errors.append(f"{name}: expected shape {expected[name][2]}, found {shape} in {file.name}")
            if dtype not in STORED_DTYPES:
                codes = ", ".join(STORED_DTYPES)
                errors.append(f"{name}: expected dtype {codes}, found {dtype} in {file.name}")
    return errors


def load_model(
    folder: PathLike,
    dtype: str | None = "float32",
    gate: str | None = None,
    first_loop: str | None = None,
    shardings: LoopedTransformer | None = None,
    window: int | None = None,
    sweeps: int | None = None,
) -> LoopedTransformer:
    """Loads a model in published form; `melt_jax.checkpoints.orbax.open_model` reads both forms.

    Args:
      folder: holds config.json and one or several safetensors files.
      dtype: of the weights in memory; None: as stored.
      gate: a gate variant to use instead of the checkpoint's; "none" is the LoopLM inside a MELT.
      first_loop: "copy" or "gated", to use instead of the checkpoint's.
      shardings: a model whose leaves are shardings; None: the default device.
      window, sweeps: to use instead of the checkpoint's.

    Raises:
      InputError: lists all errors of config.json; if there are none, all errors of the tensors.
    """
    changes = {"gate": gate, "first_loop": first_loop, "window": window, "sweeps": sweeps}
    return assemble(PublishedFolder(folder), dtype, shardings, **changes)


def device_put_weight(weight: np.ndarray, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """Copies a host array to the default device, or shards it; each process copies only its devices' pieces."""
    if sharding is None:
        return jnp.asarray(weight)
    return jax.make_array_from_callback(weight.shape, sharding, lambda index: weight[index])


def copy_weight(target: np.ndarray, weight: np.ndarray) -> None:
    """target[...] = weight; equal dtypes are copied as integers, which is several times faster for bfloat16."""
    if target.dtype == weight.dtype:
        bits = f"u{target.dtype.itemsize}"
        target, weight = target.view(bits), weight.view(bits)
    target[...] = weight


def save_published(
    folder: PathLike,
    model: LoopedTransformer,
    dtype: str = "bfloat16",
    tokenizer_from: PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a published folder, completely or not at all. Only one process may call it.

    Args:
      folder: the output; must not exist unless `overwrite`.
      model: its config and weights.
      dtype: of the tensors in the file.
      tokenizer_from: a model folder from which tokenizer files and the harmless keys of config.json are copied.
      overwrite: replaces a published model folder that melt_jax wrote.

    Raises:
      FileExistsError: `folder` exists.
      InputError: `folder` must not be replaced.
    """
    inputs = [tokenizer_from] if tokenizer_from else []
    with atomic_folder(folder, overwrite, KINDS["published"], inputs) as temporary:
        raw = companions(tokenizer_from, temporary)
        write_weights(temporary / "model.safetensors", jax.eval_shape(lambda: model), dtype, module_leaves(model))
        raw = published_config(model.config, jnp.dtype(dtype).name, raw)
        write_config(temporary, add_model_code(temporary, raw))


def companions(source: PathLike | None, target: Path) -> dict[str, Any] | None:
    """Copies the tokenizer files of a model folder; returns its config.json, or None if that is not supported.

    If `source` is None or "", nothing is copied.
    """
    if not source:
        return None
    copy_companions(source, target)
    try:
        raw = read_raw_config(source)
        parse_config(raw)
        return raw
    except InputError:
        return None


def write_weights(file: Path, abstract: LoopedTransformer, dtype: str, leaves: Iterable[tuple[str, Any]]) -> None:
    """Writes one safetensors file incrementally: the header, then each weight's tensors as the weight arrives.

    The layout is that of published files: tensors sorted by name, no `__metadata__`; file sizes are the same.

    Args:
      file: path of the new file.
      abstract: a model with the shapes of all weights.
      dtype: of the tensors in the file; weights of another dtype are cast.
      leaves: (path, weight) pairs in any order, weights stacked over layers.

    Raises:
      InputError: lists the tensors for which no weight was given.
    """
    table, numpy_dtype = published_tensors(abstract), jnp.dtype(dtype)
    names = {(path, layer): name for name, (path, layer, _) in table.items()}
    header, offsets = safetensors_header({name: shape for name, (*_, shape) in table.items()}, numpy_dtype)
    with written_on_disk(file) as on_disk, on_disk.open("wb") as out:
        out.write(header)
        for path, weight in leaves:
            host = np.asarray(weight)
            for layer in range(len(host)) if path.startswith("layers.") else [None]:
                tensor = to_published(path, host if layer is None else host[layer])
                data = np.empty(tensor.shape, numpy_dtype)
                copy_weight(data, tensor)
                out.seek(offsets[names.pop((path, layer))])
                out.write(data.reshape(-1).view(np.uint8).data)
    raise_errors(file, [f"{name}: expected a weight, found none" for name in names.values()])


def safetensors_header(shapes: Mapping[str, Shape], dtype: np.dtype) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, for tensors of one dtype.

    Returns:
      (bytes, {name: offset of its tensor from the beginning of the file, in bytes}).
    """
    code = next(code for code, name in STORED_DTYPES.items() if name == dtype.name)
    entries, offsets, end = {}, {}, 0
    for name in sorted(shapes):
        offsets[name], end = end, end + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
