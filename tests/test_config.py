"""Every recipe freezes to its reviewed text, and all errors of a configuration are reported at once."""

import dataclasses
import math

import pytest
from ml_collections import ConfigDict

from configs import base, nano, ouro_1_4b, ouro_1_4b_exact
from melt_jax.command_line import set_key
from melt_jax.config import GATES, KEYS, ConfigError, ModelConfig, freeze, model_errors
from melt_jax.model.gate import VARIANTS
from tests.helpers.recipes import BASE, RECIPES, TEXTS, commented, recipe_text

NOT_IN_BASE = (
    "gate",
    "first_loop",
    "window",
    "sweeps",
    "exit_threshold",
    "guidance",
    "remat",
    "attention",
    "attention_block",
    "unroll",
)  # of `model`, set from other keys


def changed(config: ConfigDict, **values: object) -> ConfigDict:
    """The config with values of any type set; `__` in a name means a dot."""
    config = config.unlock()
    with config.ignore_type():
        for name, value in values.items():
            set_key(config, name.replace("__", "."), value)
    return config


def errors(config: ConfigDict) -> list[str]:
    """The lines of the error that `freeze` raises."""
    with pytest.raises(ConfigError) as error:
        freeze(config)
    title, *lines = str(error.value).splitlines()
    assert title == "the configuration has errors:" and all(line.startswith("  - ") for line in lines)
    return [line.removeprefix("  - ") for line in lines]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_equals_its_reviewed_text(name):
    """After an intended change, `python -m tests.helpers.recipes` rewrites the text; commit both."""
    assert recipe_text(name) == (TEXTS / f"{name}.txt").read_text()


def test_every_recipe_has_a_text():
    assert sorted(path.stem for path in TEXTS.glob("*.txt")) == RECIPES


def test_base_states_every_key_and_its_meaning():
    given = base.get_config().to_dict()
    keys = {f"{group}.{key}" for group, keys in given.items() if isinstance(keys, dict) for key in keys}
    keys |= {key for key, value in given.items() if not isinstance(value, dict)}
    assert keys == KEYS.keys() - {f"model.{key}" for key in NOT_IN_BASE}
    source = BASE.read_text()
    assert source == commented(source)


def test_every_number_has_a_range():
    unlimited = [name for name, key in KEYS.items() if key.type not in (bool, str) and key.limit is None]
    assert unlimited == []


def test_ouro_recipe_matches_the_paper():
    """500 + 300 steps of 320 000 tokens: 256M tokens."""
    config = freeze(ouro_1_4b.get_config())
    step_tokens = config.data.length * config.data.batch
    assert step_tokens == 320_000 and config.data.length == 20 * config.chunk_size
    assert (config.transition.steps, config.alignment.steps, config.alignment.beta) == (500, 300, 0.1)
    assert step_tokens * (config.transition.steps + config.alignment.steps) == 256_000_000
    rates = [(phase.learning_rate, phase.gate_learning_rate) for phase in (config.transition, config.alignment)]
    assert rates == [(8e-6, 5e-4)] * 2


def test_exact_recipe_trains_what_decoding_computes():
    """Its chunks are within the identity, and nothing else but the alignment's reduction differs from the paper's."""
    config, paper = freeze(ouro_1_4b_exact.get_config()), freeze(ouro_1_4b.get_config())
    assert config.chunk_size <= config.student.sweeps * (config.student.window + 1)
    assert paper.chunk_size > paper.student.sweeps * (paper.student.window + 1)
    alignment = dataclasses.replace(paper.alignment, reduction="relative")
    assert config == dataclasses.replace(
        paper, chunk_size=config.chunk_size, student=config.student, alignment=alignment
    )


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("nano")])
def test_nano_decodes_whole_sequences(name):
    text = dict(line.split(" = ") for line in recipe_text(name).splitlines())
    assert int(text["evaluation.decoding_tokens"]) >= int(text["data.length"])


