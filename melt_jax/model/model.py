"""The looped transformer: a LoopLM and a MELT are the same model with different KV caches."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from melt_jax.config import InputError, ModelConfig, model_errors
from melt_jax.model.layers import DecoderLayer
from melt_jax.model.layout import einsum, split_features, token_sharding, upcast


class Initializer:
    """Creates the weights that modules declare.

    A weight is declared once: its shape, a logical axis name for each dimension, its initial values. Initialization,
    shardings and the contents of a checkpoint all follow from these declarations.
    """

    def __init__(
        self,
        key: Key[Array, ""],
        std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        stack: Sequence[tuple[int, str]] = (),
        embedding_std: float | None = None,
    ):
        """`stack` is prepended to every shape: ((length, axis name), …)."""
        self.key, self.std, self.dtype, self.stack = key, std, dtype, stack
        self.embedding_std = std if embedding_std is None else embedding_std
        self.declared = 0

    def stacked(self, length: int, axis: str) -> "Initializer":
        """An initializer that stacks `length` of each weight along a new leading axis called `axis`."""
        self.declared += 1
        key = jax.random.fold_in(self.key, self.declared)
        return Initializer(key, self.std, self.dtype, ((length, axis), *self.stack))

    def normal(self, shape: Sequence[int], axes: Sequence[str | None], std: float | None = None) -> nnx.Param:
        """A weight drawn from a normal with standard deviation `std`, by default the initializer's."""
        self.declared += 1
        key = jax.random.fold_in(self.key, self.declared)
        std = self.std if std is None else std
        return self._declare(lambda full: std * jax.random.normal(key, full, self.dtype), shape, axes)

    def ones(self, shape: Sequence[int], axes: Sequence[str | None]) -> nnx.Param:
        """A weight of ones: the scale of a norm."""
        return self._declare(lambda full: jnp.ones(full, self.dtype), shape, axes)

    def zeros(self, shape: Sequence[int], axes: Sequence[str | None]) -> nnx.Param:
        """A weight of zeros: a bias."""
        return self._declare(lambda full: jnp.zeros(full, self.dtype), shape, axes)

    def _declare(self, make: Callable[[Sequence[int]], Any], shape, axes) -> nnx.Param:
        if len(shape) != len(axes):
            raise ValueError(f"logical axes: expected {len(shape)} for a weight of shape {shape}, found {axes}")
        shape = (*(n for n, _ in self.stack), *shape)
        axes = (*(name for _, name in self.stack), *axes)
        return nnx.Param(make(shape), axes=axes)


class ExitGate(nnx.Module):
    """λ = σ(w·x + b), the probability of exiting after a loop."""

    def __init__(self, config: ModelConfig, init: Initializer):
        self.weight = init.normal((config.width,), ("norm",))
        self.bias = init.zeros((1,), (None,))


class LoopedTransformer(nnx.Module):
    """A LoopLM (`config.gate == "none"`) or a MELT: a pytree of weights that `run_chunk` and `run_sequence` run.

    Attributes:
      embed_tokens: [V, D].
      layers: `DecoderLayer` stacked over L.
      norm: [D]; closes every loop.
      early_exit_gate: `ExitGate`.
      lm_head: [D, V], or None when tied to the embedding.
      layer_sums: `GradientSums` that receive the gradients of the layers' weights, or None.
    """

    def __init__(self, config: ModelConfig, init: Initializer):
        self.config = config
        self.embed_tokens = init.normal((config.vocab, config.width), ("vocab", "embed"), init.embedding_std)
        self.layers = DecoderLayer(config, init.stacked(config.layers, "layers"))
        self.norm = init.ones((config.width,), ("norm",))
        self.early_exit_gate = ExitGate(config, init)
        self.lm_head = None if config.tied else init.normal((config.width, config.vocab), ("embed", "vocab"))
        self.layer_sums = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weights, activations and KV entries."""
        return self.embed_tokens.get_value().dtype

    def embed(self, tokens: Int[Array, "B C"]) -> Float[Array, "B C D"]:
        """x⁰ = embed[token], unscaled."""
        with jax.named_scope("embedding"):
            return self._embed(tokens)

    def _embed(self, tokens):
        table, sharding = self.embed_tokens[...], token_sharding(tokens[..., None])
        if jax.typeof(table).sharding.spec[0] is None:
            return table.at[tokens].get(out_sharding=sharding)
        # A vocabulary split over devices cannot be indexed; a product with one-hot vectors sums the pieces.
        one_hot = split_features(tokens[..., None] == jnp.arange(len(table))[None, None])
        return einsum("bcv,vd->bcd", one_hot.astype(table.dtype), table, out_sharding=sharding)

    def logits(self, hidden: Float[Array | np.ndarray, "*lead D"]) -> Float[Array, "*lead V"]:
        """Next-token logits, at least float32."""
        with jax.named_scope("head"):
            if self.lm_head is None:
                return einsum("...d,vd->...v", hidden, self.embed_tokens[...], accumulate=True)
            return einsum("...d,dv->...v", hidden, self.lm_head[...], accumulate=True)

    def exit_pdf(self, hidden: Float[Array | np.ndarray, "T B S D"]) -> Float[Array, "B S T"]:
        """The probability that each loop is the last one, at least float32 (arXiv 2510.25741).

        pₜ = λₜ Πₛ<ₜ(1 − λₛ) for t < T; p_T takes the rest.
        """
        gate = self.early_exit_gate
        score = einsum("tbsd,d->bst", upcast(hidden), upcast(gate.weight[...]))
        leave = jax.nn.sigmoid(score + upcast(gate.bias[...])[None, None])
        stay = jnp.cumprod(1 - leave, axis=-1)
        before = jnp.concatenate([jnp.ones_like(stay[..., :1]), stay[..., :-1]], axis=-1)
        return jnp.concatenate([(before * leave)[..., :-1], before[..., -1:]], axis=-1)


def exit_loop(pdf: Float[Array | np.ndarray, "*batch T"], threshold: float) -> Int[Array, "*batch"]:
    """The first loop, counted from 0, at which the sum of the exit distribution `pdf` reaches the threshold.

    A threshold of 1 or more gives the last loop, whatever the rounding error of the sum.
    """
    reached = jnp.cumsum(pdf, axis=-1)[..., :-1] >= threshold
    last = pdf.shape[-1] - 1
    if threshold >= 1:
        return jnp.full(pdf.shape[:-1], last, jnp.int32)
    return jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), last).astype(jnp.int32)


def init_model(
    config: ModelConfig,
    key: Key[Array, ""],
    std: float = 0.02,
    dtype: DTypeLike = jnp.float32,
    embedding_std: float | None = None,
) -> LoopedTransformer:
    """A model with new weights: normal with `std` (embeddings with `embedding_std`), norms one, biases zero."""
    return LoopedTransformer(config, Initializer(key, std, dtype, embedding_std=embedding_std))


def abstract_model(config: ModelConfig, dtype: DTypeLike = "float32") -> LoopedTransformer:
    """The model of a config with shapes and dtypes in place of weights."""
    return jax.eval_shape(lambda: init_model(config, jax.random.key(0), dtype=dtype))


def module_leaves(model: nnx.Module) -> list[tuple[str, Any]]:
    """[(path, weight)] of a model, or of a gradient of one; a path is attribute names joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return [(".".join(key.name for key in path[:-1]), leaf) for path, leaf in leaves]


