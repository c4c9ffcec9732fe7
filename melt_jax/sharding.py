"""Where arrays lie on many devices: one mesh, one table of rules, and how a step moves weights and gradients.

Every weight is declared with a logical name for each of its dimensions (`model.Initializer`); `RULES` says which axis
of the mesh splits a dimension of that name. The mesh has three axes:

    replica    whole copies of the state; the batch is split over it
    fsdp       masters, moments and the stored weights are split over it, and the batch too
    tensor     heads, feed-forward, vocabulary, latents and rows are split over it
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils

from melt_jax.model.model import abstract_model

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")  # the axes that split the batch; a group of devices has one index on both
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


class ShardingError(ValueError):
    """Axes that cannot be laid on a mesh; the message has the numbers."""


def mesh_shape(config, devices):
    """{axis: (devices within a slice, slices)} of a `MeshConfig` on so many devices.

    Raises:
      ShardingError: the factors do not multiply up to the number of devices.
    """
    shape = {axis: (getattr(config, axis), getattr(config, f"{axis}_slices", 1)) for axis in AXES}
    known = math.prod((inner or 1) * outer for inner, outer in shape.values())
    free = [axis for axis, (inner, _) in shape.items() if not inner]
    found = " · ".join(f"{axis} {inner or '?'}×{outer}" for axis, (inner, outer) in shape.items())
    if len(free) > 1:
        raise ShardingError(f"mesh: expected at most one axis of 0 (what is left), found {found}")
    if devices % known or (not free and devices != known):
        raise ShardingError(f"mesh: expected a product of {devices}, the number of devices, found {found} = {known}")
    rest = devices // known
    return {axis: (inner or rest, outer) for axis, (inner, outer) in shape.items()}


def make_mesh(config, devices=None):
    """The mesh (replica, fsdp, tensor) of a `MeshConfig`, its axes explicit.

    Axes are laid out within slices (ICI) by the devices' coordinates; factors over slices (DCN) come outermost.

    Args:
      config: `MeshConfig`.
      devices: by default all of them; also those of a topology that is only described.

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


def partition(names):
    """The `PartitionSpec` of a weight whose dimensions have these logical names.

    Raises:
      ShardingError: a name without a rule, or two dimensions on one mesh axis.
    """
    if unknown := [name for name in names if name not in RULES]:
        raise ShardingError(f"logical axes: expected some of {sorted(filter(None, RULES))}, found {unknown}")
    axes = [RULES[name] for name in names]
    used = [axis for axis in axes if axis]
    if clash := sorted({axis for axis in used if used.count(axis) > 1}):
        raise ShardingError(f"logical axes {names} lie on mesh axes {axes}: {', '.join(clash)} can split one of them")
    return jax.P(*axes)


def weight_shardings(model, mesh):
    """The `NamedSharding` of each weight of a (possibly abstract) model, as a model.

    Raises:
      ShardingError: lists every dimension that its mesh axis does not divide.
    """
    errors = []

    def place(path, weight):
        spec = partition(weight.axes)
        name = ".".join(key.name for key in path)
        for size, logical, axis in zip(weight.get_value().shape, weight.axes, spec):
            if axis and size % mesh.shape[axis]:
                errors.append(f"{name}: {logical}, {size}, is not divisible by {axis}, {mesh.shape[axis]}")
        return weight.copy(jax.NamedSharding(mesh, spec))

    is_weight = lambda node: isinstance(node, nnx.Variable)
    shardings = jax.tree_util.tree_map_with_path(place, model, is_leaf=is_weight)
    if model.config.width % mesh.shape["tensor"]:  # latents and attention outputs are split, too
        errors.append(f"width, {model.config.width}, is not divisible by tensor, {mesh.shape['tensor']}")
    if errors:
        raise ShardingError("weights cannot be split over the mesh:\n" + "\n".join(errors))
    return shardings


def place_weights(model, mesh):
    """The model with its weights split as `weight_shardings` says; each process holds its own pieces."""
    return jax.tree.map(place_array, model, weight_shardings(model, mesh))


def place_array(array, sharding):
    """An array, laid out by a sharding. Several processes either share it already or have it whole, each of them."""
    if getattr(array, "is_fully_addressable", True) and not sharding.is_fully_addressable:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    return jax.device_put(array, sharding)


def for_inference(model, dtype):
    """The model in a dtype, its weights whole over the batch axes and still split over tensor, as prefill takes it."""
    return jax.jit(lambda model: jax.tree.map(lambda x: _gather(x.astype(dtype)), model))(model)


