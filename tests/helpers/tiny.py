"""Small models, token batches and compiled functions that the tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from melt_jax import ModelConfig, init_model, run_sequence, to_hf_tensors
from melt_jax.data.batch import Batch

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

jit_run = jax.jit(run_sequence, static_argnames=("chunk_size", "loops"))


def run(*args, **kwargs):
    """`run_sequence`, compiled; its arrays are numpy's, whose slices need no compilation."""
    return jax.device_get(jit_run(*args, **kwargs))


@functools.cache
def make_model(config=TINY, seed=0):
    """Random float32 weights: gates open unevenly, attention is not flat, no norm is one and no bias zero."""
    abstract = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    rng = np.random.default_rng(seed)
    noise = [0.3 * rng.standard_normal(leaf.shape, np.float32) for _, leaf in leaves]
    weights = [jnp.asarray(x + ("norm" in keystr(path))) for x, (path, _) in zip(noise, leaves)]
    return jax.tree.unflatten(structure, weights)


def with_config(model, config):
    """The weights of `model` that a model of another gate has, as that model."""
    abstract = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    paths = lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0]
    weights = {keystr(path): leaf for path, leaf in paths(model)}
    kept = [weights[keystr(path)] for path, _ in paths(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), kept)


def numpy_tensors(model):
    """{published name: float64 array (out, in)}."""
    return {name: np.asarray(tensor, np.float64) for name, tensor in to_hf_tensors(model).items()}


def random_tokens(batch, length, seed=0, vocab=TINY.vocab):
    """[batch, length] int32."""
    return np.random.default_rng(seed).integers(vocab, size=(batch, length), dtype=np.int32)


def packed_segments(batch, length, seed=0):
    """[batch, length] int32: documents of random lengths side by side, then padding."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        end = length - int(rng.integers(1, max(2, length // 5)))
        cuts = np.sort(rng.choice(np.arange(1, end), size=2, replace=False))
        row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return segments


def random_batch(batch, length, seed=0, packed=True):
    """A `Batch` with about two thirds of its tokens scored, none of them padding."""
    rng = np.random.default_rng(seed)
    segments = packed_segments(batch, length, seed) if packed else np.ones((batch, length), np.int32)
    mask = ((rng.random((batch, length)) < 0.66) & (segments != 0)).astype(np.int32)
    return Batch(random_tokens(batch, length, seed), segments, mask, random_tokens(batch, length, seed + 1))
