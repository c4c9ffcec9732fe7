"""The looped transformer: LoopLM and MELT are one model with two ways to keep rows."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from melt_jax.model.layers import DecoderLayer
from melt_jax.model.layout import einsum, split_features, token_sharding


class Initializer:
    """Makes the weights that modules declare.

    Each call states a weight once: its shape, a logical axis name for every dimension, its initial values.
    Initialisation, shardings and what a checkpoint must hold all follow from these declarations.
    """

    def __init__(self, key, std=0.02, dtype=jnp.float32, stack=(), embedding_std=None):
        """`stack` is prepended to every shape: ((length, axis name), …)."""
        self.key, self.std, self.dtype, self.stack = key, std, dtype, stack
        self.embedding_std = std if embedding_std is None else embedding_std
        self.declared = 0

    def stacked(self, length, axis):
        """An initializer of `length` copies of each weight, along a new leading axis of that name."""
        self.declared += 1
        key = jax.random.fold_in(self.key, self.declared)
        return Initializer(key, self.std, self.dtype, ((length, axis), *self.stack))

    def normal(self, shape, axes, std=None):
        """Normal with the standard deviation `std`, by default the initializer's."""
        self.declared += 1
        key = jax.random.fold_in(self.key, self.declared)
        std = self.std if std is None else std
        return self._declare(lambda full: std * jax.random.normal(key, full, self.dtype), shape, axes)

    def ones(self, shape, axes):
        """Ones: the scale of a norm."""
        return self._declare(lambda full: jnp.ones(full, self.dtype), shape, axes)

    def zeros(self, shape, axes):
        """Zeros: a bias."""
        return self._declare(lambda full: jnp.zeros(full, self.dtype), shape, axes)

    def _declare(self, make, shape, axes):
        if len(shape) != len(axes):
            raise ValueError(f"a weight of shape {shape} needs {len(shape)} logical axes, got {axes}")
        shape = (*(n for n, _ in self.stack), *shape)
        axes = (*(name for _, name in self.stack), *axes)
        return nnx.Param(make(shape), axes=axes)


class ExitGate(nnx.Module):
    """λ = σ(w·x + b), the probability of leaving after a loop."""

    def __init__(self, config, init):
        self.weight = init.normal((config.width,), ("norm",))
        self.bias = init.zeros((1,), (None,))


class LoopedTransformer(nnx.Module):
    """A LoopLM (`config.gate == "none"`) or a MELT model; a pytree of weights, run by `run_chunk` and `run_sequence`.

    Attributes:
      embed_tokens: [V, D].
      layers: `DecoderLayer` stacked over L.
      norm: [D]; closes every loop.
      early_exit_gate: `ExitGate`.
      lm_head: [D, V], or None when tied to the embedding.
    """

    def __init__(self, config, init):
        self.config = config
        self.embed_tokens = init.normal((config.vocab, config.width), ("vocab", "embed"), init.embedding_std)
        self.layers = DecoderLayer(config, init.stacked(config.layers, "layers"))
        self.norm = init.ones((config.width,), ("norm",))
        self.early_exit_gate = ExitGate(config, init)
        self.lm_head = None if config.tied else init.normal((config.width, config.vocab), ("embed", "vocab"))

    @property
    def dtype(self):
        """The dtype of the weights, which is that of the activations and rows."""
        return self.embed_tokens.get_value().dtype

    def embed(self, tokens):
        """x⁰ = embed[token], unscaled: [B, C] → [B, C, D]."""
        table, sharding = self.embed_tokens[...], token_sharding(tokens[..., None])
        if jax.typeof(table).sharding.spec[0] is None:
            return table.at[tokens].get(out_sharding=sharding)
        # A vocabulary split over devices cannot be indexed; a product with one-hot rows adds up the pieces.
        one_hot = split_features(tokens[..., None] == jnp.arange(len(table)))
        return einsum("bcv,vd->bcd", one_hot.astype(table.dtype), table, out_sharding=sharding)

    def logits(self, hidden):
        """Next-token logits, float32: [..., D] → [..., V]."""
        if self.lm_head is None:
            return einsum("...d,vd->...v", hidden, self.embed_tokens[...], preferred_element_type=jnp.float32)
        return einsum("...d,dv->...v", hidden, self.lm_head[...], preferred_element_type=jnp.float32)

    def exit_pdf(self, hidden):
        """The probability that each loop is the last, float32: [T, B, S, D] → [B, S, T].

        pₜ = λₜ Πₛ<ₜ(1 − λₛ) for t < T; p_T takes the rest.
        """
        gate = self.early_exit_gate
        exact = einsum("tbsd,d->bst", hidden.astype(jnp.float32), gate.weight[...].astype(jnp.float32))
        leave = jax.nn.sigmoid(exact + gate.bias[...].astype(jnp.float32))
        stay = jnp.cumprod(1 - leave, axis=-1)
        before = jnp.concatenate([jnp.ones_like(stay[..., :1]), stay[..., :-1]], axis=-1)
        return jnp.concatenate([(before * leave)[..., :-1], before[..., -1:]], axis=-1)


