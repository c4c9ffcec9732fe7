"""Compares scores, likelihoods and generated tokens on a mesh of eight CPU devices with those of one, in float64.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python -m tests.helpers.mesh_scores

Prints the largest relative difference of any score as JSON. Under `MELT_COORDINATOR`, `MELT_PROCESSES` and
`MELT_PROCESS` the mesh spans several processes.
"""

import dataclasses
import json

import jax
import numpy as np

from melt_jax.config import MeshConfig
from melt_jax.inference import scoring
from melt_jax.inference.generation import GenerationOptions, generate
from melt_jax.inference.likelihood import Continuation, score_continuations
from melt_jax.sharding import for_inference, make_mesh, place_weights
from melt_jax.training.processes import initialize_distributed
from tests.helpers.tiny import TINY, looplm, make_model, random_batch

CONFIG = dataclasses.replace(TINY, vocab=32, heads=4, kv_heads=4, loops=2, layers=1)
MESH = MeshConfig(2, 2, 2)
REQUESTS = [Continuation([1, 2, 3], [4, 5]), Continuation([6], [7, 8, 9]), Continuation([5, 4, 3, 2], [1])]
BATCH, CHUNK, PROMPTS, OPTIONS = random_batch(6, 11), 4, [[1, 2, 3], [4, 5, 6, 7, 8]], GenerationOptions(4, 4)


def scores(model, teacher, rows):
    """The perplexities and KLs of all loops and the log-likelihoods of continuations, in one array."""
    found = scoring.perplexity_and_kl(model, teacher, BATCH, CHUNK, rows=rows)
    likelihoods = dict(score_continuations(model, REQUESTS, CHUNK, rows))
    answers = [likelihoods[i].log_probability for i in range(len(REQUESTS))]
    return np.array([*found.perplexity, *found.kl, found.final_kl, *answers])


def main():
    """Prints {how weights are gathered: the largest relative difference}."""
    initialize_distributed()
    jax.config.update("jax_enable_x64", True)
    model = make_model(CONFIG)
    teacher = looplm(make_model(CONFIG, 1))
    want, tokens = scores(model, teacher, 6), generate(model, PROMPTS, OPTIONS).tokens
    mesh, gaps = make_mesh(MESH), {}
    with jax.set_mesh(mesh):
        split = [place_weights(jax.tree.map(np.asarray, m), mesh) for m in (model, teacher)]
        whole = [for_inference(m, "float64") for m in split]
        assert generate(whole[0], PROMPTS, OPTIONS).tokens == tokens
        for name, models in (("gathered at use", split), ("gathered before", whole)):
            gaps[name] = float(np.max(np.abs(scores(*models, 4) / want - 1)))
    print(json.dumps(gaps))


if __name__ == "__main__":
    main()
