"""Selection of the loop whose logits count, and of tokens: greedy, or sampled with temperature, top-k and top-p."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from melt_jax.model.model import LoopedTransformer, exit_loop

TEMPERATURES = "0 (greedy) or 0.0001 to 10000"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is selected from logits. A pytree of numbers, so that other values need no new compilation.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k most likely tokens; 0 is no limit.
      top_p: keep the most likely tokens that together reach this probability, at least one; 1 is no limit.
      seed: token n of prompt i is drawn with a key that depends on (seed, i, n) only.
    """

    # Numbers, or arrays of them in compiled functions.
    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    seed: Any = 0

    def errors(self) -> list[str]:
        """An error for each value out of range."""
        checks = (
            ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e4, TEMPERATURES, self.temperature),
            ("top_k", 0 <= self.top_k < 2**31, "at least 0 (no limit), below 2³¹", self.top_k),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]", self.top_p),
            ("seed", 0 <= self.seed < 2**31, "in [0, 2³¹)", self.seed),
        )
        return [f"{name}: expected {expected}, found {value}" for name, ok, expected, value in checks if not ok]


GREEDY = Sampling()


class SamplingRequest(NamedTuple):
    """The inputs of token selection.

    Attributes:
      sampling: `Sampling` of arrays.
      indices: the index of each prompt, for its random key.
      stop: stop tokens; −1 is none.
      limit: largest number of new tokens per sequence.
    """

    sampling: Sampling
    indices: Int[Array, " B"]
    stop: Int[Array, " n"]
    limit: Int[Array, ""]


def select_logits(
    model: LoopedTransformer, hidden: Float[Array, "T B P D"]
) -> tuple[Float[Array, "B P V"], Int[Array, "B P"]]:
    """The logits of the loop that the exit gate selects by `exit_threshold`, and that loop, counted from 0.

    With `guidance` w they are moved away from those of loop 1 (LoopCD, arXiv 2610.02185, in logit space, without a
    plausibility filter). The head is linear and the final norm closes every loop, so guiding the normed hidden states
    would give the same.
    """
    at_exit, chosen = exit_hidden(model, hidden)
    logits = model.logits(at_exit)
    if model.config.guidance:
        # z_T + w (z_T − z₁)
        logits = logits + model.config.guidance * (logits - model.logits(hidden[0]))
    return logits, chosen


def exit_hidden(
    model: LoopedTransformer, hidden: Float[Array, "T B P D"]
) -> tuple[Float[Array, "B P D"], Int[Array, "B P"]]:
    """The hidden states of the loop that the exit gate selects by `exit_threshold`, and that loop, counted from 0."""
    chosen = exit_loop(model.exit_pdf(hidden), model.config.exit_threshold)
    # A masked sum instead of an index works on sequences that are split over devices.
    at_chosen = chosen[None, :, :, None] == jnp.arange(len(hidden))[:, None, None, None]
    return jnp.sum(jnp.where(at_chosen, hidden, 0), axis=0), chosen


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits divided by the temperature; −inf outside the top k, then outside the top p of the rest.

    Of two equally likely tokens the lower id ranks higher.
    """
    logits = logits / jnp.maximum(sampling.temperature, 1e-6)
    ids = jnp.arange(logits.shape[-1])[None]
    order = jnp.argsort(-logits, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    limit = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    ordered = jnp.take_along_axis(jnp.where(rank < limit, logits, -jnp.inf), order, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # Rounding in the sum must neither drop the first token nor, with top_p = 1, any other.
    keep = (before < sampling.top_p) | (sampling.top_p >= 1) | (ids == 0)
    ordered = jnp.where(keep, ordered, -jnp.inf)
    return jnp.take_along_axis(ordered, rank, axis=-1)


def sample_tokens(
    logits: Float[Array, "B V"], sampling: Sampling, indices: Int[Array, " B"], steps: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Selects a token for each prompt, given the prompt's index and the number of its earlier new tokens."""

    def draw(logits):
        root = jax.random.key(sampling.seed)
        keys = jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(root, i), n))(indices, steps)
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)

    def greedy(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    with jax.named_scope("sampling"):
        return jax.lax.cond(sampling.temperature > 0, draw, greedy, logits)
