"""The optimizer, the training step, the log of metrics, the checkpoints of a phase, and `reconfigure`."""

import dataclasses
import io
import itertools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from melt_jax.config import InputError
from melt_jax.model.model import init_model, reconfigure
from melt_jax.training.checkpoints import Checkpoints, RestoreError
from melt_jax.training.log import NOT_FINITE, RunLog, add_up, scalars
from melt_jax.training.optimizer import group_labels, group_norms, make_optimizer, matrices, schedule
from melt_jax.training.step import Objective, init_state, make_train_step, transition_alpha
from tests.helpers.tiny import ALIGNMENT, OPTIMIZER, TINY, TRANSITION, make_model, objective, random_batch

LOOPLM = dataclasses.replace(TINY, gate="none")


def fresh_state(params, optimizer):
    """`init_state` with a copy of the weights, because it donates them."""
    return init_state(jax.tree.map(jnp.copy, params), optimizer)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_weights_have_their_group_and_decay():
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
    """A LoopLM, which has no gates, has no group for them."""
    for model, groups in ((make_model(), {"backbone", "gate"}), (make_model(LOOPLM), {"backbone"})):
        optimizer = make_optimizer(TRANSITION, OPTIMIZER, model)
        states = optimizer.init(model)[1].inner_states
        assert set(states) == groups
        moments = {group: [x for x in jax.tree.leaves(state) if x.ndim] for group, state in states.items()}
        assert all(moments.values())
        assert sum(x.size for leaves in moments.values() for x in leaves) == 2 * sum(
            x.size for x in jax.tree.leaves(model)
        )


