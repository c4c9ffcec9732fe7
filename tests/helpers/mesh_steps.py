"""Compares steps on meshes of eight CPU devices with the same step on one device, in float64.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m tests.helpers.mesh_steps

Prints the largest relative difference of any metric or optimizer moment; the moments contain the gradients. --quick
compares fewer meshes, --json also prints JSON.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from melt_jax.config import MeshConfig, ModelConfig
from melt_jax.sharding import batch_sharding, local_batch_indices, make_mesh, place_batch, place_weights
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.step import init_state, make_train_step
from tests.helpers.tiny import ALIGNMENT, OPTIMIZER, TINY, TRANSITION, make_model, objective, random_batch

CONFIG = dataclasses.replace(TINY, vocab=32, heads=8, kv_heads=8, feed_forward=24, loops=2, remat="products",
                             attention_block=4)  # fmt: skip
# Chunks longer than W + 1 and two sweeps: all kinds of entries are read.
WINDOW = dataclasses.replace(CONFIG, window=1, sweeps=2)
PHASES = {"transition": TRANSITION, "alignment": dataclasses.replace(ALIGNMENT, reduction="relative")}
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
QUICK = {"transition": ("mixed",), "alignment": ("fsdp",)}
BATCH, LENGTH, CHUNK = 16, 12, 5


def one_step(
    phase: str,
    mesh: jax.sharding.Mesh,
    gather: str,
    parts: int,
    config: ModelConfig = CONFIG,
    dtype: str = "float64",
    noise: float = 0.0,
) -> dict[str, np.ndarray]:
    """{name: array}: metrics and moments after one step from the middle of a phase.

    With `noise`, each weight of student and teacher is first changed by a random part of itself, at most that large.
    Weights are left out: Adam's first update is ± the learning rate for any gradient other than zero, even for one
    that is only rounding error.
    """
    student, teacher = make_model(config), make_model(dataclasses.replace(config, gate="none"), 1)
    random = np.random.default_rng(0)
    vary = lambda x: x * (1 + noise * random.uniform(-1, 1, x.shape)).astype(x.dtype)
    student, teacher = jax.tree.map(vary, (student, teacher))
    optimizer = make_optimizer(PHASES[phase], OPTIMIZER, student)
    step = make_train_step(objective(phase, PHASES[phase], CHUNK), optimizer, parts, dtype, gather)
    student, batch = jax.tree.map(jnp.copy, student), random_batch(BATCH, LENGTH)  # `init_state` donates the weights
    with jax.set_mesh(mesh):
        sharding = batch_sharding(mesh)
        rows = local_batch_indices(sharding, BATCH)
        batch = place_batch(jax.tree.map(lambda x: x[rows], batch), sharding, rows, BATCH)
        state = init_state(place_weights(student, mesh), optimizer)
        state = state._replace(step=state.step + PHASES[phase].steps // 2)
        state, metrics = step(state, place_weights(teacher, mesh), batch)
    leaves = jax.tree_util.tree_leaves_with_path({"metrics": metrics, "moments": state.opt_state})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def gap(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest `relative` difference of any array; nan if a number is not finite."""
    return float(np.max([relative(got[name], x) for name, x in want.items()]))  # Python's max may drop a nan


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of two arrays, relative to the largest number wanted; nan if a number is not finite."""
    if not (np.all(np.isfinite(found)) and np.all(np.isfinite(wanted))):
        return float("nan")
    return float(np.max(np.abs(found - wanted)) / max(np.max(np.abs(wanted)), 1e-30))


def variant_gap(phase: str, config: ModelConfig, **changes: str) -> float:
    """The gap between a mesh that splits everything and one device; `changes` of the config apply to the mesh only."""
    mixed, one = make_mesh(MeshConfig(2, 2, 2)), make_mesh(MeshConfig(), jax.devices()[:1])
    changed = dataclasses.replace(config, **changes)
    return gap(one_step(phase, mixed, "step", 2, changed), one_step(phase, one, "step", 1, config))


def main():
    """Prints a line for each phase and mesh."""
    jax.config.update("jax_enable_x64", True)
    gaps = {}
    for phase in PHASES:
        want = one_step(phase, make_mesh(MeshConfig(), jax.devices()[:1]), "step", 1)
        for name in QUICK[phase] if "--quick" in sys.argv else MESHES:
            shape = MESHES[name]
            gaps[f"{phase}, {name}"] = gap(one_step(phase, make_mesh(MeshConfig(*shape)), "step", 2), want)
        if phase == "alignment":
            tensor = make_mesh(MeshConfig(*MESHES["tensor"]))
            gaps["alignment, one sequence at a time"] = gap(one_step(phase, tensor, "step", BATCH), want)
        if phase == "alignment" or "--quick" not in sys.argv:
            gaps[f"{phase}, gathered at use"] = gap(one_step(phase, make_mesh(MeshConfig(2, 2, 2)), "layer", 2), want)
    scalar = dataclasses.replace(WINDOW, gate="scalar")
    gaps["alignment, window, scalar gate"] = variant_gap("alignment", scalar)
    if "--quick" not in sys.argv:
        gaps["transition, window"] = variant_gap("transition", WINDOW)
        # Minutes: the kernel is interpreted.
        gaps["transition, window, kernel"] = variant_gap("transition", WINDOW, attention="pallas")
    for name, value in gaps.items():
        print(f"{name:<32} {value:.1e}")
    if "--json" in sys.argv:
        print(json.dumps(gaps))


if __name__ == "__main__":
    main()
