"""Meshes, shardings, and the sequences that each process reads."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from configs import base
from melt_jax.config import MeshConfig, freeze
from melt_jax.model.model import abstract_model
from melt_jax.sharding import (
    AXES,
    ShardingError,
    batch_sharding,
    check_attention,
    check_batch,
    check_kernel,
    device_slice,
    local_batch_indices,
    make_mesh,
    mesh_shape,
    partition,
    place_batch,
    weight_shardings,
)
from tests.helpers.devices import several_devices
from tests.helpers.tiny import TINY
from tests.helpers.topology import topology_devices

ROOT = pathlib.Path(__file__).parent.parent


def test_mesh_uses_all_devices():
    shape = lambda devices, *factors: mesh_shape(MeshConfig(*factors), devices)
    assert shape(16, 2, 0, 4) == {"replica": (2, 1), "fsdp": (2, 1), "tensor": (4, 1)}
    assert shape(16, 1, 0, 2, 2, 2) == {"replica": (1, 2), "fsdp": (2, 2), "tensor": (2, 1)}
    refused = ((16, (3, 0, 1), "16.*= 3"), (8, (1, 2, 2), "8.*= 4"), (8, (0, 0, 1), "at most one"))
    for devices, factors, numbers in refused:
        with pytest.raises(ShardingError, match=numbers):
            shape(devices, *factors)


def test_colliding_and_unknown_rules_are_refused():
    assert partition(("layers", "embed", "heads", None)) == jax.P(None, "fsdp", "tensor", None)
    with pytest.raises(ShardingError, match=r"expected tensor to split only one"):
        partition(("heads", "mlp"))
    with pytest.raises(ShardingError, match=r"found.*'head'"):
        partition(("head", "embed"))


def test_kernel_is_refused_on_gpus():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    check_attention(mesh, "pallas")
    with pytest.raises(ShardingError, match=r"^attention: expected 'blocks' on gpu, .* found 'pallas'$"):
        check_attention(_on("gpu"), "pallas")
    check_attention(_on("gpu"), "blocks")


@pytest.mark.parametrize(
    "chunk, block, kv_heads, message",
    [
        (500, 500, 16, "attention_block: expected a multiple of 128 up to 512 with attention 'pallas', found 500"),
        (500, 1024, 16, "attention_block: expected a multiple of 128 up to 512 with attention 'pallas', found 1024"),
        (500, 512, 4, "attention_block: expected a multiple of 128 up to 256 with attention 'pallas', found 512"),
        (1025, 128, 4, r"chunk_size: expected at most 1024 \(4096 queries per KV head\) .*, found 1025"),
        (500, 512, 16, None),
        (500, 256, 4, None),
    ],
)
def test_kernel_fits_the_models_heads(chunk, block, kv_heads, message):
    """The heads are those of the model that is trained; a run with a teacher ignores the config's."""
    config = base.get_config()
    config.teacher, config.attention, config.chunk_size, config.attention_block = "x", "pallas", chunk, block
    config = freeze(config)
    model = dataclasses.replace(config.model, kv_heads=kv_heads)
    if message is None:
        check_kernel(config, model)
    else:
        with pytest.raises(ShardingError, match=f"^{message}$"):
            check_kernel(config, model)


def test_kernel_needs_a_split_batch():
    with pytest.raises(ShardingError, match=r"^attention: expected 'blocks' with replica · fsdp = 1 and tensor 4, "):
        check_attention(_on("tpu", tensor=4), "pallas")
    check_attention(_on("tpu", tensor=4), "blocks")
    check_attention(_on("tpu", fsdp=2, tensor=4), "pallas")


def _on(platform, fsdp=1, tensor=1):
    devices = np.array([types.SimpleNamespace(platform=platform)])
    shape = {"replica": 1, "fsdp": fsdp, "tensor": tensor}
    return types.SimpleNamespace(devices=devices, axis_names=AXES, shape=shape, size=fsdp * tensor)


def abstract_mesh(replica=1, fsdp=1, tensor=1):
    return jax.sharding.AbstractMesh((replica, fsdp, tensor), AXES)


