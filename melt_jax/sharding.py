"""Where arrays lie on many devices: one mesh, one table of rules, and how a step moves weights and gradients.

Every weight is declared with a logical name for each of its dimensions (`model.Initializer`); `RULES` says which axis
of the mesh splits a dimension of that name. The mesh has three axes:

    replica    whole copies of the state; the batch is split over it
    fsdp       masters, moments and the stored weights are split over it, and the batch too
    tensor     heads, feed-forward, vocabulary, latents and rows are split over it
"""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")  # the axes that split the batch; a training step is manual over them (`jax.shard_map`)
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
    if devices % known or not free and devices != known:
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
        return jax.sharding.Mesh(array, AXES, axis_types=explicit)
    return jax.make_mesh(inner, AXES, axis_types=explicit, devices=devices)


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
    problems = []

    def place(path, weight):
        spec = partition(weight.axes)
        name = ".".join(key.name for key in path)
        for size, logical, axis in zip(weight.get_value().shape, weight.axes, spec):
            if axis and size % mesh.shape[axis]:
                problems.append(f"{name}: {logical}, {size}, is not divisible by {axis}, {mesh.shape[axis]}")
        return weight.copy(jax.NamedSharding(mesh, spec))

    is_weight = lambda node: isinstance(node, nnx.Variable)
    shardings = jax.tree_util.tree_map_with_path(place, model, is_leaf=is_weight)
    if problems:
        raise ShardingError("weights cannot be split over the mesh:\n" + "\n".join(problems))
    return shardings


def place_weights(model, mesh):
    """The model with its weights split as `weight_shardings` says; each process holds its own pieces."""
    return jax.tree.map(place_array, model, weight_shardings(model, mesh))


def place_array(array, sharding):
    """An array that every process has whole, laid out by a sharding."""
    if getattr(array, "sharding", None) == sharding:
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array)[index])


def replicate(tree, mesh, dtype=None):
    """The arrays of a tree, whole on every device of the mesh, cast to a dtype if one is given."""
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype or x.dtype), tree)
    return jax.jit(cast, out_shardings=jax.NamedSharding(mesh, jax.P()))(tree)


def batch_sharding(mesh):
    """The `NamedSharding` of [batch, …] arrays."""
    return jax.NamedSharding(mesh, jax.P(BATCH))


def local_rows(sharding, batch):
    """The slice of a global batch's rows that this process's devices need.

    Raises:
      ShardingError: the batch cannot be split over the mesh, or this process's rows are not consecutive.
    """
    share = math.prod(sharding.mesh.shape[axis] for axis in BATCH)
    if batch % share:
        raise ShardingError(f"data.batch: {batch} sequences are not divisible by replica · fsdp, {share}")
    indices = sharding.addressable_devices_indices_map((batch,)).values()
    spans = sorted({(index[0].start or 0, index[0].stop or batch) for index in indices})
    if any(end != start for (_, end), (start, _) in zip(spans, spans[1:])):
        raise ShardingError(f"batch rows of this process are not consecutive: {spans}; change the mesh's factors")
    return slice(spans[0][0], spans[-1][1])


def place_batch(batch, sharding, rows, size):
    """Global arrays of `size` rows from this process's rows of them."""
    read = lambda x: lambda index: x[(index[0].start or 0) - rows.start : (index[0].stop or size) - rows.start]
    place = lambda x: jax.make_array_from_callback((size, *x.shape[1:]), sharding, read(x))
    return jax.tree.map(place, batch)


# ---- inside a step, manual over the batch axes


def over_batch(function, *arguments):
    """Calls a function on each device's share of the batch and of the weights: manual over the batch axes alone.

    Args:
      function: `(specs, *arguments) → (gradients, sums)`: gradients split as the first argument is, sums alike on all
        devices. `specs` are the `PartitionSpec`s of the arguments over the batch axes.
      arguments: pytrees of arrays. Without a mesh the function gets them as they are.
    """
    if not batch_axes():
        return function(jax.tree.map(lambda _: jax.P(), arguments), *arguments)
    specs = jax.tree.map(_batch_part, arguments)
    return jax.shard_map(
        lambda *arguments: function(specs, *arguments),
        in_specs=specs,
        out_specs=(specs[0], jax.P()),
        axis_names=set(BATCH),
        check_vma=False,
    )(*arguments)


def batch_axes():
    """The axes of the current mesh that split the batch; none without a mesh."""
    return tuple(axis for axis in BATCH if axis in jax.sharding.get_abstract_mesh().axis_names)


def sum_over_batch(tree):
    """Adds up over the batch axes."""
    total = lambda x: _on_pieces(lambda x: jax.lax.psum(x, batch_axes()), x)
    return jax.tree.map(total, tree) if batch_axes() else tree


def gather_weights(model, specs):
    """The model with its weights whole over the batch axes: one all-gather each."""
    return jax.tree.map(_gather, model, specs)


def gather_at_use(model, specs):
    """The model with the weights of its layers gathered whenever one is used, layer by layer; the others at once.

    A gradient with respect to it is split as the layers' weights are: the gather's transpose adds it up.
    """
    is_weight = lambda node: isinstance(node, nnx.Variable)

    def defer(weight, spec):
        of_one_layer = jax.P(*spec.get_value()[1:])  # a scan takes the leading dimension, layers, away
        return weight.copy(on_get_value=_GatherHook(of_one_layer))

    # The two parts are put together by attribute: other modules and weights hold no layers.
    gathered = gather_weights(model, specs)
    gathered.layers = jax.tree.map(defer, model.layers, specs.layers, is_leaf=is_weight)
    return gathered


def reduce_gradients(gradients, params, specs):
    """Adds gradients up over the batch axes; each device keeps the piece that its `params` are."""

    def reduce(gradient, param, spec):
        if not batch_axes():
            return gradient
        for axis, name in enumerate(spec):
            if name == "fsdp" and gradient.shape[axis] != param.shape[axis]:
                scatter = lambda x, axis=axis: jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
                gradient = _on_pieces(scatter, gradient)
        others = tuple(axis for axis in batch_axes() if axis not in spec)
        return _on_pieces(lambda x: jax.lax.psum(x, others), gradient)

    # Weights that are gathered at use carry a hook that masters do not: match them leaf by leaf.
    leaves = map(reduce, jax.tree.leaves(gradients), jax.tree.leaves(params), jax.tree.leaves(specs))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@dataclasses.dataclass(frozen=True)
class _GatherHook:
    """What a weight does when it is read: gathers its pieces."""

    spec: jax.P

    def __call__(self, weight, value):
        return _gather(value, self.spec)


def _gather(x, spec):
    for axis, name in enumerate(spec):
        if name == "fsdp":
            x = _on_pieces(lambda x, axis=axis: jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True), x)
    return x


def _on_pieces(collective, x):
    """A collective over the batch axes of each tensor device's piece.

    JAX 0.10 has no psum_scatter, and XLA no psum, of arrays that another axis splits further: here none does.
    """
    spec = jax.typeof(x).sharding.spec
    return jax.shard_map(collective, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)(x)


def _batch_part(x):
    """The `PartitionSpec` of x, the tensor axis left out."""
    keep = lambda name: tuple(axis for axis in (name if isinstance(name, tuple) else (name,)) if axis in BATCH)
    names = [keep(name) for name in jax.typeof(x).sharding.spec]
    return jax.P(*(name[0] if len(name) == 1 else name or None for name in names))
