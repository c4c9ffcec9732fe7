"""The warm start in float64: each layer reads the teacher's stream, and only the gates have a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax.config import WarmStartConfig
from melt_jax.model.cache import create_cache
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import module_leaves, reconfigure
from melt_jax.model.sequence import chunk_sums, plain_chunk_sums
from melt_jax.training.objectives import warm_start_sums
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.step import init_state, make_train_step
from tests.helpers.tiny import OPTIMIZER, TINY, looplm, make_model, objective, random_batch

pytestmark = pytest.mark.usefixtures("float64")

B, S, CHUNK = 2, 8, 3
EXACT = dataclasses.replace(TINY, window=3, sweeps=2)  # a chunk of 8 tokens is decoding
sums_of = jax.jit(warm_start_sums, static_argnames=("chunk_size", "chunk_sums"))


def run_one_chunk(model, tokens, layer_inputs=None):
    cache = create_cache(model.config, *tokens.shape, model.dtype)
    return run_chunk(model, tokens, cache, 0, layer_inputs=layer_inputs)


@pytest.mark.parametrize("config", [TINY, EXACT], ids=["chunk", "window"])
def test_own_layer_inputs_change_nothing(config):
    """A model that is given the inputs its layers have anyway computes the same attention outputs and entries."""
    model, tokens = make_model(config), random_batch(B, S).tokens
    run = jax.jit(run_one_chunk)
    free = run(model, tokens)
    forced = run(model, tokens, free.layer_input)
    for name in ("attention_output", "layer_input", "gate_openness"):
        np.testing.assert_allclose(getattr(forced, name), getattr(free, name), rtol=1e-12, atol=1e-12, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), forced.kv, free.kv)


def test_gates_that_overwrite_have_no_error_in_one_chunk():
    """In a single chunk, z = 0 gives the LoopLM; in several, later loops overwrite the entries of earlier chunks."""
    teacher = looplm(make_model())
    student, batch = reconfigure(teacher, gate="last"), random_batch(B, S)
    np.testing.assert_allclose(sums_of(student, teacher, batch, chunk_size=S)["alignment"], 0, atol=1e-20)
    assert np.all(sums_of(student, teacher, batch, chunk_size=CHUNK)["alignment"][0] > 1e-3)


def test_no_error_reaches_another_layer():
    """Scrambling the student's gate in layer 1 changes the alignment of layer 1 alone; the first loop has no gate."""
    student, teacher, batch = make_model(seed=1), looplm(make_model(seed=2)), random_batch(B, S)
    change = lambda x: x.at[1].add(1.0)
    other = jax.tree_util.tree_map_with_path(
        lambda path, x: change(x) if any(getattr(key, "name", None) == "kv_gate" for key in path) else x, student
    )
    got, changed = (sums_of(model, teacher, batch, chunk_size=CHUNK)["alignment"] for model in (student, other))
    np.testing.assert_array_equal(got[:, 0], changed[:, 0])
    assert np.all(np.abs(got[:, 1] - changed[:, 1]) > 1e-6)


@pytest.mark.parametrize("config", [TINY, EXACT], ids=["chunk", "window"])
def test_gradient_is_that_of_plain_differentiation(config):
    """It is zero for every weight of the backbone and nonzero for every gate."""
    student, teacher, batch = make_model(config, 1), looplm(make_model(seed=2)), random_batch(B, S)

    def loss(student, mechanism):
        return jnp.sum(warm_start_sums(student, teacher, batch, CHUNK, chunk_sums=mechanism)["alignment"])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = (dict(module_leaves(gradient(student, mechanism))) for mechanism in (chunk_sums, plain_chunk_sums))
    for path, value in got.items():
        np.testing.assert_allclose(value, want[path], rtol=1e-10, atol=1e-12, err_msg=path)
        assert np.any(value != 0) == (".kv_gate." in path), path


def test_steps_train_the_gates_alone():
    phase = WarmStartConfig(20, learning_rate=0.0, gate_learning_rate=3e-2, warmup_steps=0, final_fraction=0.1)
    teacher, batch = looplm(make_model()), random_batch(B, S)
    student = make_model()
    before = {path: np.asarray(leaf) for path, leaf in module_leaves(student)}
    optimizer = make_optimizer(phase, OPTIMIZER, student)
    step = make_train_step(objective("warm_start", phase, CHUNK), optimizer, dtype="float64")
    state, losses = init_state(jax.tree.map(jnp.copy, student), optimizer), []
    for _ in range(phase.steps):
        state, metrics = step(state, teacher, batch)
        losses.append(metrics["loss"][0] / metrics["loss"][1])
    assert losses[-1] < 0.8 * losses[0]
    for path, leaf in module_leaves(state.params):
        assert np.array_equal(leaf, before[path]) == (".kv_gate." not in path), path
