"""AdamW with separate learning rates for the backbone and the gates (MELT, arXiv 2605.07721: 8e-6 and 5e-4)."""

from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from melt_jax.config import OptimizerConfig, PhaseConfig
from melt_jax.model.layout import upcast

GROUPS = ("backbone", "gate")


def schedule(peak: float, steps: int, warmup: int, final_fraction: float) -> optax.Schedule:
    """The learning rate of each step: linear warm-up, then a cosine.

    Step k, counted from 0, has the rate peak · (k + 1) / warmup for k < warmup, so no step is wasted on a rate of 0.
    From step warmup − 1 (or 0) on, a cosine decays from `peak` to peak · `final_fraction` at step `steps`.
    """
    first = max(warmup, 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / first,
        peak_value=peak,
        warmup_steps=first - 1,
        decay_steps=max(steps, first),
        end_value=peak * final_fraction,
    )


def group_labels(params: Any) -> Any:
    """A pytree like `params` with "gate" for the weights of the gates and "backbone" for all others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "gate" if _has(path, "kv_gate") else "backbone", params)


def matrices(params: Any) -> Any:
    """A pytree like `params` with True for matrices, the weights that decay, and False for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim - _has(path, "layers") >= 2, params)


def make_optimizer(phase: PhaseConfig, optimizer: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    """The gradient transformation of one phase.

    Args:
      phase: steps, learning rates and schedule.
      optimizer: the settings of AdamW and the clipping norm.
      params: the (possibly abstract) model; a group without weights in it gets no transformation.
    """
    rates = {"backbone": phase.learning_rate, "gate": phase.gate_learning_rate}
    transforms = {}
    for group in sorted(set(jax.tree.leaves(group_labels(params)))):
        rate = schedule(rates[group], phase.steps, phase.warmup_steps, phase.final_fraction)
        transforms[group] = optax.adamw(
            rate, optimizer.b1, optimizer.b2, optimizer.eps, weight_decay=optimizer.weight_decay, mask=matrices
        )
    return optax.chain(optax.clip_by_global_norm(optimizer.clip), optax.partition(transforms, group_labels))


def group_norms(tree: Any) -> dict[str, Float[Array, ""]]:
    """{group: global norm, at least float32} of a gradient or a model, for the groups in it."""
    labels, leaves = jax.tree.leaves(group_labels(tree)), jax.tree.leaves(tree)
    norm = lambda group: optax.tree.norm([upcast(x) for x, label in zip(leaves, labels) if label == group])
    return {group: norm(group) for group in GROUPS if group in labels}


def _has(path, name):
    return any(getattr(key, "name", None) == name for key in path)
