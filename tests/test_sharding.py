"""On many devices a step is the one device's, and what does not fit the mesh is refused with its numbers."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from melt_jax.config import MeshConfig
from melt_jax.model.model import abstract_model
from melt_jax.sharding import AXES, ShardingError, check_batch, make_mesh, mesh_shape, partition, weight_shardings
from tests.helpers.tiny import TINY

ROOT = pathlib.Path(__file__).parent.parent


def test_a_mesh_takes_all_devices():
    shape = lambda devices, *factors: mesh_shape(MeshConfig(*factors), devices)
    assert shape(16, 2, 0, 4) == {"replica": (2, 1), "fsdp": (2, 1), "tensor": (4, 1)}
    assert shape(16, 1, 0, 2, 2, 2) == {"replica": (1, 2), "fsdp": (2, 2), "tensor": (2, 1)}
    refused = ((16, (3, 0, 1), "16.*= 3"), (8, (1, 2, 2), "8.*= 4"), (8, (0, 0, 1), "at most one"))
    for devices, factors, numbers in refused:
        with pytest.raises(ShardingError, match=numbers):
            shape(devices, *factors)


def test_rules_collide_or_are_unknown():
    assert partition(("layers", "embed", "heads", None)) == jax.P(None, "fsdp", "tensor", None)
    with pytest.raises(ShardingError, match=r"tensor can split one"):
        partition(("heads", "mlp"))
    with pytest.raises(ShardingError, match=r"found.*'head'"):
        partition(("head", "embed"))


def abstract_mesh(replica=1, fsdp=1, tensor=1):
    return jax.sharding.AbstractMesh((replica, fsdp, tensor), AXES)


def test_what_a_mesh_does_not_divide_is_listed():
    model = abstract_model(TINY)
    with pytest.raises(ShardingError) as error:
        weight_shardings(model, abstract_mesh(tensor=4, fsdp=3))
    for line in ("embed_tokens: vocab, 29,.*tensor, 4", "k_proj: heads, 2,.*tensor, 4", "w_z: embed, 16,.*fsdp, 3"):
        assert error.match(line)
    odd = dataclasses.replace(TINY, width=18, vocab=28, kv_heads=4, gate="last")
    with pytest.raises(ShardingError, match=r"width, 18,.*tensor, 4"):
        weight_shardings(abstract_model(odd), abstract_mesh(tensor=4))
    with pytest.raises(ShardingError, match=r"multiple of 12 .*found 18"):
        check_batch(abstract_mesh(fsdp=2, replica=3), 18, 2)
    check_batch(abstract_mesh(fsdp=2, replica=3), 24, 2)


def test_one_device_is_a_mesh():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 1, "tensor": 1}
    assert {axis_type.name for axis_type in mesh.axis_types} == {"Explicit"}


def test_steps_on_eight_devices_are_the_one_device_step():
    """In float64, for both phases, several meshes, and weights gathered once per step or at each use."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.helpers.mesh_steps", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert len(gaps) == 7 and all(gap < 1e-12 for gap in gaps.values()), gaps
    assert any(gap > 0 for gap in gaps.values())