def init_weights(
    config: ModelConfig,
    key: Key[Array, ""],
    paths: Collection[str],
    std: float = 0.02,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Shaped[Array, "..."]]:
    """{path: array}: the weights at `paths` as `init_model` draws them from that key, without drawing the others."""

    @jax.jit
    def draw(key):
        return {path: leaf for path, leaf in module_leaves(init_model(config, key, std, dtype)) if path in paths}

    return draw(key) if paths else {}


def reconfigure(
    model: LoopedTransformer, key: Key[Array, ""] | None = None, gate_std: float = 0.02, **changes: Any
) -> LoopedTransformer:
    """The model with some fields of its config changed, e.g. `loops`, `exit_threshold` or `gate`.

    The changed model keeps the weights that both models have and drops gates that it no longer has. Gates that it
    adds are drawn from `key`: normal with `gate_std`, biases zero. So `reconfigure(looplm, key, gate="elementwise")`
    turns a LoopLM into a MELT.

    Raises:
      InputError: lists every invalid value and every missing or wrongly shaped weight, gates aside; or gates are added
        without a key.
    """
    config = dataclasses.replace(model.config, **changes)
    if errors := model_errors(config):
        raise InputError("; ".join(errors))
    abstract = abstract_model(config, model.dtype)
    old, wanted = dict(module_leaves(model)), dict(module_leaves(abstract))
    missing = {path for path in wanted if path not in old}
    errors = [f"{path}: expected a weight, found none" for path in sorted(missing) if ".kv_gate." not in path]
    errors += [
        f"{path}: expected {leaf.shape}, found {old[path].shape}"
        for path, leaf in wanted.items()
        if path in old and old[path].shape != leaf.shape
    ]
    if errors:
        raise InputError(f"the weights do not fit a model with {changes}: " + "; ".join(errors))
    weights = old
    if missing:
        if key is None:
            raise InputError(f"key: expected a key to draw the gates that {changes} adds, found none")
        weights = old | init_weights(config, key, missing, gate_std, model.dtype)
    return jax.tree.unflatten(jax.tree.structure(abstract), [weights[path] for path in wanted])


def without_kernel(model: LoopedTransformer) -> LoopedTransformer:
    """The model with "blocks" attention. On a mesh the kernel needs sequences that are split; prompts are not."""
    model = jax.tree.map(lambda x: x, model)  # a copy that shares all weights
    model.config = dataclasses.replace(model.config, attention="blocks")
    return model


def split_layers(model: LoopedTransformer) -> tuple[DecoderLayer, LoopedTransformer]:
    """Returns (the layers, the model without them)."""
    others = jax.tree.map(lambda x: x, model)
    others.layers = nnx.List()  # pyright: ignore[reportAttributeAccessIssue]
    return model.layers, others


def join_layers(layers: DecoderLayer, others: LoopedTransformer, layer_sums: Any = None) -> LoopedTransformer:
    """The inverse of `split_layers`. With `layer_sums`, the backward pass adds the layers' gradients to them."""
    model = jax.tree.map(lambda x: x, others)
    model.layers, model.layer_sums = layers, layer_sums
    return model


def unstack(model: LoopedTransformer) -> LoopedTransformer:
    """The model with a list of layers in place of stacked weights; `run_chunk` then has no scan over layers.

    Before a CPU multiplies with a slice of stacked weights, it copies the slice, in every layer and loop. With a list
    it reads each weight where it is, which matters in decoding: a token needs all weights for few products.
    Compilation takes longer.
    """
    layers = [jax.tree.map(itemgetter(i), model.layers) for i in range(model.config.layers)]
    model = jax.tree.map(lambda x: x, model)  # a copy that shares all weights
    model.layers = nnx.List(layers)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def is_unstacked(model: LoopedTransformer) -> bool:
    """Whether `unstack` has made this model."""
    return isinstance(model.layers, nnx.List)


def parameter_count(model: nnx.Module) -> int:
    """The number of weights; 1 434 652 673 for Ouro-1.4B."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
