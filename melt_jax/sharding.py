"""Sharding: the mesh, the table of rules, and the movement of weights and gradients in a step.

Every weight is declared with a logical name for each of its dimensions (`model.Initializer`). `RULES` maps each logical
name to the mesh axis that splits such dimensions. The mesh has three axes:

    replica    whole copies of the state; the batch is split over it
    fsdp       weights and moments are split over it, and so is the batch
    tensor     heads, feed-forward, vocabulary, latents and KV entries are split over it
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils

from melt_jax.config import InputError, MeshConfig, ModelConfig, TrainConfig
from melt_jax.model.model import abstract_model

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")  # the axes that split the batch; devices with the same index on both form a group
RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "latent": "tensor",
    "norm": None,
    "layers": None,
    None: None,
}

Tree = TypeVar("Tree")


class ShardingError(InputError):
    """A model or batch that cannot be split over a mesh; the message gives the numbers."""


def mesh_shape(config: MeshConfig, devices: int) -> dict[str, tuple[int, int]]:
    """{axis: (devices within a slice, slices)} of a mesh over that number of devices.

    Raises:
      ShardingError: the product of the factors is not the number of devices.
    """
    shape = {axis: (getattr(config, axis), getattr(config, f"{axis}_slices", 1)) for axis in AXES}
    known = math.prod((inner or 1) * outer for inner, outer in shape.values())
    free = [axis for axis, (inner, _) in shape.items() if not inner]
    found = " · ".join(f"{axis} {inner or '?'}×{outer}" for axis, (inner, outer) in shape.items())
    if len(free) > 1:
        raise ShardingError(f"mesh: expected at most one axis set to 0 (all remaining devices), found {found}")
    if devices % known or (not free and devices != known):
        raise ShardingError(f"mesh: expected a product of {devices}, the number of devices, found {found} = {known}")
    rest = devices // known
    return {axis: (inner or rest, outer) for axis, (inner, outer) in shape.items()}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Builds the mesh (replica, fsdp, tensor) with explicit axes.

    Axes within a slice (ICI) follow the devices' coordinates; factors over slices (DCN) are outermost.

    Args:
      config: the factors.
      devices: all devices by default; devices of a described topology work too.

    Raises:
      ShardingError: see `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    inner, outer = zip(*shape.values())
    explicit = (jax.sharding.AxisType.Explicit,) * len(AXES)
    if math.prod(outer) > 1:
        by_process = getattr(devices[0], "slice_index", None) is None
        array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, process_is_granule=by_process)
    else:
        array = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES, axis_types=explicit)


def partition(names: Sequence[str | None]) -> jax.P:
    """The `PartitionSpec` of a weight whose dimensions have these logical names.

    Raises:
      ShardingError: a name has no rule, or two dimensions share a mesh axis.
    """
    if unknown := [name for name in names if name not in RULES]:
        raise ShardingError(f"logical axes: expected some of {sorted(filter(None, RULES))}, found {unknown}")
    axes = [RULES[name] for name in names]
    used = [axis for axis in axes if axis]
    if clash := sorted({axis for axis in used if used.count(axis) > 1}):
        raise ShardingError(
            f"logical axes {names}: expected {', '.join(clash)} to split only one dimension, found {axes}"
        )
    return jax.P(*axes)


def weight_shardings(model: Tree, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Tree:
    """The `NamedSharding` of each weight of a (possibly abstract) model, as a tree like the model.

    Raises:
      ShardingError: lists every dimension that its mesh axis does not divide.
    """
    errors = []

    def weight_sharding(path, weight):
        spec = partition(weight.axes)
        name = ".".join(key.name for key in path)
        for size, logical, axis in zip(weight.get_value().shape, weight.axes, spec):
            if axis and size % mesh.shape[axis]:
                errors.append(f"{name}: expected {logical} divisible by {axis}, {mesh.shape[axis]}, found {size}")
        return weight.copy(jax.NamedSharding(mesh, spec))

    shardings = jax.tree_util.tree_map_with_path(weight_sharding, model, is_leaf=_is_weight)
    width = model.config.width  # pyright: ignore[reportAttributeAccessIssue]: Tree is a model here
    if width % mesh.shape["tensor"]:  # latents and attention outputs are split too
        errors.append(f"width: expected a multiple of tensor, {mesh.shape['tensor']}, found {width}")
    if errors:
        raise ShardingError("weights cannot be split over the mesh:\n" + "\n".join(errors))
    return shardings


def place_weights(model: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Places a model's weights by `weight_shardings`; each process holds its own pieces."""
    return jax.tree.map(place_array, model, weight_shardings(model, mesh))


