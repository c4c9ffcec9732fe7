"""One training step: gradients of a batch in micro-batches, one update, metrics as (sum, count) pairs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from melt_jax.config import TrainConfig
from melt_jax.data.batch import Batch
from melt_jax.model.layout import accumulation_dtype
from melt_jax.model.model import LoopedTransformer
from melt_jax.sharding import (
    add_groups,
    batch_groups,
    gather_at_use,
    gather_weights,
    group_batch,
    in_mesh,
    ungroup_batch,
)
from melt_jax.training.log import NOT_FINITE
from melt_jax.training.objectives import (
    Distillation,
    Sums,
    distillation_sums,
    distillation_terms,
    normalize,
    pretraining_loss,
    pretraining_sums,
    scored_tokens,
    sum_terms,
    warm_start_sums,
)
from melt_jax.training.optimizer import group_norms

Metrics = dict[str, tuple[Array, Array]]  # {name: (sum, count)}


class TrainState(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
      params: the model, with float32 weights.
      opt_state: the optimizer's moments.
      step: steps of the phase so far.
      skipped: consecutive skipped steps up to the last one.
    """

    params: LoopedTransformer
    opt_state: optax.OptState
    step: Int[Array, ""]
    skipped: Int[Array, ""]


class Objective(NamedTuple):
    """The function that a phase minimizes: the sum of the terms of the normalized sums.

    Attributes:
      sums: `(weights, teacher, batch, step, perturbation) → sums over scored tokens`.
      terms: `metrics → {name: scalar}`, of sums or of means per scored token; each is linear.
    """

    sums: Callable[[LoopedTransformer, LoopedTransformer | None, Batch, Int[Array, ""], Any], Sums]
    terms: Callable[[Sums], dict[str, Float[Array, ""]]]


def init_state(params: LoopedTransformer, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before a phase's first step. The weights are donated."""

    @functools.partial(jax.jit, donate_argnums=0)  # compiled, so that every leaf, even a scalar, is on the mesh
    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, zero)

    return init(params)


def transition_alpha(step: Int[Array, ""] | int, steps: int, ramp: float) -> Float[Array, ""]:
    """α of a step, counted from 0: it rises linearly from 0 at the first step to 1, then stays 1.

    α is 1 from step ramp · (steps − 1) on; with ramp 1, at the phase's last step only.
    """
    return jnp.clip(step / max(ramp * (steps - 1), 1.0), 0.0, 1.0)


def pretraining_objective(config: TrainConfig) -> Objective:
    """Ouro's objective (arXiv 2510.25741)."""

    def sums(weights, teacher, batch, step, perturbation):
        return pretraining_sums(weights, batch, config.chunk_size, perturbation)

    def terms(metrics):
        return {"pretraining": pretraining_loss(metrics, config.pretraining.entropy_bonus)}

    return Objective(sums, terms)


def warm_start_objective(config: TrainConfig) -> Objective:
    """L_align of the gates alone, with the teacher's stream as the input of each layer."""

    def sums(weights, teacher, batch, step, perturbation):
        return warm_start_sums(weights, teacher, batch, config.chunk_size, perturbation)

    def terms(metrics):
        return {"alignment": jnp.mean(metrics["alignment"])}

    return Objective(sums, terms)


def transition_objective(config: TrainConfig) -> Objective:
    """Phase 1 of MELT (arXiv 2605.07721): L_KD, with entries blended by the α of the step."""
    phase, settings = config.transition, distillation_settings(config)

    def sums(weights, teacher, batch, step, perturbation):
        alpha = transition_alpha(step, phase.steps, phase.ramp)
        return distillation_sums(weights, teacher, batch, settings, alpha, perturbation)

    return Objective(sums, functools.partial(distillation_terms, loops=config.distillation.loops))


def alignment_objective(config: TrainConfig) -> Objective:
    """Phase 2 of MELT (arXiv 2605.07721): L_KD + β·L_align."""
    phase = config.alignment
    settings = dataclasses.replace(distillation_settings(config), reduction=phase.reduction)

    def sums(weights, teacher, batch, step, perturbation):
        return distillation_sums(weights, teacher, batch, settings, perturbation=perturbation)

    return Objective(sums, functools.partial(distillation_terms, beta=phase.beta, loops=config.distillation.loops))


OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {
    "pretraining": pretraining_objective,
    "warm_start": warm_start_objective,
    "transition": transition_objective,
    "alignment": alignment_objective,
}