def exit_loop(pdf, threshold):
    """The first loop (counted from 0) whose cumulative probability reaches the threshold: [..., T] → [...] int32.

    A threshold of 1 or more is the last loop, whatever rounding makes of the sum.
    """
    reached = jnp.cumsum(pdf, axis=-1)[..., :-1] >= threshold
    last = pdf.shape[-1] - 1
    if threshold >= 1:
        return jnp.full(pdf.shape[:-1], last, jnp.int32)
    return jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), last).astype(jnp.int32)


def init_model(config, key, std=0.02, dtype=jnp.float32, embedding_std=None):
    """A model with fresh weights: normal with `std` (embeddings with `embedding_std`), norms one, biases zero."""
    return LoopedTransformer(config, Initializer(key, std, dtype, embedding_std=embedding_std))


def abstract_model(config, dtype="float32"):
    """The model of a config with shapes and dtypes in place of weights."""
    return jax.eval_shape(lambda: init_model(config, jax.random.key(0), dtype=jnp.dtype(dtype)))


def module_leaves(model):
    """[(path, weight)] of a model, or of a gradient of one; a path is attribute names joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(".".join(key.name for key in path[:-1]), leaf) for path, leaf in leaves]


def init_weights(config, key, paths, std=0.02, dtype=jnp.float32):
    """{path: array} of some of the weights that `init_model` draws from that key; the others are not drawn."""
    draw = jax.jit(
        lambda key: dict(entry for entry in module_leaves(init_model(config, key, std, dtype)) if entry[0] in paths)
    )
    return draw(key) if paths else {}


def reconfigure(model, key=None, gate_std=0.02, **changes):
    """The model with some fields of its config changed.

    Weights that the changed model has too are kept. Gate weights that it adds are fresh: normal with `gate_std`, biases
    zero, from `key`; gates that it no longer has are dropped. So `reconfigure(looplm, key, gate="elementwise")` makes a
    MELT.

    Raises:
      ValueError: the changed model has other weights than gates that this one lacks, or other shapes; or no key is
        given where gates are to be drawn.
    """
    config = dataclasses.replace(model.config, **changes)
    abstract = abstract_model(config, model.dtype)
    old, wanted = dict(module_leaves(model)), dict(module_leaves(abstract))
    missing = {path for path in wanted if path not in old}
    wrong = [f"{path}: missing" for path in sorted(missing) if ".kv_gate." not in path]
    wrong += [
        f"{path}: expected {leaf.shape}, found {old[path].shape}"
        for path, leaf in wanted.items()
        if path in old and old[path].shape != leaf.shape
    ]
    if wrong:
        raise ValueError(f"a model cannot be reconfigured with {changes}: " + "; ".join(wrong))
    if missing and key is None:
        raise ValueError(f"reconfiguring with {changes} adds gate weights: a key is needed to draw them")
    weights = old | init_weights(config, key, missing, gate_std, model.dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), [weights[path] for path in wanted])


def parameter_count(model):
    """The number of weights; 1 434 652 673 for Ouro-1.4B."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
