"""One step of training: gradients of a batch in micro-batches, one update, metrics as (sum, count)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    """What a checkpoint holds: float32 masters, the optimizer's moments, and the step of the phase, int32."""

    params: Any
    opt_state: Any
    step: jax.Array


def init_state(params, optimizer):
    """The state before a phase's first step, with weights of its own: the step gives its state away."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def transition_alpha(step, steps, ramp):
    """α of a step: linear from 0 at the first step to 1 at the fraction `ramp` of the phase (1: at its last step)."""
    return jnp.clip(step / max(ramp * (steps - 1), 1.0), 0.0, 1.0)


def phase_objective(name, phase, chunk_size, prepare):
    """An objective as two functions: `sums(params, teacher, batch, step) → dict` and `loss(metrics) → scalar`."""
    if name == "pretraining":
        sums = lambda params, teacher, batch, step: pretraining_sums(params, batch, chunk_size, prepare)
        return sums, lambda metrics: pretraining_loss(metrics, phase.entropy_bonus)
    if name == "transition":
        alpha = lambda step: transition_alpha(step, phase.steps, phase.ramp)
        sums = lambda params, teacher, batch, step: distillation_sums(
            params, teacher, batch, chunk_size, alpha(step), prepare=prepare
        )
        return sums, distillation_loss
    if name == "alignment":
        sums = lambda params, teacher, batch, step: distillation_sums(
            params, teacher, batch, chunk_size, align=True, prepare=prepare
        )
        return sums, lambda metrics: distillation_loss(metrics, phase.beta)
    raise ValueError(f"unknown phase {name!r}; phases are pretraining, transition and alignment")


def _where(condition, tree, other):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)


def make_train_step(objective, optimizer, micro_batches=1):
    """The jitted step `(state, teacher, batch) → (state, metrics)`; the state is donated.

    Gradients of `micro_batches` equal parts of the batch are added up in float32 by a scan. Every part's sums are
    divided by the scored tokens of the *whole* batch, so the result is the big batch's, however the scored tokens lie.

    Where the loss or a gradient is not finite the update is skipped: weights and moments stay as they are, and the step
    counts all the same, so that the next one meets another batch. A skipped step adds nothing to the metrics of an
    interval but its 1 in "skipped".

    Args:
      objective: from `phase_objective`.
      optimizer: from `make_optimizer`.
      micro_batches: parts; divides the batch.

    Returns:
      The step. Its metrics are {name: (sum, count)}.
    """
    objective_sums, objective_loss = objective

    def micro_gradients(params, teacher, batch, step, count):
        def loss(params):
            sums = objective_sums(params, teacher, batch, step)
            return objective_loss(normalize(sums, count)), sums

        (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, gradients

    def batch_gradients(params, teacher, batch, step, count):
        if micro_batches == 1:
            return micro_gradients(params, teacher, batch, step, count)
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        part = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.eval_shape(micro_gradients, params, teacher, part, step, count)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)

        def body(total, batch):
            return jax.tree.map(jnp.add, total, micro_gradients(params, teacher, batch, step, count)), None

        return jax.lax.scan(body, zeros, parts)[0]

    def train_step(state, teacher, batch):
        count = scored_tokens(batch)
        sums, gradients = batch_gradients(state.params, teacher, batch, state.step, count)
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
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def cast_to(dtype):
    """`prepare` of the sequence gradient: a cast of all weights to the compute dtype, None where that is float32."""
    if jnp.dtype(dtype) == jnp.float32:
        return None
    return lambda params: jax.tree.map(lambda x: x.astype(dtype), params)
