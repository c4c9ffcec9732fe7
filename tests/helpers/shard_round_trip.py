"""Saves and opens a model sharded over four devices; tests/test_convert.py runs it in its own process.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.helpers.shard_round_trip FOLDER
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from melt_jax.checkpoints.orbax import open_model, save_model
from melt_jax.model.model import module_leaves
from tests.helpers.tiny import TINY, make_model

# One layer and K = H: most weights have a dimension of 1.
CONFIG = dataclasses.replace(TINY, layers=1, kv_heads=4)
SPECS = {
    "embed_tokens": jax.P(None, "model"),
    "layers.q_proj": jax.P(None, "data", "model"),
    "layers.o_proj": jax.P(None, "model", None, None, "data"),
    "layers.up_proj": jax.P(None, "data", "model"),
    "layers.kv_gate.w_z": jax.P(None, None, ("data", "model")),
    "lm_head": jax.P("data"),
}


def main(folder: str) -> None:
    """Asserts that weights and shardings are restored."""
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    model = make_model(CONFIG)
    paths = [path for path, _ in module_leaves(model)]
    placed = [jax.sharding.NamedSharding(mesh, SPECS.get(path, jax.P())) for path in paths]
    shardings = jax.tree.unflatten(jax.tree.structure(model), placed)
    sharded = jax.tree.map(jax.device_put, model, shardings)
    for name, saved in (("sharded", sharded), ("whole", model)):
        save_model(f"{folder}/{name}", saved)
        opened = open_model(f"{folder}/{name}", shardings=shardings)
        for (path, weight), (_, expected), sharding in zip(
            module_leaves(opened), module_leaves(model), placed, strict=True
        ):
            assert weight.sharding == sharding, (name, path, weight.sharding, sharding)
            np.testing.assert_array_equal(weight, expected, err_msg=f"{name} {path}")
    assert any(1 in jnp.shape(weight) and not weight.is_fully_replicated for weight in jax.tree.leaves(opened))
    print("same weights, same shardings")


if __name__ == "__main__":
    main(sys.argv[1])
