"""Published checkpoints: one table of names between published tensors and modules, for both directions.

A published folder holds config.json, one or several safetensors files and tokenizer files, as Ouro's do
(arXiv 2510.25741). MELT's (arXiv 2605.07721) has the LoopLM's tensors and, for each layer, those of the gate. Weights
are read and written one stacked weight at a time, so that neither direction holds more beside what its caller keeps.
"""

import collections
import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from melt_jax.checkpoints.published_config import (
    STORED_DTYPES,
    fail,
    parse_config,
    published_config,
    read_config,
    read_raw_config,
    write_config,
)
from melt_jax.files import atomic_folder, copy_companions
from melt_jax.model.model import abstract_model, module_leaves

__all__ = ["PublishedFolder", "load_model", "read_config", "save_published", "to_hf_tensors"]

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one weight is published.

    Attributes:
      name: the published tensor's name, after `model.layers.{i}.` for a layer's.
      inputs: how many leading dimensions of the module's weight are inputs: the published matrix is (out, in),
        flattened. None: published as it is.
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


class PublishedFolder:
    """A published checkpoint: every tensor accounted for when it is opened, weights read when asked for.

    Attributes:
      folder: its path.
      raw: the dict in config.json.
      config: `ModelConfig`.
      dtype: of the tensors, a name; None where they differ.
      dtypes: {path: dtype name} of the module weights; None if the layers of a weight differ.
      shapes: {path: shape} of the module weights that it holds.
    """

    form = "published"

    def __init__(self, folder):
        """ValueError: all that config.json has and this model lacks, or else all that is wrong with the tensors."""
        self.folder = pathlib.Path(folder)
        self.raw = read_raw_config(folder)
        self.config = parse_config(self.raw, self.folder / "config.json")
        abstract = abstract_model(self.config)
        self.shapes = {path: leaf.shape for path, leaf in module_leaves(abstract)}
        self._names = collections.defaultdict(list)
        for name, (path, *_) in published_tensors(abstract).items():
            self._names[path].append(name)
        found, errors = scan_tensors(self.folder)
        errors += _tensor_errors(published_tensors(abstract), found)
        fail(self.folder, errors)
        self._files = {name: places[0][0] for name, places in found.items()}
        dtypes = {name: STORED_DTYPES[places[0][2]] for name, places in found.items()}
        self.dtypes = {path: _common({dtypes[name] for name in names}) for path, names in self._names.items()}
        self.dtype = _common(set(dtypes.values()))

    def read(self, path, dtype):
        """The module's weight of that path, an array of numpy's in host memory, all layers stacked."""
        weight = np.empty(self.shapes[path], jnp.dtype(dtype))
        targets = weight if path.startswith("layers.") else [weight]
        for target, name in zip(targets, self._names[path], strict=True):
            # A file opened for each tensor and closed again: what is mapped of it leaves the process's memory.
            with safe_open(self._files[name], framework="numpy") as tensors:
                copy_weight(target, from_published(path, tensors.get_tensor(name), target.shape))
        return weight

    def load(self, paths, dtype, shardings):
        """{path: jax.Array} of those weights, each placed by its sharding where {path: sharding} has one."""
        return {path: device_put_weight(self.read(path, dtype), shardings.get(path)) for path in paths}


def _common(values):
    """The only element of a set; None if there are several."""
    return next(iter(values)) if len(values) == 1 else None


def scan_tensors(folder):
    """What a folder's safetensors files hold, read from their headers.

    Returns:
      ({name: [(file, shape, stored dtype), …]}, errors): unreadable files, and where the index contradicts them.
    """
    found, errors = collections.defaultdict(list), []
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        errors.append("no *.safetensors file: expected one or several")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():
                    piece = tensors.get_slice(name)
                    found[name].append((file, tuple(piece.get_shape()), piece.get_dtype()))
        except SafetensorError as error:
            errors.append(f"{file.name} is no readable safetensors file: {error}")
    if (folder / INDEX).is_file():
        errors += _index_errors(folder, found)
    return found, errors


def _index_errors(folder, found):
    try:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{INDEX} has no readable weight_map: {error!r}"]
    errors = []
    for name in sorted({*index, *found}):
        holders = [file.name for file, *_ in found.get(name, [])]
        if name not in index:
            errors.append(f"{name} is in {' and '.join(holders)}, but not in {INDEX}")
        elif index[name] not in holders:
            errors.append(
                f"{name} should be in {index[name]} by {INDEX}: it is in {' and '.join(holders) or 'no file'}"
            )
    return errors


def _tensor_errors(expected, found):
    """Every tensor that is missing, unknown, doubled, of another shape or of a dtype that is no weight's."""
    errors = [f"{name} {expected[name][2]} is missing" for name in expected if name not in found]
    for name, places in found.items():
        if len(places) > 1:
            errors.append(f"{name} is doubled: in " + " and in ".join(file.name for file, *_ in places))
        for file, shape, dtype in places:
            if name not in expected:
                errors.append(f"{name} {shape} in {file.name} is unknown: config.json describes no such weight")
            elif shape != expected[name][2]:
                errors.append(f"{name} in {file.name} has shape {shape}: expected {expected[name][2]}")
            if dtype not in STORED_DTYPES:
                errors.append(f"{name} in {file.name} has dtype {dtype}: expected one of {', '.join(STORED_DTYPES)}")
    return errors


