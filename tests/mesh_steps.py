"""Compares steps on meshes of eight CPU devices with the same step on one device; run by test_sharding.py.

    python -m tests.mesh_steps
"""

import dataclasses
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
import jax.numpy as jnp

from melt_jax.config import MeshConfig
from melt_jax.sharding import batch_sharding, local_rows, make_mesh, place_batch, place_weights
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.step import init_state, make_train_step, phase_objective
from tests.test_training import ALIGNMENT, OPTIMIZER, TRANSITION
from tests.tiny import TINY, make_model, random_batch

CONFIG = dataclasses.replace(TINY, vocab=32, width=16, heads=8, kv_heads=8, feed_forward=24, loops=2)
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2), "mixed, layer by layer": (2, 2, 2)}


def one_step(name, phase, mesh=None, gather="step", parts=1):
    """The state and metrics after one step."""
    remat = "layer" if gather == "layer" else "none"
    student = make_model(dataclasses.replace(CONFIG, remat=remat))
    teacher = make_model(dataclasses.replace(CONFIG, gate="none"), 1)
    batch = random_batch(16, 12)
    batch = batch._replace(tokens=batch.tokens % CONFIG.vocab)
    optimizer = make_optimizer(phase, OPTIMIZER, student)
    step = make_train_step(phase_objective(name, phase, 5), optimizer, parts, gather=gather)
    if mesh is None:
        return jax.device_get(step(init_state(student, optimizer), teacher, batch))
    with jax.set_mesh(mesh):
        sharding = batch_sharding(mesh)
        rows = local_rows(sharding, 16)
        batch = place_batch(batch, sharding, rows, 16)
        state = init_state(place_weights(student, mesh), optimizer)
        return jax.device_get(step(state, place_weights(teacher, mesh), batch))


def main():
    for name, phase in (("transition", TRANSITION), ("alignment", ALIGNMENT)):
        want, want_metrics = one_step(name, phase)
        for label, shape in MESHES.items():
            mesh = make_mesh(MeshConfig(*shape))
            got, metrics = one_step(name, phase, mesh, "layer" if "layer" in label else "step", parts=2)
            pairs = zip(jax.tree.leaves((got.opt_state, metrics)), jax.tree.leaves((want.opt_state, want_metrics)), strict=True)
            gaps = [np.max(np.abs(a - b)) / (np.max(np.abs(b)) + 1e-9) for a, b in pairs]
            print(name, label, max(gaps), flush=True)


if __name__ == "__main__":
    main()