def distillation_settings(config: TrainConfig) -> Distillation:
    """The settings common to both phases; without an alignment."""
    return Distillation(config.chunk_size, None, config.distillation.divergence, config.distillation.gradient)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    dtype: DTypeLike = "float32",
    gather: str = "step",
    compiler_options: dict[str, str] | None = None,
) -> Callable[[TrainState, LoopedTransformer | None, Batch], tuple[TrainState, Metrics]]:
    """The jitted step `(state, teacher, batch) → (state, metrics)`; the state is donated.

    Under a mesh (`jax.set_mesh`) the state is split by `sharding.weight_shardings` and the batch over the batch axes.

    A scan adds up the gradients of `micro_batches` equal parts of the batch in float32. The sums of every part are
    divided by the scored tokens of the *whole* batch, so the result is that of the whole batch, however the scored
    tokens are distributed.

    If the loss or a gradient is not finite, the update is skipped: weights and moments stay as they are, but the step
    counts, so that the next step gets another batch. All metrics of a skipped step except "skipped" are zero, with
    count zero. The metrics `NOT_FINITE` + name are 1 for those that were not finite.

    Args:
      objective: the phase's, one of `OBJECTIVES`.
      optimizer: from `make_optimizer`.
      micro_batches: number of parts; divides each device's share of the batch.
      dtype: of the computation.
      gather: when weights are gathered over fsdp. "step": all of them once per step; each group of devices runs its
        sequences on its own copy, and gradients are reduced once. "layer": each weight at every use, which takes less
        memory but T gathers and reductions of every layer per chunk.
      compiler_options: of XLA; see `training.compiler_options`.
    """

    def train_step(state, teacher, batch):
        count = scored_tokens(batch)
        weights = jax.tree.map(lambda x: x.astype(dtype), state.params)
        parts = group_batch(batch, micro_batches)
        # A single group already has whole weights.
        batch_gradients = _gather_once if gather == "step" and batch_groups() > 1 else _gather_at_each_use
        part_gradients = functools.partial(_gradients_of_parts, objective, micro_batches)
        gradients, sums = batch_gradients(part_gradients, state.params, weights, teacher, parts, state.step, count)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            updated = optax.apply_updates(state.params, updates), opt_state
            metrics = _step_metrics(sums, objective.terms(sums), count, gradients)
            return _skip_unless_finite(state, updated, metrics)

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def _gradients_of_parts(objective, micro_batches, weights, perturbation, teacher, parts, step, count):
    """(gradients, sums), added up over the parts [micro_batches, …] of a batch."""

    @functools.partial(jax.grad, has_aux=True)
    def part_gradients(perturbation, batch):
        sums = objective.sums(weights, teacher, batch, step, perturbation)
        return sum_terms(objective.terms(normalize(sums, count))), sums

    def add_part(totals, part):
        return jax.tree.map(jnp.add, totals, part_gradients(perturbation, part)), None

    part = jax.tree.map(lambda x: x[0], parts)
    if micro_batches == 1:
        return part_gradients(perturbation, part)
    zeros = lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=in_mesh(jax.P()))
    totals = perturbation, jax.tree.map(zeros, jax.eval_shape(part_gradients, perturbation, part)[1])
    return jax.lax.scan(add_part, totals, parts)[0]


def _zero_gradients(weights):
    return jax.tree.map(lambda w: jnp.zeros_like(w, accumulation_dtype(w.dtype)), weights)


def _gather_once(part_gradients, params, weights, teacher, parts, step, count):
    """(gradients, sums): each group of devices computes on its own copy of the weights."""
    with jax.named_scope("gather_weights"):
        weights, teacher = gather_weights(weights), gather_weights(teacher)
    over_groups = jax.vmap(part_gradients, (0, 0, 0, 0, None, None))
    gradients, sums = over_groups(weights, _zero_gradients(weights), teacher, parts, step, count)
    with jax.named_scope("reduce"):
        return add_groups(gradients, params), jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _gather_at_each_use(part_gradients, params, weights, teacher, parts, step, count):
    """(gradients, sums): all groups of devices compute on one model, whose weights are gathered when they are read."""
    weights, teacher = gather_at_use(weights), gather_at_use(teacher)
    gradients, sums = part_gradients(weights, _zero_gradients(weights), teacher, ungroup_batch(parts), step, count)
    # The gathering hooks are part of the structure of `weights`; the gradients need that of `params`.
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(gradients)), sums


def _step_metrics(sums: Sums, terms: Sums, count: Float[Array, ""], gradients: Any) -> Metrics:
    metrics = {name: (value, count) for name, value in sums.items()}
    metrics["loss"] = (sum_terms(terms), count)
    if len(terms) > 1:
        metrics |= {f"loss/{name}": (value, count) for name, value in terms.items()}
    norms = group_norms(gradients)
    return metrics | {f"gradient_norm/{group}": (norm, jnp.float32(1)) for group, norm in norms.items()}


def _skip_unless_finite(state: TrainState, updated: tuple[Any, Any], metrics: Metrics) -> tuple[TrainState, Metrics]:
    """The next state and its metrics: updated if the loss and all gradients are finite, else with the old weights."""
    checked = [pair for pair in metrics.items() if pair[0] == "loss" or pair[0].startswith("gradient_norm/")]
    values = [value for _, (value, _) in checked]
    finite = jnp.all(jnp.isfinite(jnp.stack(values)))
    params, opt_state = _where(finite, updated, (state.params, state.opt_state))
    metrics = _where(finite, metrics, jax.tree.map(jnp.zeros_like, metrics))
    for (name, _), value in zip(checked, values):
        metrics[NOT_FINITE + name] = ((~jnp.isfinite(value)).astype(jnp.float32), jnp.float32(1))
    metrics["skipped"] = ((~finite).astype(jnp.float32), jnp.float32(1))
    skipped = jnp.where(finite, 0, state.skipped + 1)
    return TrainState(params, opt_state, state.step + 1, skipped), metrics


def _where(condition, tree, other):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)