def test_all_errors_are_reported_at_once():
    config = changed(
        nano.get_config(),
        alignmnt__beta=1.0,
        chunk_size="many",
        seed=-1,
        evaluation__seed=2**32,
        student__gate="none",
        micro_batches=3,
        transition__ramp=0.0,
        optimizer__b2=1.0,
        student__gate_std=math.nan,
        alignment__learning_rate=math.inf,
        alignment__steps=2**31,
        run__skipped_limit=True,
        remat="all",
        gather="layer",
        phases=("align",),
    )
    assert errors(config) == [
        "alignmnt.beta: unknown key; did you mean alignment.beta?",
        "seed: expected at least 0 and at most 4294967295, found -1",
        "phases: expected one of pretraining, warm_start, transition, alignment, found ('align',)",
        "student.gate: expected one of elementwise, scalar, mean, ema, last, found 'none'",
        "student.gate_std: expected a finite number, at least 0, found nan",
        "chunk_size: expected an integer, at least 1, found 'many'",
        "remat: expected one of none, products, layer, found 'all'",
        "transition.ramp: expected above 0 and at most 1, found 0.0",
        "alignment.steps: expected below 2147483648, found 2147483648",
        "alignment.learning_rate: expected a finite number, at least 0, found inf",
        "optimizer.b2: expected at least 0 and below 1, found 1.0",
        "run.skipped_limit: expected an integer, at least 1, found True",
        "evaluation.seed: expected at least 0 and at most 4294967295, found 4294967296",
        "micro_batches: expected a divisor of data.batch, 32, found 3",
    ]


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.type is not str])
def test_every_key_rejects_wrong_values(name):
    """Text, nan, infinity, lists, a huge number, a fraction for an integer, and a bool unless the key is one."""
    key = KEYS[name]
    wrong = ["many", math.nan, math.inf, -math.inf, 10**400, [1], {}]
    wrong += [] if key.type is bool else [True, -100, -100.5]
    wrong += [1.5] if key.type is int else []
    wrong += [None] if key.type != int | None else []
    for value in wrong:
        assert key.error(key.convert(value)).startswith("expected ")


def base_with_teacher() -> ConfigDict:
    """The base configuration, free of errors."""
    return changed(base.get_config(), teacher="ouro")


def test_unknown_keys_get_suggestions():
    unknown = {
        "lerning_rate": "",
        "transition__lerning_rate": "; did you mean transition.learning_rate?",
        "chunk_sise": "; did you mean chunk_size?",
        "beta": "; did you mean alignment.beta?",
        "steps": "; did you mean pretraining.steps or warm_start.steps or transition.steps or alignment.steps?",
        "qqqq": "",
    }
    for name, suggestion in unknown.items():
        (line,) = errors(changed(base_with_teacher(), **{name: 1}))
        name = name.replace("__", ".")
        assert line.startswith(f"{name}: unknown key") and line.endswith(suggestion)


def test_missing_keys_and_non_groups_are_errors():
    config = changed(base_with_teacher(), data="tokens.npz")
    del config.optimizer.clip
    assert errors(config) == [
        "data: expected a group of keys, found 'tokens.npz'",
        "optimizer.clip: missing: a number, global norm to which gradients are clipped",
    ]


def test_unknown_recipe_key_is_an_error():
    config = base_with_teacher()
    config.transition.lerning_rate = 1e-5
    assert errors(config) == ["transition.lerning_rate: unknown key; did you mean transition.learning_rate?"]


