"""Model folders in Orbax form: config.json in the published schema, `params/` by Orbax, and tokenizer files.

`open_model` opens these and published folders alike. Weights are stored as in the modules, stacked over layers, so a
model is restored directly into any sharding. Dimensions of 1 are left out, because TensorStore would copy such weights
to write them. Nothing is cast unless a dtype is given.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from melt_jax.checkpoints.folder import KINDS, ModelFolder, assemble
from melt_jax.checkpoints.published import PublishedFolder, Shape, companions
from melt_jax.checkpoints.published_config import (
    DTYPES,
    published_config,
    raise_errors,
    read_raw_config,
    write_config,
)
from melt_jax.config import InputError, ModelConfig
from melt_jax.files import PathLike, as_path, collective_atomic_folder
from melt_jax.model.model import LoopedTransformer, module_leaves

PARAMS = "params"
CHUNK = 512  # tokens; for models whose config.json has no chunk_size
READ_BYTES = 2**30  # limit of concurrent reads; Orbax needs at least the size of the largest weight


class OrbaxFolder(ModelFolder):
    """A checkpoint in Orbax form."""

    form = "orbax"

    def __init__(self, folder: PathLike):
        super().__init__(folder)
        stored = self._metadata()
        raise_errors(self.folder / PARAMS, _weight_errors(self.shapes, stored))
        self.dtypes = {path: np.dtype(leaf.dtype).name for path, leaf in stored.items()}

    def read(self, path: str, dtype: str) -> np.ndarray:
        shape = self.shapes[path]
        # The template has stride 0 and takes no memory: Orbax uses only its shape and dtype.
        template = np.broadcast_to(np.zeros((), jnp.dtype(dtype)), without_ones(shape))
        return self._restore({path: template})[path].reshape(shape)

    def load(self, paths: Iterable[str], dtype: str, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            path: jax.ShapeDtypeStruct(self.shapes[path], jnp.dtype(dtype), sharding=shardings.get(path, default))
            for path in paths
        }
        weights = self._restore({path: _stored_form(leaf) for path, leaf in wanted.items()})
        return {path: _module_form(weights.pop(path), leaf) for path, leaf in wanted.items()}

    def _metadata(self):
        try:
            tree = ocp.metadata(str(self.folder / PARAMS)).metadata
        except Exception as error:  # Orbax has no common class for the errors of its storage layers
            raise InputError(f"{self.folder / PARAMS}: expected a complete Orbax checkpoint, found {error}") from error
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
        return {".".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}

    def _restore(self, templates):
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        largest = max(math.prod(template.shape) * 8 for template in templates.values())
        context.memory.read_concurrent_bytes = max(READ_BYTES, largest + 1)
        with context:
            tree = ocp.load(str(self.folder / PARAMS), nest(templates))
        return {path: _get(tree, path) for path in templates}


def open_folder(folder: PathLike) -> ModelFolder:
    """Opens and checks a model folder of either form.

    Raises:
      InputError: there is no such folder; otherwise as in `ModelFolder`.
    """
    path = as_path(folder)
    if not path.is_dir():
        raise InputError(
            f"{folder}: expected a model checkpoint, published or written by melt_jax.convert, found no such folder"
        )
    return OrbaxFolder(path) if (path / PARAMS).exists() else PublishedFolder(path)


def open_model(
    folder: PathLike,
    dtype: str | None = None,
    gate: str | None = None,
    first_loop: str | None = None,
    shardings: LoopedTransformer | None = None,
    window: int | None = None,
    sweeps: int | None = None,
) -> LoopedTransformer:
    """A model from a folder of either form.

    Arguments and errors are those of `melt_jax.checkpoints.published.load_model`, except that weights keep their stored
    dtype by default.
    """
    changes = {"gate": gate, "first_loop": first_loop, "window": window, "sweeps": sweeps}
    return assemble(open_folder(folder), dtype, shardings, **changes)


def default_chunk(folder: PathLike, config: ModelConfig) -> int:
    """The chunk, in tokens, with which to run a folder's model: a MELT's training chunk if known, else `CHUNK`.

    Args:
      folder: the model folder.
      config: the opened model's config. A LoopLM's results do not depend on the chunk.
    """
    trained = None if config.gate == "none" else read_raw_config(folder).get("chunk_size")
    return CHUNK if trained is None else trained


def weights_digest(folder: PathLike, dtype: str | None = None) -> str:
    """The sha256 of a model folder's weights, in hexadecimal: of their paths, dtypes, shapes and bytes.

    With `dtype`, it is that of the weights converted to it. Equal weights have equal digests in either form and in any
    folder. It reads one weight at a time. A published weight whose layers have several dtypes is read as float32. In a
    run of several processes all call it, or one of them through `training.processes.run_outside`: Orbax counts each
    process's reads and waits until all have the same count.

    Raises:
      InputError: as in `open_folder`, or files differ from the folder's record.
    """
    digest = hashlib.sha256()
    source = open_folder(folder)
    source.check_digests()
    for path, shape in sorted(source.shapes.items()):
        stored = dtype or source.dtypes[path] or "float32"
        digest.update(f"{path} {stored} {shape}\n".encode())
        digest.update(source.read(path, stored).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_model(
    folder: PathLike,
    model: LoopedTransformer,
    tokenizer_from: PathLike | None = None,
    overwrite: bool = False,
    chunk_size: int | None = None,
) -> None:
    """Writes a model in Orbax form, completely or not at all. Every process of a run must call it.

    Args:
      folder: the output; must not exist unless `overwrite`.
      model: its config and weights; they are stored in their dtype.
      tokenizer_from: a model folder from which tokenizer files and the harmless keys of config.json are copied.
      overwrite: replaces a model folder in Orbax form that melt_jax wrote.
      chunk_size: tokens of the chunk that a MELT was trained with, for config.json; None: as in `tokenizer_from`.

    Raises:
      FileExistsError: `folder` exists.
      InputError: `folder` must not be replaced.
    """
    inputs = [tokenizer_from] if tokenizer_from else []
    with collective_atomic_folder(folder, overwrite, KINDS["orbax"], inputs) as temporary:
        raw = None
        if jax.process_index() == 0:
            raw = companions(tokenizer_from, temporary)
        write_params(temporary / PARAMS, dict(module_leaves(model)))
        if jax.process_index() == 0:
            write_config(temporary, published_config(model.config, model.dtype.name, raw, chunk_size))


def write_params(folder: PathLike, weights: Mapping[str, Any]) -> None:
    """Writes {path: JAX or NumPy array} as an Orbax checkpoint, without a copy in memory.

    Each weight, or each of its shards, is written uncompressed and in one piece from the memory that holds it. This
    avoids Orbax's defensive copies of host arrays, TensorStore's copies of arrays with a dimension of 1 (q_proj and
    o_proj if G = 1), and buffers for compressing or regrouping.
    """
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    with context:
        ocp.save(str(folder), nest({path: weight.squeeze() for path, weight in weights.items()}))


def without_ones(shape: Shape) -> Shape:
    """The shape in which a weight is stored: without its dimensions of 1."""
    return tuple(size for size in shape if size != 1)


def _stored_form(leaf):
    """The abstract array, with its sharding, that Orbax restores for a weight: dimensions of 1 are left out."""
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = sharding.update(spec=jax.P(*(axis for axis, size in zip(sharding.spec, leaf.shape) if size != 1)))
    return jax.ShapeDtypeStruct(without_ones(leaf.shape), leaf.dtype, sharding=sharding)


def _module_form(weight, leaf):
    """The restored weight with its dimensions of 1 put back, as in the abstract array."""
    ones = [i for i, size in enumerate(leaf.shape) if size == 1]
    return jax.device_put(jnp.expand_dims(weight, ones), leaf.sharding) if ones else weight


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} → {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _get(tree, path):
    for name in path.split("."):
        tree = tree[name]
    return tree


def _weight_errors(expected, stored):
    errors = [f"{path}: expected shape {shape}, found none" for path, shape in expected.items() if path not in stored]
    for path, leaf in stored.items():
        shape, dtype = tuple(getattr(leaf, "shape", ()) or ()), getattr(leaf, "dtype", None)
        if path not in expected:
            errors.append(f"{path}: expected no such weight according to config.json, found shape {shape}")
        elif shape != without_ones(expected[path]):
            errors.append(f"{path}: expected shape {without_ones(expected[path])}, found {shape}")
        if dtype is None or np.dtype(dtype).name not in DTYPES:
            errors.append(f"{path}: expected dtype {', '.join(DTYPES)}, found {dtype}")
    return errors
