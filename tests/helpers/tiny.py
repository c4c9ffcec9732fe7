"""Small models, token batches and compiled functions that the tests share.

Models have JAX's default float type: float64 in a test that uses the `float64` fixture, else float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from configs import base
from melt_jax import LoopedTransformer, ModelConfig, run_sequence, to_hf_tensors
from melt_jax.config import AlignmentConfig, OptimizerConfig, PhaseConfig, TransitionConfig, freeze
from melt_jax.data.batch import Batch
from melt_jax.model.model import abstract_model, reconfigure
from melt_jax.model.sequence import SequenceOutput
from melt_jax.training.step import OBJECTIVES, Objective

TINY = ModelConfig(
    vocab=29,
    width=16,
    layers=2,
    loops=3,
    heads=4,
    kv_heads=2,
    head_width=6,
    feed_forward=20,
    gate="elementwise",
    attention_block=3,
)

OPTIMIZER = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
TRANSITION = TransitionConfig(
    steps=4, learning_rate=1e-3, gate_learning_rate=1e-2, warmup_steps=0, final_fraction=0.1, ramp=1.0
)
ALIGNMENT = AlignmentConfig(
    steps=4,
    learning_rate=1e-3,
    gate_learning_rate=1e-2,
    warmup_steps=0,
    final_fraction=0.1,
    beta=0.1,
    reduction="sum",
)

jit_run = jax.jit(run_sequence, static_argnames="chunk_size")


def run(*args, **kwargs) -> SequenceOutput:
    """`run_sequence`, compiled, with NumPy arrays as results."""
    return jax.device_get(jit_run(*args, **kwargs))


def make_model(config: ModelConfig = TINY, seed: int = 0) -> LoopedTransformer:
    """A random model: gates and attention are uneven, no norm weight is one and no bias is zero."""
    return _random_model(config, seed, jnp.zeros(()).dtype.name)


@functools.cache
def _random_model(config, seed, dtype):
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_model(config))
    rng = np.random.default_rng(seed)
    noise = [0.3 * rng.standard_normal(leaf.shape, np.float32) for _, leaf in leaves]
    weights = [jnp.asarray(x + ("norm" in keystr(path)), dtype) for x, (path, _) in zip(noise, leaves)]
    return jax.tree.unflatten(structure, weights)


def looplm(model: LoopedTransformer) -> LoopedTransformer:
    """The LoopLM inside a MELT: the same weights without gates."""
    return reconfigure(model, gate="none")


def numpy_tensors(model: LoopedTransformer) -> dict[str, np.ndarray]:
    """{published name: float64 array (out, in)}."""
    return {name: np.asarray(tensor, np.float64) for name, tensor in to_hf_tensors(model).items()}


def random_tokens(batch: int, length: int, seed: int = 0, vocab: int = TINY.vocab) -> np.ndarray:
    """[batch, length] int32."""
    return np.random.default_rng(seed).integers(vocab, size=(batch, length), dtype=np.int32)


def packed_segments(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """[batch, length] int32: three consecutive documents, then padding."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        end = length - int(rng.integers(1, max(2, length // 5)))
        cuts = np.sort(rng.choice(np.arange(1, end), size=2, replace=False))
        row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return segments


def random_batch(batch: int, length: int, seed: int = 0, packed: bool = True) -> Batch:
    """A `Batch` in which about two thirds of the tokens are scored, but no padding."""
    rng = np.random.default_rng(seed)
    segments = packed_segments(batch, length, seed) if packed else np.ones((batch, length), np.int32)
    mask = ((rng.random((batch, length)) < 0.66) & (segments != 0)).astype(np.int32)
    return Batch(random_tokens(batch, length, seed), segments, mask, random_tokens(batch, length, seed + 1))


def objective(name: str, phase: PhaseConfig, chunk_size: int) -> Objective:
    """The objective of a phase, with the base configuration's other keys."""
    config = base.get_config()
    config.teacher = "unused"
    return OBJECTIVES[name](dataclasses.replace(freeze(config), chunk_size=chunk_size, **{name: phase}))