def place_array(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places an array by a sharding.

    With several processes the array is either global already, or every process holds all of it.
    """
    if getattr(array, "is_fully_addressable", True) and not sharding.is_fully_addressable:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return jax.device_put(array, sharding)


def for_inference(model: Tree, dtype: Any) -> Tree:
    """Casts a model and gathers its weights over the batch axes, as inference expects; they stay split over tensor."""
    return jax.jit(lambda model: jax.tree.map(lambda x: _gather(x.astype(dtype)), model))(model)


def check_batch(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, batch: int, micro_batches: int) -> None:
    """Raises ShardingError if a batch cannot be split over the mesh and into micro-batches."""
    groups = _groups(mesh)
    if batch % (groups * micro_batches):
        found = f"replica {mesh.shape['replica']} · fsdp {mesh.shape['fsdp']} · micro_batches {micro_batches}"
        raise ShardingError(f"data.batch: expected a multiple of {groups * micro_batches} ({found}), found {batch}")


def check_attention(mesh: jax.sharding.Mesh, attention: str) -> None:
    """Raises ShardingError if the devices cannot run `attention`, the config key. A CPU interprets the kernels."""
    platform = mesh.devices.flat[0].platform
    if attention == "pallas" and platform not in ("tpu", "cpu"):
        raise ShardingError(
            f"attention: expected 'blocks' on {platform}, because the kernel is for TPUs, found 'pallas'"
        )
    if attention == "pallas" and mesh.size > 1 and _groups(mesh) == 1:
        raise ShardingError(
            f"attention: expected 'blocks' with replica · fsdp = 1 and tensor {mesh.shape['tensor']}, because the"
            " kernel needs a batch that is split over devices, found 'pallas'; use a smaller tensor"
        )


def check_kernel(config: TrainConfig, model: ModelConfig) -> None:
    """Raises ShardingError if the attention kernel's blocks do not fit in a TPU's VMEM."""
    if config.attention != "pallas":
        return
    rows = config.chunk_size * model.group  # queries per KV head
    if rows > 4096:
        most = f"{4096 // model.group} (4096 queries per KV head)"
        raise ShardingError(f"chunk_size: expected at most {most} with attention 'pallas', found {config.chunk_size}")
    # A block's float32 scores, slots × rows padded to 128, take at most 2 MB of VMEM.
    block, most = config.attention_block, min(512, 2**19 // (-(-rows // 128) * 128) // 128 * 128)
    if block % 128 or block > most:
        raise ShardingError(
            f"attention_block: expected a multiple of 128 up to {most} with attention 'pallas', found {block}"
        )


def mesh_errors(config: TrainConfig, model: ModelConfig) -> list[str]:
    """Every mismatch between the devices and a run's mesh, batch and weights."""
    try:
        mesh = make_mesh(config.mesh)
    except ShardingError as error:
        return [str(error)]
    checks = (
        functools.partial(check_batch, mesh, config.data.batch, config.micro_batches),
        functools.partial(weight_shardings, abstract_model(model), mesh),
        functools.partial(check_attention, mesh, config.attention),
        functools.partial(check_kernel, config, model),
    )
    errors = []
    for check in checks:
        try:
            check()
        except ShardingError as error:
            errors.append(str(error))
    return errors


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """The `NamedSharding` of [batch, …] arrays."""
    return jax.NamedSharding(mesh, jax.P(_batch_axes(mesh)))


def _batch_axes(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> tuple[str, ...] | None:
    """The entry of a `PartitionSpec` that splits the batch; None with one group.

    Else the arrays of a single sequence, which broadcasting leaves as they are, would have two types: split over one
    group, or not split.
    """
    return BATCH if _groups(mesh) > 1 else None


def _groups(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH if axis in mesh.axis_names)


def local_batch_indices(sharding: jax.NamedSharding, batch: int, process: int | None = None) -> np.ndarray:
    """The indices of the sequences of a global batch that a process's devices need.

    On a real slice they need not be consecutive: a process owns a block of the torus, not a range of the mesh.

    Args:
      sharding: from `batch_sharding`.
      batch: sequences of the global batch.
      process: a process index; this process by default.

    Returns:
      [n] integers, sorted, without duplicates.
    """
    process = jax.process_index() if process is None else process
    needed = np.zeros(batch, bool)
    for device, index in sharding.devices_indices_map((batch,)).items():
        if device.process_index == process:
            needed[index] = True
    return np.flatnonzero(needed)


def device_slice(index: slice, indices: np.ndarray) -> slice:
    """The positions of the sequences `index` of the global batch among a process's `indices`.

    A device's sequences are consecutive and all belong to its process, so their positions are consecutive too.

    Raises:
      ValueError: some of them are not in `indices`.
    """
    begin, end, _ = index.indices(int(indices[-1]) + 1 if index.stop is None else index.stop)
    first = int(np.searchsorted(indices, begin))
    local = slice(first, first + end - begin)
    if not np.array_equal(indices[local], np.arange(begin, end)):
        raise ValueError(f"expected sequences {begin} to {end - 1} of the batch in this process, found {indices}")
    return local


def place_batch(batch: Tree, sharding: jax.NamedSharding, indices: np.ndarray, size: int) -> Tree:
    """Builds global arrays from this process's part of a batch.

    Args:
      batch: [n, …] arrays: the sequences `indices` of the global batch.
      sharding: from `batch_sharding`.
      indices: from `local_batch_indices`.
      size: sequences of the global batch.

    Returns:
      [size, …] arrays.
    """

    def place(x):
        read = lambda index: x[device_slice(index[0], indices)]
        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, read)

    return jax.tree.map(place, batch)


# ---- inside a step: without a mesh, nothing is split or gathered


def batch_groups() -> int:
    """The number of parts into which the current mesh splits a batch; 1 without a mesh."""
    return _groups(jax.sharding.get_abstract_mesh())


def _batch_spec(*leading: None) -> Any:
    """The spec, in the current mesh, of arrays whose dimension after the `leading` ones is the batch."""
    return in_mesh(jax.P(*leading, _batch_axes(jax.sharding.get_abstract_mesh())))


def group_batch(batch: Tree, parts: int) -> Tree:
    """Splits each device group's share of a batch into equal parts: [batch, …] → [groups, parts, rest, …]."""
    groups = batch_groups()
    shape = lambda x: (groups, parts, x.shape[0] // (groups * parts), *x.shape[1:])
    return jax.tree.map(lambda x: jnp.reshape(x, shape(x), out_sharding=_batch_spec()), batch)


def ungroup_batch(grouped: Tree) -> Tree:
    """Merges the groups of each part: [groups, parts, rest, …] → [parts, groups · rest, …], split over batch axes."""
    shape = lambda x: (x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])
    merge = lambda x: jnp.reshape(jnp.swapaxes(x, 0, 1), shape(x), out_sharding=_batch_spec(None))
    return jax.tree.map(merge, grouped)


def gather_weights(model: Tree) -> Tree:
    """Gathers every weight over the batch axes, a copy per group: … → [groups, …]. One all-gather for each weight."""

    def gather(x):
        spec = in_mesh(jax.P(_batch_axes(jax.sharding.get_abstract_mesh()), *_without_fsdp(x)))
        return jnp.broadcast_to(_gather(x), (batch_groups(), *x.shape), out_sharding=spec)

    return jax.tree.map(gather, model)


def gather_at_use(model: Tree) -> Tree:
    """The model with weights that are gathered at each use, so that few are whole at a time.

    Its gradient is reduced over the batch axes at every use.
    """
    if batch_groups() == 1:
        return model
    defer = lambda weight: weight.copy(on_get_value=_gather_hook)  # the hook receives each layer's slice
    return jax.tree.map(defer, model, is_leaf=_is_weight)


def add_groups(gradients: Tree, params: Tree) -> Tree:
    """Sums the groups' gradients, [groups, …] → …, sharded like `params`. One reduction for each weight."""
    add = lambda g, p: jnp.einsum("r...->...", g, out_sharding=in_mesh(jax.typeof(p).sharding.spec))
    return jax.tree.map(add, gradients, params)


def in_mesh(spec: jax.P) -> jax.P | None:
    """The `PartitionSpec`, or None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def _is_weight(node):
    return isinstance(node, nnx.Variable)


def _gather_hook(weight, value):
    with jax.named_scope("gather_weights"):
        return _gather(value)


def _gather(x):
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, _without_fsdp(x))


def _without_fsdp(x):
    return jax.P(*(None if name == "fsdp" else name for name in jax.typeof(x).sharding.spec))