def test_schedule_warms_up_then_decays():
    """The warm-up reaches the peak at its last step; its first step already has a rate."""
    rate = schedule(1.0, steps=99, warmup=10, final_fraction=0.1)
    np.testing.assert_allclose([rate(k) for k in range(10)], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose([rate(54), rate(99), rate(1000)], [0.55, 0.1, 0.1], rtol=1e-6)
    for warmup in (0, 1):
        assert schedule(1.0, steps=1, warmup=warmup, final_fraction=0.5)(0) == 1
    np.testing.assert_allclose([schedule(1.0, 4, 4, 0.5)(k) for k in range(4)], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)


def test_first_update_has_a_learning_rate():
    """Adam's first update is ± the learning rate, so it shows the rate at step 0."""
    params = {"norm": jnp.ones(3)}  # a vector: no weight decay
    phase = dataclasses.replace(TRANSITION, steps=100, learning_rate=1e-3, warmup_steps=10)
    optimizer = make_optimizer(phase, dataclasses.replace(OPTIMIZER, clip=1e9), params)
    state, updates = optimizer.init(params), []
    for _ in range(10):
        update, state = optimizer.update({"norm": jnp.ones(3)}, state, params)
        updates.append(-float(update["norm"][0]))
    np.testing.assert_allclose(updates, 1e-3 * np.arange(1, 11) / 10, rtol=1e-5)


def test_alpha_rises_from_zero_to_one():
    """α is 0 at the first step and 1 from step ramp · (steps − 1) on."""
    alphas = [float(transition_alpha(step, 11, 1.0)) for step in range(11)]
    np.testing.assert_allclose(alphas, np.linspace(0, 1, 11), rtol=1e-6)
    assert [float(transition_alpha(step, 11, 0.5)) for step in (0, 5, 6)] == [0, 1, 1]
    assert float(transition_alpha(4, 11, 0.5)) < 1 and float(transition_alpha(0, 1, 1.0)) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name, phase", [("transition", TRANSITION), ("alignment", ALIGNMENT)])
def test_micro_batches_equal_the_whole_batch(name, phase):
    """This holds even if some parts have far fewer scored tokens than others."""
    student, teacher = make_model(), make_model(LOOPLM, seed=1)
    batch = random_batch(4, 12)
    batch = batch._replace(
        loss_mask=batch.loss_mask * (np.arange(4) < 3)[:, None] * (np.arange(12) % (1 + np.arange(4)[:, None]) == 0)
    )
    optimizer = make_optimizer(phase, OPTIMIZER, student)
    steps = (make_train_step(objective(name, phase, 5), optimizer, parts, "float64") for parts in (1, 4))
    (whole, metrics), (parts, part_metrics) = (step(fresh_state(student, optimizer), teacher, batch) for step in steps)
    # Weights are left out: if a gradient is zero, rounding decides the sign of Adam's first update.
    chex.assert_trees_all_close(parts.opt_state, whole.opt_state, rtol=1e-10, atol=1e-14)
    chex.assert_trees_all_close(part_metrics, metrics, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_training_brings_the_student_closer():
    teacher = make_model(LOOPLM)
    student = reconfigure(teacher, jax.random.key(0), gate="elementwise")
    phase = dataclasses.replace(ALIGNMENT, steps=30, learning_rate=1e-2)
    optimizer = make_optimizer(phase, OPTIMIZER, student)
    step = make_train_step(objective("alignment", phase, 4), optimizer)
    state, batch = fresh_state(student, optimizer), random_batch(4, 12)
    losses = []
    for _ in range(30):
        state, metrics = step(state, teacher, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_bfloat16_computes_on_float32_masters():
    teacher = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_model(LOOPLM))
    student = make_model()
    optimizer = make_optimizer(ALIGNMENT, OPTIMIZER, student)
    step = make_train_step(objective("alignment", ALIGNMENT, 4), optimizer, dtype="bfloat16")
    state, metrics = step(fresh_state(student, optimizer), teacher, random_batch(2, 8))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim} == {jnp.dtype("float32")}
    exact = make_train_step(objective("alignment", ALIGNMENT, 4), optimizer)
    _, wanted = exact(fresh_state(student, optimizer), make_model(LOOPLM), random_batch(2, 8))
    ratio = float(metrics["loss"][0] / wanted["loss"][0])
    assert ratio == pytest.approx(1, rel=2**-4) and ratio != 1  # bfloat16 rounds each of dozens of operations by 2⁻⁹


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_only_counts(where):
    """It changes neither the other steps nor the metrics of their interval."""

    def sums(weights, teacher, batch, step, perturbation):
        # At 0 the root is finite but its gradient is infinite.
        root = jnp.sum(jnp.sqrt(jnp.abs(weights["w"] + perturbation["w"]) * batch.tokens[0, 0]))
        return {"kd": root if where == "gradient" else root + jnp.log(batch.tokens[0, 1] * 1.0)}

    params = {"w": jnp.arange(1.0, 4.0)}
    optimizer = make_optimizer(TRANSITION, OPTIMIZER, params)
    step = make_train_step(Objective(sums, lambda metrics: {"kd": metrics["kd"]}), optimizer)
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
    causes = {name: float(value) for name, (value, _) in interval[1].items() if name.startswith(NOT_FINITE)}
    assert causes == {"not_finite/loss": where == "loss", "not_finite/gradient_norm/backbone": 1}
    assert not any(metrics[name][0] for metrics in (interval[0], interval[2]) for name in causes)
    assert found.pop("skipped") == pytest.approx(1 / 3) and wanted.pop("skipped") == 0
    chex.assert_trees_all_equal(found, wanted)
    alone = add_up(interval[1:2])
    assert np.isnan(alone["loss"]) and set(scalars(alone)) == {"skipped"}


def test_group_norms_cover_their_weights():
    norms = group_norms(make_model())
    leaves = by_path(make_model())
    gate = optax.tree.norm([jnp.asarray(x) for name, x in leaves.items() if "kv_gate" in name])
    assert float(norms["gate"]) == pytest.approx(float(gate), rel=1e-5)
    assert set(group_norms(make_model(LOOPLM))) == {"backbone"}


def test_interval_metrics_are_divided_last():
    steps = [{"kd": (np.array([6.0, 2.0]), np.float32(2))}, {"kd": (np.array([0.0, 10.0]), np.float32(6))}]
    np.testing.assert_allclose(add_up(steps)["kd"], [0.75, 1.5])


def test_log_drops_lines_of_repeated_steps(tmp_path):
    console = Console(file=io.StringIO())
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


def test_log_warns_of_a_dominant_alignment(tmp_path):
    """It does so once per phase, from the first step on; the ratio of the loss's two terms is always logged."""
    one = np.float32(1)
    terms = lambda ratio: {"loss/kd": (np.float32(2), one), "loss/alignment": (np.float32(2 * ratio), one)}
    for ratio, warnings in ((9.0, 0), (12.0, 1)):
        output = io.StringIO()
        with RunLog(tmp_path / str(ratio), "alignment", 0, 30, Console(file=output, width=200)) as log:
            log.write(1, [terms(ratio)])
            log.write(10, [terms(ratio)])
        assert output.getvalue().count("warning: β·L_align is 12 times L_KD") == warnings
        lines = (tmp_path / str(ratio) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["alignment_ratio"] for line in lines] == [ratio, ratio]


class TestCheckpoints:
    """A checkpoint is restored bitwise, or refused with a list of the differences."""

    def state(self, **changes):
        model = init_model(dataclasses.replace(TINY, **changes), jax.random.key(1))
        return init_state(model, make_optimizer(TRANSITION, OPTIMIZER, model))

    def test_checkpoints_round_trip(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, every=2, keep=2)
        states = {step: self.state()._replace(step=jnp.int32(step)) for step in range(1, 6)}
        saved = [checkpoints.save(step, state, force=step == 5) for step, state in states.items()]
        checkpoints.close()
        assert saved == [False, True, False, True, True]
        checkpoints = Checkpoints(tmp_path, every=2, keep=2)
        assert checkpoints.latest() == 5
        chex.assert_trees_all_equal(checkpoints.restore(4, jax.eval_shape(self.state)), states[4])
        checkpoints.close()

    @pytest.mark.slow
    def test_damaged_checkpoints_are_not_restored(self, tmp_path):
        """Each file of the newest one in turn: the one before it is restored, and the file is named."""
        states = {step: self.state()._replace(step=jnp.int32(step)) for step in (1, 2)}
        checkpoints = Checkpoints(tmp_path / "sound/checkpoints", every=1, keep=2)
        assert all(checkpoints.save(step, state) for step, state in states.items())
        checkpoints.close()
        files = [path for path in (tmp_path / "sound/checkpoints/2").rglob("*") if path.is_file()]
        assert len(files) > 4
        for number, (file, damage) in enumerate(zip(files, itertools.cycle(["cut", "empty", "flip", "remove"]))):
            root = tmp_path / str(number)
            shutil.copytree(tmp_path / "sound", root)
            path = root / file.relative_to(tmp_path / "sound")
            data = bytearray(path.read_bytes())
            if damage == "remove":
                path.unlink()
            elif damage == "flip":
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
            else:
                path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
            lines = []
            checkpoints = Checkpoints(root / "checkpoints", every=1, keep=2, report=lines.append)
            step = checkpoints.latest()
            restored = checkpoints.restore(step, jax.eval_shape(self.state))
            chex.assert_trees_all_equal(restored, states[step])
            checkpoints.save(3, states[2])  # as the run does that continues
            checkpoints.close()
            if step == 1:
                assert len(lines) == 1 and (f"{path}: expected" in lines[0] or path.name == "digests.json")
                assert (root / "damaged_checkpoints/2").is_dir()
            else:  # a file that says nothing of the state
                assert path.name in ("_CHECKPOINT_METADATA", "commit_success.txt", "digests.json") and not lines

    def test_failed_save_is_one_line(self, tmp_path, monkeypatch):
        checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=2)

        def fail(*args, **kwargs):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing\nNo space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(
            InputError, match="found ValueError: RESOURCE_EXHAUSTED: Error writing No space left"
        ) as error:
            checkpoints.save(1, self.state())
        assert "resumes from the last checkpoint" in str(error.value) and "\n" not in str(error.value)

    def test_every_leaf_is_accounted_for(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, every=1, keep=1)
        checkpoints.save(1, self.state())
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path, every=1, keep=1)
        other = jax.eval_shape(lambda: self.state(tied=True, feed_forward=24))
        other = other._replace(step=jax.ShapeDtypeStruct((), jnp.int16))
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
    with pytest.raises(InputError, match="key: expected"):
        reconfigure(looplm, gate="elementwise")
    with pytest.raises(InputError, match=r"layers\.up_proj"):
        reconfigure(looplm, feed_forward=24)
    with pytest.raises(InputError, match="loops: expected at least 1 and at most 1024, found 0"):
        reconfigure(looplm, loops=0)
