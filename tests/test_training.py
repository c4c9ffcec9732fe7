"""The optimizer's groups, one training step, the log's sums, checkpoints of a phase."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from melt_jax.config import AlignmentConfig, OptimizerConfig, TransitionConfig
from melt_jax.model.model import init_model, reconfigure
from melt_jax.training.checkpoints import Checkpoints, RestoreError
from melt_jax.training.log import RunLog, add_up, scalars
from melt_jax.training.optimizer import group_labels, group_norms, make_optimizer, matrices, schedule
from melt_jax.training.step import init_state, make_train_step, phase_objective, transition_alpha
from tests.helpers.tiny import TINY, make_model, random_batch, with_config

OPTIMIZER = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
TRANSITION = TransitionConfig(4, 1e-3, 1e-2, 0, 0.1, 1.0)
ALIGNMENT = AlignmentConfig(4, 1e-3, 1e-2, 0, 0.1, 0.1)
LOOPLM = dataclasses.replace(TINY, gate="none")


def fresh_state(params, optimizer):
    """`init_state` of weights that are kept."""
    return init_state(jax.tree.map(jnp.copy, params), optimizer)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_groups_and_decay():
    labels, decayed = by_path(group_labels(make_model())), by_path(matrices(make_model()))
    gates = {name for name, label in labels.items() if label == "gate"}
    assert gates == {f"layers.kv_gate.{name}.value" for name in ("w_z", "u_z", "b_z")}
    vectors = {name for name, matrix in decayed.items() if not matrix}
    assert vectors == {name for name in labels if "norm" in name or "early_exit_gate" in name or "b_z" in name}


def test_each_group_follows_its_own_schedule():
    params = make_model()
    phase = dataclasses.replace(TRANSITION, learning_rate=0.0, gate_learning_rate=1e-2)
    optimizer = make_optimizer(phase, OPTIMIZER, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    for name, update in by_path(updates).items():
        assert np.any(np.asarray(update)) == ("kv_gate" in name), name


def test_every_group_of_the_optimizer_has_weights():
    """And a LoopLM, which has no gates, gets no group for them."""
    for model, groups in ((make_model(), {"backbone", "gate"}), (make_model(LOOPLM), {"backbone"})):
        optimizer = make_optimizer(TRANSITION, OPTIMIZER, model)
        states = optimizer.init(model)[1].inner_states
        assert set(states) == groups
        moments = {group: [x for x in jax.tree.leaves(state) if x.ndim] for group, state in states.items()}
        assert all(moments.values())
        assert sum(x.size for leaves in moments.values() for x in leaves) == 2 * sum(
            x.size for x in jax.tree.leaves(model)
        )


def test_schedule():
    rate = schedule(1.0, steps=100, warmup=10, final_fraction=0.1)
    assert rate(0) == 0 and rate(5) == pytest.approx(0.5) and rate(10) == pytest.approx(1)
    assert rate(55) == pytest.approx(0.55) and rate(100) == pytest.approx(0.1) and rate(1000) == pytest.approx(0.1)
    assert schedule(1.0, steps=1, warmup=0, final_fraction=0.5)(0) == pytest.approx(1)


def test_alpha_runs_from_zero_to_one():
    alphas = [float(transition_alpha(step, 11, 1.0)) for step in range(11)]
    np.testing.assert_allclose(alphas, np.linspace(0, 1, 11), atol=1e-6)
    assert float(transition_alpha(5, 11, 0.5)) == 1 and float(transition_alpha(0, 1, 1.0)) == 0


@pytest.mark.parametrize("name, phase", [("transition", TRANSITION), ("alignment", ALIGNMENT)])
def test_micro_batches_are_the_big_batch(name, phase):
    """Also where one part has far fewer scored tokens than another."""
    student, teacher = make_model(), with_config(make_model(seed=1), LOOPLM)
    batch = random_batch(4, 12)
    batch = batch._replace(
        loss_mask=batch.loss_mask * (np.arange(4) < 3)[:, None] * (np.arange(12) % (1 + np.arange(4)[:, None]) == 0)
    )
    optimizer = make_optimizer(phase, OPTIMIZER, student)
    objective = phase_objective(name, phase, 5)
    outcomes = []
    for parts in (1, 2, 4):
        state = fresh_state(student, optimizer)
        outcomes.append(make_train_step(objective, optimizer, parts)(state, teacher, batch))
    (whole, metrics), *others = outcomes
    for state, other_metrics in others:
        # The first update of Adam is ±rate wherever a gradient is not zero: the moments tell how close gradients are.
        chex.assert_trees_all_close(state.opt_state, whole.opt_state, rtol=2e-4, atol=1e-7)
        chex.assert_trees_all_close(other_metrics, metrics, rtol=1e-5, atol=1e-6)


def test_training_brings_the_student_closer():
    teacher = make_model(LOOPLM)
    student = reconfigure(teacher, jax.random.key(0), gate="elementwise")
    phase = dataclasses.replace(ALIGNMENT, steps=30, learning_rate=1e-2)
    optimizer = make_optimizer(phase, OPTIMIZER, student)
    step = make_train_step(phase_objective("alignment", phase, 4), optimizer)
    state, batch = fresh_state(student, optimizer), random_batch(4, 12)
    losses = []
    for _ in range(30):
        state, metrics = step(state, teacher, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_computes_on_float32_masters():
    teacher = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_model(LOOPLM))
    student = make_model()
    optimizer = make_optimizer(ALIGNMENT, OPTIMIZER, student)
    step = make_train_step(phase_objective("alignment", ALIGNMENT, 4), optimizer, dtype="bfloat16")
    state, metrics = step(fresh_state(student, optimizer), teacher, random_batch(2, 8))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim} == {jnp.dtype("float32")}
    exact = make_train_step(phase_objective("alignment", ALIGNMENT, 4), optimizer)
    _, wanted = exact(fresh_state(student, optimizer), make_model(LOOPLM), random_batch(2, 8))
    ratio = float(metrics["loss"][0] / wanted["loss"][0])
    assert ratio == pytest.approx(1, rel=0.05) and ratio != 1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(where):
    """Its neighbours are as if it had never been; the metrics of an interval are those of the other steps."""

    def sums(weights, teacher, batch, step, perturbation):
        # The root's gradient at 0 is infinite where its value is not.
        root = jnp.sum(jnp.sqrt(jnp.abs(weights["w"] + perturbation["w"]) * batch.tokens[0, 0]))
        return {"kd": root if where == "gradient" else root + jnp.log(batch.tokens[0, 1] * 1.0)}

    params = {"w": jnp.arange(1.0, 4.0)}
    optimizer = make_optimizer(TRANSITION, OPTIMIZER, params)
    step = make_train_step((sums, lambda metrics: metrics["kd"]), optimizer)
    good = random_batch(2, 4)._replace(tokens=jnp.ones((2, 4), jnp.int32))
    bad = good._replace(tokens=jnp.zeros((2, 4), jnp.int32))
    runs = {}
    for name, batches in (("clean", [good, good]), ("disturbed", [good, bad, good])):
        state, interval = fresh_state(params, optimizer), []
        for batch in batches:
            state, metrics = step(state, None, batch)
            interval.append(metrics)
        runs[name] = state, add_up(interval)
    (clean, wanted), (disturbed, found) = runs["clean"], runs["disturbed"]
    chex.assert_trees_all_equal((disturbed.params, disturbed.opt_state), (clean.params, clean.opt_state))
    assert np.any(clean.params["w"] != params["w"]) and (clean.step, disturbed.step) == (2, 3)
    assert disturbed.skipped == 0 and step(disturbed, None, bad)[0].skipped == 1
    assert found.pop("skipped") == pytest.approx(1 / 3) and wanted.pop("skipped") == 0
    chex.assert_trees_all_equal(found, wanted)
    alone = add_up(interval[1:2])
    assert np.isnan(alone["loss"]) and set(scalars(alone)) == {"skipped"}


def test_group_norms():
    norms = group_norms(make_model())
    leaves = by_path(make_model())
    gate = optax.global_norm([jnp.asarray(x) for name, x in leaves.items() if "kv_gate" in name])
    assert float(norms["gate"]) == pytest.approx(float(gate), rel=1e-6)
    assert set(group_norms(make_model(LOOPLM))) == {"backbone"}


def test_interval_metrics_are_divided_last():
    steps = [{"kd": (np.array([6.0, 2.0]), np.float32(2))}, {"kd": (np.array([0.0, 10.0]), np.float32(6))}]
    np.testing.assert_allclose(add_up(steps)["kd"], [0.75, 1.5])


def test_the_log_drops_lines_of_steps_that_are_run_again(tmp_path):
    console = Console(file=open(tmp_path / "terminal", "w"))
    step = {"kd": (np.array([1.0, 2.0]), np.float32(2)), "alignment": (np.ones((2, 3)), np.float32(2))}
    with RunLog(tmp_path, "alignment", 0, 30, console) as log:
        for at in (10, 20):
            log.write(at, [step])
    with RunLog(tmp_path, "alignment", 10, 30, console) as log:
        log.write(20, [step, step])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[1]["kd/loop2"] == 1.0 and lines[1]["alignment/loop2/layer3"] == 0.5
    assert [lines[1][f"alignment_to_kd/loop{t}"] for t in (1, 2)] == [0.5 / 0.5, 0.5 / 1.0]


class TestCheckpoints:
    """Saved and restored to the same bits, or refused with the list."""

    def state(self, **changes):
        model = init_model(dataclasses.replace(TINY, **changes), jax.random.key(1))
        return init_state(model, make_optimizer(TRANSITION, OPTIMIZER, model))

    def test_there_and_back(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, every=2, keep=2)
        states = {step: self.state()._replace(step=jnp.int32(step)) for step in range(1, 6)}
        saved = [checkpoints.save(step, state, force=step == 5) for step, state in states.items()]
        checkpoints.close()
        assert saved == [False, True, False, True, True]
        checkpoints = Checkpoints(tmp_path, every=2, keep=2)
        assert checkpoints.latest() == 5
        chex.assert_trees_all_equal(checkpoints.restore(4, jax.eval_shape(self.state)), states[4])
        checkpoints.close()

    def test_every_leaf_is_accounted_for(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, every=1, keep=1)
        checkpoints.save(1, self.state())
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path, every=1, keep=1)
        other = jax.eval_shape(lambda: self.state(tied=True, feed_forward=24))
        other = other._replace(step=jax.ShapeDtypeStruct((), jnp.int64 if jax.config.jax_enable_x64 else jnp.int16))
        with pytest.raises(RestoreError) as error:
            checkpoints.restore(1, other)
        text = str(error.value)
        assert "params.lm_head.value: unknown" in text
        assert "params.layers.up_proj.value: expected ((2, 16, 24), 'float32'), found ((2, 16, 20), 'float32')" in text
        assert "step: expected ((), 'int16'), found ((), 'int32')" in text
        checkpoints.close()


def test_reconfigure_keeps_what_both_models_have():
    looplm = make_model(LOOPLM)
    student = reconfigure(looplm, jax.random.key(0), 0.5, gate="elementwise", remat="layer")
    assert student.config.remat == student.layers.config.remat == "layer"
    old, new = by_path(looplm), by_path(student)
    for name, leaf in old.items():
        np.testing.assert_array_equal(leaf, new[name])
    assert np.std(new["layers.kv_gate.w_z.value"]) == pytest.approx(0.5, rel=0.1)
    assert not np.any(new["layers.kv_gate.b_z.value"])
    chex.assert_trees_all_equal(by_path(reconfigure(student, gate="none")), old)
    with pytest.raises(ValueError, match="key is needed"):
        reconfigure(looplm, gate="elementwise")
    with pytest.raises(ValueError, match=r"layers\.up_proj"):
        reconfigure(looplm, feed_forward=24)
