"""One step of training: gradients of a batch in micro-batches, one update, metrics as (sum, count)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from melt_jax.sharding import (
    add_groups,
    batch_groups,
    gather_at_use,
    gather_weights,
    group_batch,
    in_mesh,
    ungroup_batch,
)
from melt_jax.training.objectives import (
    distillation_loss,
    distillation_sums,
    normalize,
    pretraining_loss,
    pretraining_sums,
    scored_tokens,
)
from melt_jax.training.optimizer import group_norms


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      params: the model, float32 masters.
      opt_state: the optimizer's moments.
      step: of the phase, int32.
      skipped: how many steps, counted back from that one, were skipped in a row, int32.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


def init_state(params, optimizer):
    """The state before a phase's first step. The weights are given away to it, as each step gives its state away."""

    @functools.partial(jax.jit, donate_argnums=0)  # compiled, so that every leaf, scalars too, lies on the mesh
    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, optimizer.init(params), zero, zero)

    return init(params)


def transition_alpha(step, steps, ramp):
    """α of a step: linear from 0 at the first step to 1 at the fraction `ramp` of the phase (1: at its last step)."""
    return jnp.clip(step / max(ramp * (steps - 1), 1.0), 0.0, 1.0)


def phase_objective(name, phase, chunk_size):
    """An objective: `sums(weights, teacher, batch, step, perturbation) → dict` and `loss(metrics) → scalar`."""
    if name == "pretraining":
        sums = lambda weights, teacher, batch, step, perturbation: pretraining_sums(
            weights, batch, chunk_size, perturbation
        )
        return sums, lambda metrics: pretraining_loss(metrics, phase.entropy_bonus)
    if name == "transition":
        alpha = lambda step: transition_alpha(step, phase.steps, phase.ramp)
        sums = lambda weights, teacher, batch, step, perturbation: distillation_sums(
            weights, teacher, batch, chunk_size, alpha(step), perturbation=perturbation
        )
        return sums, distillation_loss
    if name == "alignment":
        sums = lambda weights, teacher, batch, step, perturbation: distillation_sums(
            weights, teacher, batch, chunk_size, align=True, perturbation=perturbation
        )
        return sums, lambda metrics: distillation_loss(metrics, phase.beta)
    raise ValueError(f"unknown phase {name!r}; phases are pretraining, transition and alignment")


def make_train_step(objective, optimizer, micro_batches=1, dtype="float32", gather="step"):
    """The jitted step `(state, teacher, batch) → (state, metrics)`; the state is donated.

    Under a mesh (`jax.set_mesh`) the state is split by `sharding.weight_shardings` and the batch over the batch axes.

    Gradients of `micro_batches` equal parts of the batch are added up in float32 by a scan. Every part's sums are
    divided by the scored tokens of the *whole* batch, so the result is the big batch's, however the scored tokens lie.

    Where the loss or a gradient is not finite the update is skipped: weights and moments stay as they are, and the step
    counts all the same, so that the next one meets another batch. A skipped step adds nothing to the metrics of an
    interval but its 1 in "skipped".

    Args:
      objective: from `phase_objective`.
      optimizer: from `make_optimizer`.
      micro_batches: parts; divides each device's share of the batch.
      dtype: of the computation.
      gather: where weights are gathered over fsdp. "step": all of them once a step, and each group of devices runs its
        sequences on a copy of its own, so that gradients are added up once, too. "layer": each whenever it is used:
        less memory, and T gathers and reductions a chunk of every layer.

    Returns:
      The step. Its metrics are {name: (sum, count)}.
    """
    objective_sums, objective_loss = objective

    def gradients_of_parts(weights, teacher, parts, step, count):
        perturbation = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weights)

        @functools.partial(jax.grad, has_aux=True)
        def part_gradients(perturbation, batch):
            sums = objective_sums(weights, teacher, batch, step, perturbation)
            return objective_loss(normalize(sums, count)), sums

        part = jax.tree.map(lambda x: x[0], parts)
        if micro_batches == 1:
            return part_gradients(perturbation, part)
        zeros = lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=in_mesh(jax.P()))
        totals = perturbation, jax.tree.map(zeros, jax.eval_shape(part_gradients, perturbation, part)[1])
        add_part = lambda totals, part: (jax.tree.map(jnp.add, totals, part_gradients(perturbation, part)), None)
        return jax.lax.scan(add_part, totals, parts)[0]

    def gather_once(params, weights, teacher, parts, step, count):
        with jax.named_scope("gather_weights"):
            weights, teacher = gather_weights(weights), gather_weights(teacher)
        over_groups = jax.vmap(gradients_of_parts, (0, 0, 0, None, None))
        gradients, sums = over_groups(weights, teacher, parts, step, count)
        with jax.named_scope("reduce"):
            return add_groups(gradients, params), jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

    def gather_each_use(params, weights, teacher, parts, step, count):
        weights, teacher = gather_at_use(weights), gather_at_use(teacher)
        gradients, sums = gradients_of_parts(weights, teacher, ungroup_batch(parts), step, count)
        return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(gradients)), sums

    def train_step(state, teacher, batch):
        count = scored_tokens(batch)
        weights = jax.tree.map(lambda x: x.astype(dtype), state.params)
        parts = group_batch(batch, micro_batches)
        # A single group has nothing to gather, and no copies to keep apart.
        batch_gradients = gather_once if gather == "step" and batch_groups() > 1 else gather_each_use
        gradients, sums = batch_gradients(state.params, weights, teacher, parts, state.step, count)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {name: (value, count) for name, value in sums.items()}
        one = jnp.float32(1)
        metrics["loss"] = (objective_loss(sums), count)
        norms = group_norms(gradients)
        metrics |= {f"gradient_norm/{group}": (norm, one) for group, norm in norms.items()}

        finite = jnp.all(jnp.isfinite(jnp.stack([metrics["loss"][0], *norms.values()])))
        params, opt_state = _where(finite, (params, opt_state), (state.params, state.opt_state))
        metrics = _where(finite, metrics, jax.tree.map(jnp.zeros_like, metrics))
        metrics["skipped"] = (jnp.float32(~finite), one)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        return TrainState(params, opt_state, state.step + 1, skipped), metrics

    return jax.jit(train_step, donate_argnums=0)


def _where(condition, tree, other):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)
