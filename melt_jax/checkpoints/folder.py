"""Model folders of either form, and the assembly of a model from one."""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from melt_jax.checkpoints.published_config import parse_config, raise_errors, read_raw_config
from melt_jax.config import ModelConfig, model_errors
from melt_jax.digests import check_digests
from melt_jax.files import PathLike, absolute
from melt_jax.model.model import LoopedTransformer, abstract_model, module_leaves

# {form: its kind in the record of a folder}
KINDS = {"orbax": "a model folder in Orbax form", "published": "a model folder in published form"}


class ModelFolder(abc.ABC):
    """A model checkpoint: checked completely when it is opened, weights read on demand.

    Attributes:
      form: "published" or "orbax".
      folder: its absolute path.
      raw: the dict in config.json.
      config: the model's config.
      shapes: {path: shape} of the weights, all layers stacked.
      dtypes: {path: dtype name} of the stored weights; None if the layers of a weight differ.
    """

    form: ClassVar[str]
    dtypes: dict[str, str | None]

    def __init__(self, folder: PathLike):
        """Reads config.json; a subclass also checks the weights.

        Raises:
          InputError: lists everything in config.json that this model does not support; if there is nothing, every
            missing, unknown or wrongly shaped weight.
        """
        self.folder = absolute(folder)
        self.raw = read_raw_config(folder)
        self.config = parse_config(self.raw, self.folder / "config.json")
        self.shapes = {path: tuple(leaf.shape) for path, leaf in module_leaves(abstract_model(self.config))}

    @property
    def dtype(self) -> str | None:
        """The name of the dtype of all stored weights; None if they differ."""
        dtypes = set(self.dtypes.values())
        return dtypes.pop() if len(dtypes) == 1 else None

    def check_digests(self) -> None:
        """Compares the folder's files with its record, if it has one; process 0 only, because all read the same files.

        Raises:
          InputError: lists the files that differ.
        """
        if jax.process_index() == 0:
            check_digests(self.folder)

    def tensor_name(self, path: str, layer: int | None) -> str:
        """The name of a stored weight; `layer`, from 0, for the weights of layers."""
        return weight_name(path, layer)

    @abc.abstractmethod
    def read(self, path: str, dtype: str) -> np.ndarray:
        """The weight of that path in host memory, all layers stacked."""

    @abc.abstractmethod
    def load(self, paths: Iterable[str], dtype: str, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
        """{path: weight} on devices; a weight without an entry in `shardings` is on the default device."""


def assemble(
    source: ModelFolder, dtype: str | None = None, shardings: LoopedTransformer | None = None, **changes: Any
) -> LoopedTransformer:
    """A model from an open folder.

    Args:
      source: the folder.
      dtype: of the weights in memory; None: as stored.
      shardings: a model whose leaves are shardings; None: the default device.
      changes: fields of `ModelConfig` to use instead of the folder's; None leaves one as it is. Gate "none" is the
        LoopLM inside a MELT.

    Raises:
      InputError: a value is invalid, the gate needs weights that the folder lacks, `dtype` is None and stored dtypes
        differ, files differ from the folder's record, or a weight is not finite.
    """
    config = override(source.config, **changes)
    raise_errors(source.folder, model_errors(config))
    dtype = chosen_dtype(source, dtype)
    abstract = abstract_model(config, dtype)
    paths = [path for path, _ in module_leaves(abstract)]
    lacking = [f"{path}: expected for gate {config.gate!r}, found none" for path in paths if path not in source.shapes]
    hint = f"melt_jax.convert --gate={config.gate} writes a checkpoint with new gates"
    raise_errors(source.folder, [*lacking, hint] if lacking else [])
    source.check_digests()
    weights = source.load(paths, dtype, dict(module_leaves(shardings)) if shardings is not None else {})
    raise_errors(source.folder, not_finite_errors(source, weights))
    return jax.tree.unflatten(jax.tree.structure(abstract), [weights[path] for path in paths])


def not_finite_errors(source: ModelFolder, weights: Mapping[str, Any]) -> list[str]:
    """A message for each tensor of a folder with NaN or infinity, given {path: weight, layers stacked}."""
    names = [source.tensor_name(path, layer) for path, layer in not_finite(weights)]
    return [f"{name}: expected finite numbers, found NaN or infinity" for name in names]


def weight_name(path: str, layer: int | None) -> str:
    """How messages name a weight; `layer`, from 0, for those of layers."""
    return path if layer is None else f"{path} of layer {layer}"


def not_finite(weights: Mapping[str, Any]) -> list[tuple[str, int | None]]:
    """(path, layer from 0 or None) of the weights with NaN or infinity. Every process of a run must call it."""
    layers = {path: path.startswith("layers.") for path in weights}
    finite = jax.device_get({path: _finite_parts(weight, layers[path]) for path, weight in weights.items()})
    bad = [(path, i) for path, values in finite.items() for i in np.flatnonzero(~np.atleast_1d(values)).tolist()]
    return [(path, i if layers[path] else None) for path, i in bad]


def _finite_parts(weight, by_layer):
    if by_layer and isinstance(weight, np.ndarray):  # JAX copies its arguments from host memory: one layer at a time
        return np.array([bool(_finite(layer, False)) for layer in weight])
    return _finite(weight, by_layer)


@functools.partial(jax.jit, static_argnums=1)
def _finite(weight, by_layer):
    """Whether all numbers are finite: a scalar, or [L] of a weight stacked over layers."""
    return jnp.all(jnp.isfinite(weight), axis=tuple(range(1, weight.ndim)) if by_layer else None)


def override(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The config with other values of some fields; None leaves a field as it is."""
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def chosen_dtype(source: ModelFolder, dtype: str | None) -> str:
    """The name of the given dtype, or of the stored one if it is None.

    Raises:
      InputError: `dtype` is None and stored dtypes differ.
    """
    if dtype is None and source.dtype is None:
        found = ", ".join(sorted({str(name) for name in source.dtypes.values()}))
        raise_errors(source.folder, [f"dtype: expected weights of one dtype, found several ({found}); choose one"])
    return jnp.dtype(source.dtype if dtype is None else dtype).name
