"""Model checkpoints: a folder with config.json in the published schema, `params/` by Orbax, and tokenizer files.

`open_model` opens these and published folders alike. Weights are stored as the modules have them, stacked over layers,
so that a model restores straight into any sharding; only dimensions of 1 are left out, which TensorStore would copy to
write. Nothing is cast unless a dtype is asked for.
"""

import contextlib
import contextvars
import hashlib
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from melt_jax.checkpoints.published import PublishedFolder, assemble, companions
from melt_jax.checkpoints.published_config import (
    DTYPES,
    fail,
    parse_config,
    published_config,
    read_raw_config,
    write_config,
)
from melt_jax.files import atomic_folder
from melt_jax.model.model import abstract_model, module_leaves

PARAMS = "params"
CHUNK = 512  # tokens, where a model does not say in which chunk to run it
READ_BYTES = 2**30  # in flight while reading; Orbax refuses a smaller limit than the largest weight

_single_process = contextvars.ContextVar("single_process", default=False)


class OrbaxFolder:
    """A checkpoint in Orbax form: its metadata compared with config.json when opened, weights read when asked for.

    Attributes:
      folder: its path.
      raw: the dict in config.json.
      config: `ModelConfig`.
      dtype: of the stored weights, a name; None where they differ.
      dtypes: {path: dtype name} of the stored weights.
      shapes: {path: shape} of the weights that it holds.
    """

    form = "orbax"

    def __init__(self, folder):
        """ValueError: what config.json has that this model lacks; then every missing, unknown or misshapen weight."""
        self.folder = pathlib.Path(folder).absolute()
        self.raw = read_raw_config(folder)
        self.config = parse_config(self.raw, self.folder / "config.json")
        stored = self._metadata()
        self.shapes = {path: leaf.shape for path, leaf in module_leaves(abstract_model(self.config))}
        fail(self.folder / PARAMS, _weight_errors(self.shapes, stored))
        self.dtypes = {path: np.dtype(leaf.dtype).name for path, leaf in stored.items()}
        dtypes = set(self.dtypes.values())
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None

    def _metadata(self):
        try:
            with _context():
                tree = ocp.metadata(self.folder / PARAMS).metadata
        except Exception as error:  # Orbax raises whatever its storage layers do
            fail(self.folder / PARAMS, [f"no complete Orbax checkpoint: {error}"])
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
        return {".".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}

    def read(self, path, dtype):
        """The weight of that path, an array of numpy's in host memory, all layers stacked."""
        shape = self.shapes[path]
        # A template of stride 0: Orbax asks it for shape and dtype only.
        template = np.broadcast_to(np.zeros((), jnp.dtype(dtype)), without_ones(shape))
        return self._restore({path: template})[path].reshape(shape)

    def load(self, paths, dtype, shardings):
        """{path: jax.Array} of those weights, each placed by its sharding where {path: sharding} has one."""
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            path: jax.ShapeDtypeStruct(self.shapes[path], jnp.dtype(dtype), sharding=shardings.get(path, default))
            for path in paths
        }
        weights = self._restore({path: _stored_form(leaf) for path, leaf in wanted.items()})
        return {path: _module_form(weights.pop(path), wanted[path]) for path in paths}

    def _restore(self, templates):
        context = _context()
        context.pytree.loading.partial_load = True
        largest = max(int(np.prod(template.shape)) * 8 for template in templates.values())
        context.memory.read_concurrent_bytes = max(READ_BYTES, largest + 1)
        with context:
            tree = ocp.load(self.folder / PARAMS, nest(templates))
        return {path: _get(tree, path) for path in templates}


def open_folder(folder):
    """The `OrbaxFolder` or `PublishedFolder` in a folder, checked; ValueError as theirs, or when it is neither."""
    path = pathlib.Path(folder)
    if not path.is_dir():
        fail(folder, ["no such folder: expected a model checkpoint, published or made by melt_jax.convert"])
    return OrbaxFolder(path) if (path / PARAMS).exists() else PublishedFolder(path)


def open_model(folder, dtype=None, gate=None, first_loop=None, shardings=None):
    """A model from a published folder or one in Orbax form; otherwise as
    `melt_jax.checkpoints.published.load_model`, but for the dtype.

    Args:
      dtype: of the weights in memory; None: as stored.
    """
    return assemble(open_folder(folder), dtype, gate, first_loop, shardings)