CONTRADICTIONS = {
    "phases: expected some of warm_start, transition, alignment": [
        {"phases": phases}
        for phases in ((), ("alignment", "transition"), ("transition",) * 2, ("pretraining", "alignment"))
    ],
    "teacher: expected the folder of a LoopLM": [{"teacher": ""}],
    "model.gate: expected 'none'": [{"phases": ("pretraining",), "model__gate": "elementwise"}],
    "model.remat: expected 'none'": [{"model__remat": "layer"}],
    "model.attention: expected 'blocks'": [{"model__attention": "pallas"}],
    "model.attention_block: expected 512": [{"model__attention_block": 64}],
    "model.unroll: expected False": [{"model__unroll": True}],
    "student.first_loop: expected 'copy'": [
        {"student__gate": gate, "student__first_loop": "gated"} for gate in GATES[2:]
    ],
    "student.gate_bias: expected 0.0 with the gate": [
        {"student__gate": gate, "student__gate_bias": 1.0} for gate in GATES[3:]
    ],
    "remat: expected 'products' or 'layer'": [{"gather": "layer", "remat": "none"}],
    "micro_batches: expected a divisor of data.batch, 32": [{"micro_batches": 5}],
    "alignment.warmup_steps: expected at most alignment.steps, 9": [{"alignment__steps": 9}],
    "model.kv_heads: expected a divisor of heads, 16": [{"model__kv_heads": 3}],
    "model.head_width: expected an even number": [{"model__head_width": 15}],
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictory_values_are_errors(message):
    for values in CONTRADICTIONS[message]:
        (line,) = errors(changed(base_with_teacher(), **values))
        assert line.startswith(message)


def test_unused_phase_may_have_a_long_warmup():
    freeze(changed(base_with_teacher(), phases=("transition",), alignment__steps=9))


def test_training_and_evaluation_may_share_a_seed():
    assert freeze(changed(base_with_teacher(), seed=1)).evaluation.seed == 1


def test_elementwise_gate_may_have_a_gated_first_loop():
    freeze(changed(base_with_teacher(), student__gate="elementwise", student__first_loop="gated"))


def test_every_gate_has_a_function():
    assert GATES == ("none", *VARIANTS)


def test_all_model_errors_are_listed():
    assert model_errors(ModelConfig()) == model_errors(ModelConfig(gate="ema", remat="layer", exit_threshold=2.0)) == []
    model = ModelConfig(loops=0, exit_threshold=-0.1, kv_heads=3, head_width=15, gate="soft", layers=2.0, bos=-1)  # type: ignore # a wrong type is the test's point
    assert model_errors(model, "model.") == [
        "model.layers: expected an integer, at least 1 and at most 4096, found 2.0",
        "model.loops: expected at least 1 and at most 1024, found 0",
        "model.gate: expected one of none, elementwise, scalar, mean, ema, last, found 'soft'",
        "model.exit_threshold: expected at least 0, found -0.1",
        "model.bos: expected at least 0, found -1",
        "model.kv_heads: expected a divisor of heads, 16, found 3",
        "model.head_width: expected an even number, because RoPE pairs components, found 15",
    ]


@pytest.mark.parametrize("values, expected", [({"loops": 1}, "with one loop"), ({"exit_threshold": 0.5}, "early exit")])
def test_guidance_needs_two_loops_that_run(values, expected):
    """It contrasts the last loop with the first; with an early exit the last loop differs by token."""
    (line,) = model_errors(ModelConfig(guidance=0.2, **values))
    assert line.startswith("guidance: expected 0 with ") and expected in line
    assert model_errors(ModelConfig(guidance=0.2)) == model_errors(ModelConfig(**values)) == []


def test_defaults_are_valid():
    defaults = {name: key for name, key in KEYS.items() if key.default is not dataclasses.MISSING}
    assert defaults and all(key.error(key.default) == "" for key in defaults.values())


def test_model_defaults_are_those_of_base():
    model = base.get_config().model.to_dict()
    default = dataclasses.asdict(ModelConfig())
    assert {key: value for key, value in model.items() if default[key] not in (value, None)} == {}


def test_types_of_keys_are_supported():
    assert {key.type for key in KEYS.values()} <= {int, float, bool, str, tuple[str, ...], int | None}
