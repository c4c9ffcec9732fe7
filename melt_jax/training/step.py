"""One step of training: gradients of a batch in micro-batches, one update, metrics as (sum, count)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from melt_jax.sharding import gather_at_use, gather_weights, over_batch, reduce_gradients, sum_over_batch
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


def phase_objective(name, phase, chunk_size):
    """An objective: `sums(weights, teacher, batch, step, sink) → dict` and `loss(metrics) → scalar`."""
    if name == "pretraining":
        sums = lambda weights, teacher, batch, step, sink: pretraining_sums(weights, batch, chunk_size, sink)
        return sums, lambda metrics: pretraining_loss(metrics, phase.entropy_bonus)
    if name == "transition":
        alpha = lambda step: transition_alpha(step, phase.steps, phase.ramp)
        sums = lambda weights, teacher, batch, step, sink: distillation_sums(
            weights, teacher, batch, chunk_size, alpha(step), sink=sink
        )
        return sums, distillation_loss
    if name == "alignment":
        sums = lambda weights, teacher, batch, step, sink: distillation_sums(
            weights, teacher, batch, chunk_size, align=True, sink=sink
        )
        return sums, lambda metrics: distillation_loss(metrics, phase.beta)
    raise ValueError(f"unknown phase {name!r}; phases are pretraining, transition and alignment")


def make_train_step(objective, optimizer, micro_batches=1, dtype="float32", gather="step"):
    """The jitted step `(state, teacher, batch) → (state, metrics)`; the state is donated.

    Under a mesh (`jax.set_mesh`) the state is split by `sharding.weight_shardings` and the batch over the batch axes:
    each device runs its sequences with gathered weights, and gradients are added up once, at the end.

    Gradients of `micro_batches` equal parts of a device's sequences are added up in float32 by a scan. Every part's
    sums are divided by the scored tokens of the *whole* batch, so the result is the big batch's, however they lie.

    Args:
      objective: from `phase_objective`.
      optimizer: from `make_optimizer`.
      micro_batches: parts; divides a device's share of the batch.
      dtype: of the computation.
      gather: where weights are gathered over fsdp: "step", all of them once a step; "layer", those of the layers
        whenever one is used: less memory, and T gathers a chunk of each.

    Returns:
      The step. Its metrics are {name: (sum, count)}.
    """
    objective_sums, objective_loss = objective
    gather_model = {"step": gather_weights, "layer": gather_at_use}[gather]

    def local_gradients(specs, params, teacher, batch, step):
        count = jnp.maximum(sum_over_batch(scored_tokens(batch)), 1.0)
        with jax.named_scope("gather"):
            # The barrier keeps the compiler from gathering first and casting then: twice the bytes.
            weights = jax.lax.optimization_barrier(jax.tree.map(lambda x: x.astype(dtype), params))
            weights = gather_model(weights, specs[0])
            teacher = gather_model(teacher, specs[1]) if teacher is not None else None
        sink = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weights)

        @functools.partial(jax.grad, has_aux=True)
        def part_gradients(sink, batch):
            sums = objective_sums(weights, teacher, batch, step, sink)
            return objective_loss(normalize(sums, count)), sums

        if micro_batches == 1:
            gradients, sums = part_gradients(sink, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
            shapes = jax.eval_shape(part_gradients, sink, jax.tree.map(lambda x: x[0], parts))
            zeros = sink, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
            add_part = lambda total, part: (jax.tree.map(jnp.add, total, part_gradients(sink, part)), None)
            gradients, sums = jax.lax.scan(add_part, zeros, parts)[0]
        with jax.named_scope("reduce"):
            return reduce_gradients(gradients, params, specs[0]), (sum_over_batch(sums), count)

    def train_step(state, teacher, batch):
        gradients, (sums, count) = over_batch(local_gradients, state.params, teacher, batch, state.step)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {name: (value, count) for name, value in sums.items()}
        one = jnp.float32(1)
        metrics["loss"] = (objective_loss(sums), count)
        metrics |= {f"gradient_norm/{group}": (norm, one) for group, norm in group_norms(gradients).items()}
        return TrainState(params, opt_state, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)