def check_batch(mesh, batch, micro_batches):
    """ShardingError, with the numbers, where a batch cannot be split over the mesh and into micro-batches."""
    groups = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch % (groups * micro_batches):
        found = f"replica {mesh.shape['replica']} · fsdp {mesh.shape['fsdp']} · micro_batches {micro_batches}"
        raise ShardingError(f"data.batch: expected a multiple of {groups * micro_batches} ({found}), found {batch}")


def mesh_errors(config, model):
    """Why devices, a `TrainConfig`'s mesh and batch, and a `ModelConfig`'s weights do not fit: a list of messages."""
    try:
        mesh = make_mesh(config.mesh)
    except ShardingError as error:
        return [str(error)]
    found = []
    for check in (
        lambda: check_batch(mesh, config.data.batch, config.micro_batches),
        lambda: weight_shardings(abstract_model(model), mesh),
    ):
        try:
            check()
        except ShardingError as error:
            found.append(str(error))
    return found


def batch_sharding(mesh):
    """The `NamedSharding` of [batch, …] arrays."""
    return jax.NamedSharding(mesh, jax.P(BATCH))


def local_batch_indices(sharding, batch):
    """The slice of a global batch's rows that this process's devices need; ShardingError where they lie apart."""
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    spans = sorted({(index[0].start or 0, index[0].stop or batch) for index in indices})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise ShardingError(f"batch rows of this process are not consecutive: {spans}; change the mesh's factors")
    return slice(spans[0][0], spans[-1][1])


def place_batch(batch, sharding, rows, size):
    """Global arrays of `size` rows from this process's rows of them."""
    read = lambda x: lambda index: x[(index[0].start or 0) - rows.start : (index[0].stop or size) - rows.start]
    place = lambda x: jax.make_array_from_callback((size, *x.shape[1:]), sharding, read(x))
    return jax.tree.map(place, batch)


# ---- inside a step: no-ops without a mesh


def batch_groups():
    """How many parts the batch axes of the current mesh split a batch into; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in BATCH if axis in mesh.axis_names)


def group_batch(batch, parts):
    """[batch, …] arrays → [groups, parts, rest, …]: what each group of devices has of a batch, in equal parts."""
    groups = batch_groups()
    shape = lambda x: (groups, parts, x.shape[0] // (groups * parts), *x.shape[1:])
    return jax.tree.map(lambda x: jnp.reshape(x, shape(x), out_sharding=in_mesh(jax.P(BATCH))), batch)


def ungroup_batch(grouped):
    """[groups, parts, rest, …] arrays → [parts, batch of the part, …], each part split over the batch axes."""
    shape = lambda x: (x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])
    merge = lambda x: jnp.reshape(jnp.swapaxes(x, 0, 1), shape(x), out_sharding=in_mesh(jax.P(None, BATCH)))
    return jax.tree.map(merge, grouped)


def gather_weights(model):
    """Every weight whole over the batch axes, one copy for each group, [groups, …]: one all-gather each."""

    def gather(x):
        spec = in_mesh(jax.P(BATCH, *_without_fsdp(x)))
        return jnp.broadcast_to(_gather(x), (batch_groups(), *x.shape), out_sharding=spec)

    return jax.tree.map(gather, model)


def gather_at_use(model):
    """The model with weights that are gathered whenever one is read, so that few are whole at a time.

    A gradient with respect to it is added up over the batch axes at every use.
    """
    if batch_groups() == 1:
        return model
    is_weight = lambda node: isinstance(node, nnx.Variable)
    defer = lambda weight: weight.copy(on_get_value=_gather_hook)  # the hook of a weight sees each layer's slice
    return jax.tree.map(defer, model, is_leaf=is_weight)


def add_groups(gradients, params):
    """Adds up the groups' gradients, [groups, …], one reduction each, to the split of `params`."""
    add = lambda g, p: jnp.einsum("r...->...", g, out_sharding=in_mesh(jax.typeof(p).sharding.spec))
    return jax.tree.map(add, gradients, params)


def in_mesh(spec):
    """The `PartitionSpec`, or None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def _gather_hook(weight, value):
    with jax.named_scope("gather_weights"):
        return _gather(value)


def _gather(x):
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, _without_fsdp(x))


def _without_fsdp(x):
    return jax.P(*(None if name == "fsdp" else name for name in jax.typeof(x).sharding.spec))