def load_model(folder, dtype="float32", gate=None, first_loop=None, shardings=None):
    """A model from a published folder.

    Args:
      folder: holds config.json and one or several safetensors files.
      dtype: of the weights in memory; None: as stored.
      gate: a gate variant in place of the checkpoint's; "none" is the LoopLM inside a MELT.
      first_loop: "copy" or "gated" in place of the checkpoint's.
      shardings: a model whose weights are shardings, or None: the default device.

    Returns:
      `LoopedTransformer`.

    Raises:
      ValueError: all that is wrong with config.json, or else all that is wrong with the tensors.
    """
    return assemble(PublishedFolder(folder), dtype, gate, first_loop, shardings)


def assemble(source, dtype=None, gate=None, first_loop=None, shardings=None):
    """A model from an open checkpoint folder, a `PublishedFolder` or a `checkpoint.OrbaxFolder`; see `load_model`."""
    config = override(source.config, gate, first_loop)
    dtype = chosen_dtype(source, dtype)
    abstract = abstract_model(config, dtype)
    paths = [path for path, _ in module_leaves(abstract)]
    lacking = [f"{path} is not in it" for path in paths if path not in source.shapes]
    hint = (
        f"gate {config.gate!r} needs weights: melt_jax.convert --gate={config.gate} writes a checkpoint with fresh ones"
    )
    fail(source.folder, [*lacking, hint] if lacking else [])
    weights = source.load(paths, dtype, dict(module_leaves(shardings)) if shardings is not None else {})
    return jax.tree.unflatten(jax.tree.structure(abstract), [weights[path] for path in paths])


def override(config, gate=None, first_loop=None):
    """The config with another gate or first loop; None leaves them."""
    changes = {name: value for name, value in (("gate", gate), ("first_loop", first_loop)) if value is not None}
    return dataclasses.replace(config, **changes)


def chosen_dtype(source, dtype):
    """The name of the dtype to open with: the one asked for, or the one that the checkpoint is stored in."""
    if dtype is None and source.dtype is None:
        fail(source.folder, ["weights are stored in several dtypes: name the one to open them with (dtype)"])
    return jnp.dtype(source.dtype if dtype is None else dtype).name


def device_put_weight(weight, sharding=None):
    """A host array on the default device, or spread by a sharding; each process copies only what its devices hold."""
    if sharding is None:
        return jnp.asarray(weight)
    return jax.make_array_from_callback(weight.shape, sharding, lambda index: weight[index])


def copy_weight(target, weight):
    """target[...] = weight; between equal dtypes as bare bits, several times faster for bfloat16."""
    if target.dtype == weight.dtype:
        bits = f"u{target.dtype.itemsize}"
        target, weight = target.view(bits), weight.view(bits)
    target[...] = weight


def save_published(folder, model, dtype="bfloat16", tokenizer_from=None, overwrite=False):
    """Writes a model as a published folder, whole or not at all; from a single process.

    Args:
      folder: where; must not exist unless `overwrite`.
      model: `LoopedTransformer`.
      dtype: of the tensors in the file.
      tokenizer_from: a checkpoint folder whose tokenizer files, and harmless keys of config.json, are taken over; or
        None.

    Raises:
      FileExistsError: `folder` exists.
    """
    with atomic_folder(folder, overwrite) as temporary:
        raw = companions(tokenizer_from, temporary)
        write_weights(temporary / "model.safetensors", jax.eval_shape(lambda: model), dtype, module_leaves(model))
        write_config(temporary, published_config(model.config, jnp.dtype(dtype).name, raw))


def companions(source, target):
    """Copies the tokenizer files of a checkpoint folder; returns its config.json, or None if it is no such model's.

    None or "" names no folder: nothing is copied.
    """
    if not source:
        return None
    copy_companions(source, target)
    try:
        raw = read_raw_config(source)
        parse_config(raw)
        return raw
    except ValueError:
        return None


def write_weights(file, abstract, dtype, leaves):
    """Writes one safetensors file without holding it: its header, then each weight's tensors as the weight comes.

    Laid out as the published files are: tensors by name, no `__metadata__`, so that sizes agree to the byte.

    Args:
      file: path of the new file.
      abstract: a model with the shapes of all weights.
      dtype: of the tensors in the file; weights of another are cast.
      leaves: (path, weight) pairs in any order, weights stacked over layers.
    """
    table, dtype = published_tensors(abstract), jnp.dtype(dtype)
    names = {(path, layer): name for name, (path, layer, _) in table.items()}
    header, offsets = safetensors_header({name: shape for name, (*_, shape) in table.items()}, dtype)
    with open(file, "wb") as out:
        out.write(header)
        for path, weight in leaves:
            host = np.asarray(weight)
            for layer in range(len(host)) if path.startswith("layers.") else [None]:
                tensor = to_published(path, host if layer is None else host[layer])
                data = np.empty(tensor.shape, dtype)
                copy_weight(data, tensor)
                out.seek(offsets[names.pop((path, layer))])
                out.write(data.reshape(-1).view(np.uint8))
    fail(file, [f"no weight was given for {name}" for name in names.values()])


def safetensors_header(shapes, dtype):
    """What a safetensors file begins with, for tensors of one dtype.

    Returns:
      (bytes, {name: where its tensor begins, in bytes from the file's beginning}).
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