def test_indivisible_dimensions_are_listed():
    model = abstract_model(TINY)
    with pytest.raises(ShardingError) as error:
        weight_shardings(model, abstract_mesh(tensor=4, fsdp=3))
    for line in (
        "embed_tokens: .*vocab .*tensor, 4, found 29",
        "k_proj: .*heads .*tensor, 4, found 2",
        "w_z: .*embed .*fsdp, 3, found 16",
    ):
        assert error.match(line)
    odd = dataclasses.replace(TINY, width=18, vocab=28, kv_heads=4, gate="last")
    with pytest.raises(ShardingError, match=r"width: .*tensor, 4, found 18"):
        weight_shardings(abstract_model(odd), abstract_mesh(tensor=4))
    with pytest.raises(ShardingError, match=r"multiple of 12 .*found 18"):
        check_batch(abstract_mesh(fsdp=2, replica=3), 18, 2)
    check_batch(abstract_mesh(fsdp=2, replica=3), 24, 2)


def test_one_device_forms_a_mesh():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 1, "tensor": 1}
    assert {axis_type.name for axis_type in mesh.axis_types} == {"Explicit"}


# (topology, tensor). In the first six, the sequences of a process are not consecutive.
SLICES = [
    ("v5p:2x2x2", 1), ("v5p:2x2x2", 2), ("v5p:2x4x4", 4), ("v4:2x2x2", 1), ("v4:2x2x4", 2), ("v6e:4x4", 1),
    ("v6e:4x4", 4), ("v5e:4x4", 8), ("tpu7x:2x2x2", 2),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "tensor"), SLICES)
@pytest.mark.parametrize("replica", [1, 2])
def test_processes_have_their_devices_sequences(topology, tensor, replica):
    """Together the processes read the whole batch, and the devices of a group have the same sequences."""
    devices = topology_devices(topology)
    mesh = make_mesh(MeshConfig(replica, 0, tensor), devices)
    groups, size = mesh.size // tensor, 2 * mesh.size // tensor
    sharding = batch_sharding(mesh)
    indices = {p: local_batch_indices(sharding, size, p) for p in {device.process_index for device in devices}}
    assert set(np.concatenate([*indices.values()]).tolist()) == set(range(size))
    for group, members in enumerate(mesh.devices.reshape(groups, tensor)):
        for device in members:
            (index,) = sharding.devices_indices_map((size,))[device]
            local = indices[device.process_index]
            assert local[device_slice(index, local)].tolist() == [2 * group, 2 * group + 1]


def test_some_processes_have_scattered_sequences():
    """Otherwise the test above would not cover them."""
    for topology, tensor in SLICES[:6]:
        sharding = batch_sharding(make_mesh(MeshConfig(tensor=tensor), topology_devices(topology)))
        assert np.any(np.diff(local_batch_indices(sharding, 64, process=0)) > 1)


def test_sequences_of_other_processes_are_refused():
    indices = np.array([0, 1, 4, 5])
    assert device_slice(slice(4, 6), indices) == slice(2, 4)
    for index in (slice(2, 4), slice(4, 7), slice(1, 3)):
        with pytest.raises(ValueError, match="expected sequences"):
            device_slice(index, indices)


def test_placed_batch_is_the_global_batch():
    sharding = batch_sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    batch, indices = {"tokens": np.arange(12).reshape(4, 3)}, local_batch_indices(sharding, 4)
    assert indices.tolist() == [0, 1, 2, 3]
    placed = place_batch(batch, sharding, indices, 4)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert placed.sharding == sharding


@pytest.mark.slow
def test_steps_do_not_depend_on_the_mesh():
    """In float64: both phases, several meshes of eight devices, weights gathered once per step or at each use."""
    environment = several_devices(8)
    command = [sys.executable, "-m", "tests.helpers.mesh_steps", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert len(gaps) == 5 and all(gap < 1e-12 for gap in gaps.values()), gaps
    assert any(gap > 0 for gap in gaps.values())
