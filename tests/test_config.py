"""The door: every config of configs/ freezes, and everything wrong with one is told at once."""

import importlib

import pytest

from configs import base, nano, nano_teacher
from melt_jax.config import GATES, ConfigError, freeze
from melt_jax.model.gate import VARIANTS


@pytest.mark.parametrize("name", ["nano", "nano_hour", "nano_teacher", "ouro_1_4b", "ouro_2_6b"])
def test_configs_freeze(name):
    freeze(importlib.import_module(f"configs.{name}").get_config())


def test_the_papers_recipe():
    config = freeze(importlib.import_module("configs.ouro_1_4b").get_config())
    assert config.data.length * config.data.batch == 320_000 and config.data.length == 20 * config.chunk_size
    assert (config.transition.steps, config.alignment.steps, config.alignment.beta) == (1500, 300, 0.1)
    rates = [(phase.learning_rate, phase.gate_learning_rate) for phase in (config.transition, config.alignment)]
    assert rates == [(8e-6, 5e-4)] * 2


def test_problems_are_all_told_at_once():
    config = nano.get_config().unlock()
    config.chunk_sise = 3
    config.chunk_size = 0
    config.student.gate = "none"
    config.micro_batches = 3
    config.transition.ramp = 0.0
    config.optimizer.b2 = 1.0
    config.evaluation.seed = config.seed = -1
    config.student.gate_std = -1.0
    config.optimizer.eps = 0.0
    config.alignment.learning_rate = float("inf")
    config.run.skipped_limit = 0
    with pytest.raises(ConfigError) as error:
        freeze(config)
    keys = ("chunk_size", "student.gate", "micro_batches", "transition.ramp", "optimizer.b2", "evaluation.seed")
    assert "- chunk_sise: unknown key; did you mean chunk_size?" in str(error.value)
    more = ("run.skipped_limit", "seed", "student.gate_std", "optimizer.eps", "alignment.learning_rate")
    for key in (*keys, *more):
        assert f"- {key}: expected" in str(error.value)


def test_the_names_of_the_gates_are_those_that_have_a_function():
    assert GATES == ("none", *VARIANTS)


def test_a_gated_first_loop_is_for_the_elementwise_gate():
    for gate in GATES[1:]:
        config = nano.get_config()
        config.student.gate, config.student.first_loop = gate, "gated"
        if gate == "elementwise":
            freeze(config)
        else:
            with pytest.raises(ConfigError, match=r"student.first_loop: expected 'copy', unless"):
                freeze(config)


def test_unknown_missing_and_mistyped_keys():
    config = base.get_config().unlock()
    config.transition.lerning_rate = 1e-5
    del config.optimizer.clip
    with config.ignore_type():
        config.data = "tokens.npz"
        config.chunk_size = 16.5
        config.transition.steps = True
    with pytest.raises(ConfigError) as error:
        freeze(config)
    text = str(error.value)
    assert "transition.lerning_rate: unknown key; did you mean transition.learning_rate?" in text
    assert "optimizer.clip: missing" in text
    assert "data: expected a group of keys, found 'tokens.npz'" in text
    assert "chunk_size: expected int, found 16.5" in text
    assert "transition.steps: expected int, found True" in text


def test_base_rejects_a_typo_in_a_config_file():
    with pytest.raises(AttributeError, match="chunk_sise"):
        base.get_config().chunk_sise = 3


@pytest.mark.parametrize(
    "phases", [(), ("alignment", "transition"), ("transition", "transition"), ("pretraining", "alignment"), ("align",)]
)
def test_phases_in_their_order(phases):
    config = nano.get_config()
    config.phases = phases
    with pytest.raises(ConfigError, match="phases"):
        freeze(config)


def test_impossible_models():
    config = nano_teacher.get_config()
    config.model.kv_heads = 3
    config.model.head_width = 15
    config.model.layers = 0
    with pytest.raises(ConfigError) as error:
        freeze(config)
    for key in ("kv_heads", "head_width", "layers"):
        assert f"model.{key}: expected" in str(error.value)
