"""AdamW with a schedule for the backbone weights and one for the gates (MELT, arXiv 2605.07721: 8e-6 and 5e-4)."""

import jax
import jax.numpy as jnp
import optax

GROUPS = ("backbone", "gate")


def schedule(peak, steps, warmup, final_fraction):
    """Linear warm-up from 0 over `warmup` steps, then a cosine from `peak` to `final_fraction` of it at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak * final_fraction,
    )


def group_labels(params):
    """A pytree like `params` that says "gate" for the weights of the cache recurrence and "backbone" for the rest."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "gate" if _has(path, "kv_gate") else "backbone", params)


def matrices(params):
    """A pytree like `params`, True for the matrices: what weight decay falls on. Norm scales and biases are vectors."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim - _has(path, "layers") >= 2, params)


def make_optimizer(phase, optimizer, params):
    """The gradient transformation of one phase.

    Args:
      phase: `PhaseConfig`: steps, learning rates and schedule.
      optimizer: `OptimizerConfig`.
      params: the (possibly abstract) model; only groups that it has weights of get a transformation.
    """
    rates = {"backbone": phase.learning_rate, "gate": phase.gate_learning_rate}
    transforms = {}
    for group in sorted(set(jax.tree.leaves(group_labels(params)))):
        rate = schedule(rates[group], phase.steps, phase.warmup_steps, phase.final_fraction)
        transforms[group] = optax.adamw(
            rate, optimizer.b1, optimizer.b2, optimizer.eps, weight_decay=optimizer.weight_decay, mask=matrices
        )
    return optax.chain(optax.clip_by_global_norm(optimizer.clip), optax.partition(transforms, group_labels))


def group_norms(tree):
    """{group: global norm, float32} of a gradient or a model, for the groups it has."""
    labels = jax.tree.leaves(group_labels(tree))
    leaves = jax.tree.leaves(tree)
    norm = lambda group: optax.global_norm(
        [x.astype(jnp.float32) for x, label in zip(leaves, labels) if label == group]
    )
    return {group: norm(group) for group in GROUPS if group in labels}


def _has(path, name):
    return any(getattr(key, "name", None) == name for key in path)