def default_chunk(folder, config):
    """Tokens of the chunk in which to run a folder's model: what a MELT was trained with, if config.json says it.

    Args:
      folder: the model checkpoint.
      config: `ModelConfig` of the model as opened: a LoopLM's outcome depends on no chunk, 512 is quick.
    """
    trained = None if config.gate == "none" else read_raw_config(folder).get("chunk_size")
    return CHUNK if trained is None else trained


def weights_digest(folder: str | pathlib.Path) -> str:
    """The sha256 of a checkpoint's weights, in hexadecimal: of their paths, dtypes, shapes and bytes.

    Equal weights have equal digests, in either form and in any folder. Any process may call it without the others. It
    reads one weight at a time; a published weight whose layers have several dtypes is read as float32.

    Raises:
      InputError: as `open_folder`.
    """
    digest = hashlib.sha256()
    with single_process():
        source = open_folder(folder)
        for path, shape in sorted(source.shapes.items()):
            dtype = source.dtypes[path] or "float32"
            digest.update(f"{path} {dtype} {tuple(shape)}\n".encode())
            digest.update(source.read(path, dtype).reshape(-1).view(np.uint8))
    return digest.hexdigest()


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Within it, this process reads and writes checkpoints without waiting for the run's other processes."""
    token = _single_process.set(True)
    try:
        yield
    finally:
        _single_process.reset(token)


def _context():
    context = ocp.Context()
    if _single_process.get():
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


def save_model(folder, model, tokenizer_from=None, overwrite=False, chunk_size=None):
    """Writes a model in Orbax form, whole or not at all; called by every process.

    Args:
      folder: where; must not exist unless `overwrite`.
      model: `LoopedTransformer`, its weights stored in the dtype they have.
      tokenizer_from: a checkpoint folder whose tokenizer files, and harmless keys of config.json, are taken over.
      chunk_size: tokens of the chunk that a MELT was trained with, for config.json; None: as in `tokenizer_from`'s.

    Raises:
      FileExistsError: `folder` exists.
    """
    with atomic_folder(folder, overwrite) as temporary:
        raw = None
        if jax.process_index() == 0:
            raw = companions(tokenizer_from, temporary)
        write_params(temporary / PARAMS, dict(module_leaves(model)))
        if jax.process_index() == 0:
            write_config(temporary, published_config(model.config, model.dtype.name, raw, chunk_size))


def write_params(folder, weights):
    """Writes {path: array}, of JAX or numpy, as an Orbax checkpoint.

    One uncompressed piece per weight (per shard, where it has several) goes to disk from the memory it lies in: neither
    Orbax's defensive copy of host arrays, nor TensorStore's of those with a dimension of 1 (q_proj and o_proj where
    G = 1), nor a compressed or regrouped one stands beside the weights.
    """
    context = _context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    with context:
        ocp.save(folder, nest({path: weight.squeeze() for path, weight in weights.items()}))


def without_ones(shape):
    """The shape in which a weight is stored: its dimensions of 1 left out."""
    return tuple(size for size in shape if size != 1)


def _stored_form(leaf):
    """What Orbax restores for a weight, an abstract array with a sharding: dimensions of 1 left out of both."""
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = sharding.update(spec=jax.P(*(axis for axis, size in zip(sharding.spec, leaf.shape) if size != 1)))
    return jax.ShapeDtypeStruct(without_ones(leaf.shape), leaf.dtype, sharding=sharding)


def _module_form(weight, leaf):
    """The restored weight with its dimensions of 1 again, as the abstract array has them."""
    ones = [i for i, size in enumerate(leaf.shape) if size == 1]
    return jax.device_put(jnp.expand_dims(weight, ones), leaf.sharding) if ones else weight


def nest(flat):
    """{"a.b": x} → {"a": {"b": x}}."""
    tree = {}
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
    errors = [f"{path} {shape} is missing" for path, shape in expected.items() if path not in stored]
    for path, leaf in stored.items():
        shape, dtype = tuple(getattr(leaf, "shape", ()) or ()), getattr(leaf, "dtype", None)
        if path not in expected:
            errors.append(f"{path} {shape} is unknown: config.json describes no such weight")
        elif shape != without_ones(expected[path]):
            errors.append(f"{path} has shape {shape}: expected {without_ones(expected[path])}")
        if dtype is None or np.dtype(dtype).name not in DTYPES:
            errors.append(f"{path} has dtype {dtype}: expected one of {', '.join(DTYPES)}")
    return errors
