"""The training stream: a function of (seed, step), whole documents, and only predictable tokens scored."""

import dataclasses
import json

import numpy as np
import pytest

from configs import base, nano
from melt_jax.config import DataConfig, ModelConfig, freeze
from melt_jax.data import arithmetic
from melt_jax.data.stream import batch_maker, batches, data_errors, dataset_size, evaluation_batch, run_errors
from melt_jax.inference.answers import fresh_problems
from tests.test_token_files import write

NANO = ModelConfig(
    vocab=64, width=96, layers=2, heads=6, kv_heads=6, head_width=16, feed_forward=256, max_positions=512
)


@pytest.fixture(params=["arithmetic", "tokens"])
def data(request, tmp_path):
    if request.param == "arithmetic":
        return DataConfig(length=128, batch=3)
    tokens = np.random.default_rng(0).integers(64, size=16 * 256, dtype=np.uint16)
    return DataConfig("tokens", write(tmp_path / "x.npy", tokens=tokens), length=16, batch=3)


def assert_same(one, other):
    for name, a, b in zip(one._fields, one, other):
        np.testing.assert_array_equal(a, b, err_msg=name)


# The stream


def test_batch_is_a_function_of_seed_and_step(data):
    whole = list(batches(data, 5, 0, 9))
    assert len(whole) == 9
    for start in (1, 4, 8):
        for one, other in zip(batches(data, 5, start, 9), whole[start:], strict=True):
            assert_same(one, other)
    assert_same(batch_maker(data, 5)(7), whole[7])
    assert list(batches(data, 5, 4, 4)) == []


def test_seeds_and_steps_differ(data):
    first = [next(batches(data, seed, step, step + 1)).tokens for seed in (0, 1, 2) for step in (0, 1, 2)]
    assert len({x.tobytes() for x in first}) == len(first)


def test_batches_have_shape_and_dtype(data):
    for field in next(batches(data, 0, 0, 1)):
        assert field.shape == (3, data.length) and field.dtype == np.int32


def test_every_epoch_is_another_permutation(tmp_path):
    tokens = np.arange(8 * 4).reshape(8, 4)
    data = DataConfig("tokens", write(tmp_path / "x.npy", tokens=tokens), length=4, batch=4)
    orders = []
    for seed in (0, 1):
        seen = np.concatenate([b.tokens[:, 0] // 4 for b in batches(data, seed, 0, 6)])
        orders += [tuple(epoch) for epoch in seen.reshape(3, 8)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len(set(orders)) == 6


def test_batches_may_span_epochs(tmp_path):
    data = DataConfig("tokens", write(tmp_path / "x.npy", tokens=np.arange(10).reshape(5, 2)), length=2, batch=4)
    seen = np.concatenate([b.tokens[:, 0] // 2 for b in batches(data, 0, 0, 5)])
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in seen.reshape(4, 5))


@pytest.mark.parametrize("seed, start, stop, message", [(-1, 0, 1, "seed"), (2**32, 0, 1, "seed"), (0, 3, 2, "steps")])
def test_out_of_range_seed_and_steps_are_errors(seed, start, stop, message):
    with pytest.raises(ValueError, match=message):
        batches(DataConfig(), seed, start, stop)


# Arithmetic


def evaluate(question):
    """The answer to a question, by recursive substitution."""
    *definitions, asked = question.split(";")
    meaning = dict(text.split("=") for text in definitions)
    value = lambda text: int(text) if text.isdigit() else compute(meaning[text])

    def compute(text):
        for sign in "+-*":
            if sign in text:
                left, right = map(value, text.split(sign))
                return {"+": left + right, "-": left - right, "*": left * right}[sign] % 10
        return value(text)

    assert len(meaning) == len(definitions) and asked[-1] == "?"
    return value(asked[:-1])


def documents(row):
    """[(segment, indices)] of the documents of a sequence."""
    return [(s, np.flatnonzero(row.segments == s)) for s in np.unique(row.segments) if s]


def arithmetic_rows(score="completion", steps=6, **kwargs):
    data = DataConfig(length=128, batch=8, score=score, **kwargs)
    for batch in batches(data, 3, 0, steps):
        yield from (type(batch)(*row) for row in zip(*batch))


def as_text(ids):
    names = {i: token for token, i in arithmetic.VOCABULARY.items()}
    return "".join(names[i] for i in ids)


def test_problems_are_whole_and_correct():
    lengths = set()
    for row in arithmetic_rows():
        for _, where in documents(row):
            assert np.all(np.diff(where) == 1)
            text = as_text(row.tokens[where])
            begin, question, steps, answer, end = _split(text)
            assert (begin, end) == ("", "") and int(answer) == evaluate(question)
            for step in steps.split(";"):
                name, *sides = step.split("=")
                stated = question.split(";")[:-1]
                assert int(sides[-1]) == evaluate(";".join([*stated, f"{name}?"]))
                assert all(evaluate(";".join([*stated, f"x={side}", "x?"])) == int(sides[-1]) for side in sides)
            definitions = question.count(";")
            assert len(where) == arithmetic.problem_tokens(definitions)
            lengths.add(definitions)
    assert lengths == {2, 3, 4, 5}


def _split(text):
    begin, rest = text.split("<|im_start|>")
    question, rest = rest.split("<think>")
    steps, rest = rest.split("</think>")
    answer, end = rest.split("<|im_end|>")
    return begin, question, steps, answer, end


@pytest.mark.parametrize("score", ["completion", "all"])
def test_targets_and_mask_stay_within_a_problem(score):
    for row in arithmetic_rows(score):
        padding = row.segments == 0
        assert not row.loss_mask[padding].any() and not row.targets[padding].any() and not row.tokens[padding].any()
        for _, where in documents(row):
            np.testing.assert_array_equal(row.targets[where[:-1]], row.tokens[where[1:]])
            assert row.targets[where[-1]] == 0 and row.loss_mask[where[-1]] == 0
            tokens = list(row.tokens[where])
            first = tokens.index(arithmetic.THINK) if score == "completion" else 0
            np.testing.assert_array_equal(row.loss_mask[where[:-1]], np.arange(len(where) - 1) >= first)


def test_definitions_stay_within_their_bounds():
    for row in arithmetic_rows(low=3, high=4):
        for _, where in documents(row):
            assert len(where) in (arithmetic.problem_tokens(3), arithmetic.problem_tokens(4))


def chain(question):
    """The names on which the asked one depends, from the constant to the asked one; each has one definition."""
    *definitions, asked = question.split(";")
    meaning = dict(text.split("=") for text in definitions)
    assert len(meaning) == len(definitions)
    names = [asked[0]]
    while not meaning[names[0]].isdigit():
        names.insert(0, meaning[names[0]][0])
    return names


@pytest.mark.parametrize("hops", [1, 2, 3, 20])
@pytest.mark.parametrize("definitions", range(1, 11))
def test_steps_state_the_value_of_every_hop(definitions, hops):
    """The steps are the chain of definitions, with the values of the constant, of every h-th and of the asked name."""
    make = lambda seed: arithmetic.make_problem(np.random.default_rng(seed), definitions, hops)
    value = lambda question, name: evaluate(";".join([*question.split(";")[:-1], f"{name}?"]))
    for seed in range(20):
        problem = make(seed)
        names = chain(problem.question)
        written = set(names[::hops] + names[-1:])
        steps = [f"={value(problem.question, name)}" if name in written else "" for name in names]
        stated = {text[0]: text for text in problem.question.split(";")[:-1]}
        steps = [stated[names[0]]] + [stated[name] + step for name, step in zip(names[1:], steps[1:])]
        assert len(names) == definitions and problem == make(seed)
        assert problem.steps == ";".join(steps) and problem.answer == str(evaluate(problem.question))
        assert len(problem.prompt + problem.completion) == arithmetic.problem_tokens(definitions, hops)


def test_stream_and_evaluation_use_the_hops():
    values = {3: 2, 4: 3, 5: 3, 6: 4, 7: 4}
    for row in arithmetic_rows(low=3, high=7, hops=2):
        for _, where in documents(row):
            _, question, steps, *_ = _split(as_text(row.tokens[where]))
            assert values[question.count(";")] == 1 + sum(step.count("=") - 1 for step in steps.split(";"))
    made = [problem.steps.count("=") for problem in fresh_problems(1, 10, 3, 7, 2)]
    assert made == [definitions + count - 1 for definitions, count in values.items()] * 2


def test_task_does_not_change():
    """Published results depend on the problems of each seed and step."""
    for hops, expected in ((1, FIRST_PROBLEM), (2, FIRST_PROBLEM_OF_TWO_HOPS)):
        batch = arithmetic.arithmetic_batch(0, 7, DataConfig(batch=1, length=64, hops=hops))
        assert as_text(batch["tokens"][0][batch["segments"][0] == 1]) == expected
    assert list(arithmetic.VOCABULARY.values()) == list(range(52)) and as_text([5, 6, 7, 17, 43, 51]) == "\n 0a=:"


FIRST_PROBLEM = "<|im_start|>j=d*2;d=b*2;b=2;g=j*3;g?<think>b=2;d=b*2=4;j=d*2=8;g=j*3=4</think>4<|im_end|>"
FIRST_PROBLEM_OF_TWO_HOPS = "<|im_start|>j=d*2;d=b*2;b=2;g=j*3;g?<think>b=2;d=b*2;j=d*2=8;g=j*3=4</think>4<|im_end|>"


def test_unknown_score_is_an_error():
    with pytest.raises(ValueError, match='score: expected "completion" or "all", found \'completions\''):
        arithmetic.arithmetic_batch(0, 0, DataConfig(batch=1, length=64, score="completions"))


# Configurations

CONFIGS = {
    "data.batch: expected at least 1 sequence, found 0": DataConfig(batch=0),
    "data.length: expected at least 2 tokens, found 1": DataConfig(length=1),
    "data.length: expected at most the model's max_positions, 512, found 1024": DataConfig(length=1024),
    'expected one of arithmetic, tokens, records, found "arithmetics"; did you mean "arithmetic"?': DataConfig(
        "arithmetics"
    ),
    'data.path: expected none for source "arithmetic", found a/x.npy; remove it': DataConfig(path="a/x.npy"),
    'data.score: expected one of completion, all, found "al"; did you mean "all"?': DataConfig(score="al"),
    "expected 1 <= low <= high <= 10 definitions, found 5 and 4": DataConfig(low=5, high=4),
    "data.high: expected a problem within data.length, 69 tokens, found 70 tokens for 5": DataConfig(length=69),
    "expected a problem within data.length, 65 tokens, found 66 tokens for 5": DataConfig(length=65, hops=2),
    'data.path: expected a .npy or .npz file for source "tokens", found none': DataConfig("tokens"),
    "data.path: nowhere.npy: expected a file, found none": DataConfig("tokens", "nowhere.npy"),
}


@pytest.mark.parametrize("message", CONFIGS)
def test_each_config_error_is_reported(message):
    assert any(message in text for text in data_errors(CONFIGS[message], NANO))


def test_all_config_errors_are_listed():
    found = data_errors(DataConfig(length=1, batch=0, low=0, score="x", path="y.npy"), ModelConfig(vocab=40))
    assert len(found) == 6 and any(
        "expected at least the 52 token ids of arithmetic, found 40" in text for text in found
    )


def test_good_configs_have_no_errors(data):
    assert data_errors(data, NANO) == []


# A run's two sources


def run_config(training, **evaluation):
    config = base.get_config()
    config.teacher = "looplm"
    config.data.path, config.data.length, config.data.batch = training, 4, 2
    config.evaluation.update(evaluation)
    return freeze(config)


def test_evaluation_uses_sequences_kept_from_training(tmp_path):
    train, other = (str(tmp_path / name) for name in ("train.npy", "other.npy"))
    np.save(train, np.arange(24).reshape(6, 4))
    np.save(other, np.arange(24, 36).reshape(3, 4))
    config = run_config(train, sequences=3, path=other)
    assert run_errors(config, NANO) == []
    batch = evaluation_batch(config)
    assert dataset_size(config.data) == 6 and dataset_size(DataConfig()) is None
    assert sorted(batch.tokens.ravel()) == list(range(24, 36))

    np.save(tmp_path / "longer.npy", np.zeros((3, 5), np.int32))
    for evaluation, message in (
        ({"sequences": 3}, 'expected held-out sequences for source "tokens", found none'),
        ({"sequences": 3, "path": f"{tmp_path}/./train.npy"}, "expected held-out sequences, found data.path"),
        ({"sequences": 4, "path": other}, "evaluation.sequences: expected at most the 3 sequences"),
        ({"sequences": 3, "path": "nowhere.npy"}, "evaluation.path: nowhere.npy: expected a file, found none"),
        ({"sequences": 3, "path": f"{tmp_path}/longer.npy"}, "expected sequences of 4 tokens, found 5"),
        ({"path": other}, "remove it, or set evaluation.sequences above 0"),
    ):
        (found,) = run_errors(run_config(train, **evaluation), NANO)
        assert message in found and found.startswith("evaluation.")


@pytest.mark.parametrize("gate", ["elementwise", "last"])
def test_melt_is_refused_as_a_teacher(gate):
    config = nano.get_config()
    config.data.length = 20
    melt = dataclasses.replace(NANO, gate=gate)
    teacher, data = run_errors(freeze(config), melt)
    assert teacher == (
        f"teacher: expected a LoopLM, such as melt_jax.convert --gate=none writes, found a MELT (gate {gate}) in"
        " melt_jax/assets/ouro_nano"
    )
    assert data.startswith("data.high")


def test_arithmetic_evaluation_needs_no_file():
    config = nano.get_config()
    assert run_errors(freeze(config), NANO) == []
    config.evaluation.path = "x.npy"
    (found,) = run_errors(freeze(config), NANO)
    assert found == 'evaluation.path: expected none, found "x.npy"; remove it: source "arithmetic" reads no file'


@pytest.mark.parametrize("score", ["completion", "all"])
def test_evaluation_and_training_sequences_are_disjoint(score):
    """Even with equal seeds, no step trains on the arithmetic sequences of the evaluation."""
    config = dataclasses.replace(
        freeze(nano.get_config()), data=DataConfig(length=64, batch=4, low=3, high=4, score=score)
    )
    evaluation = dataclasses.replace(config.evaluation, seed=5, sequences=4)
    config = dataclasses.replace(config, seed=5, evaluation=evaluation)
    batch = evaluation_batch(config)
    assert_same(batch, evaluation_batch(dataclasses.replace(config, seed=6)))
    rows = {row.tobytes() for training in batches(config.data, 5, 0, 20) for row in training.tokens}
    assert batch.tokens.shape == (4, 64) and not rows & {row.tobytes() for row in batch.tokens}
    some = np.array([0, 3])
    assert_same(type(batch)(*(field[some] for field in batch)), evaluation_batch(config, some))


def test_arithmetic_needs_its_own_tokenizer(tmp_path):
    """A checkpoint with another tokenizer is refused for training and evaluation on arithmetic."""
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
        )
    )
    config = freeze(nano.get_config())
    assert run_errors(config, NANO, "melt_jax/assets/ouro_nano") == []
    (message,) = run_errors(config, NANO, tmp_path)
    assert message.startswith(f"data.source: {tmp_path}: expected the tokenizer of the arithmetic task")
    train = str(tmp_path / "train.npy")
    np.save(train, np.arange(24).reshape(6, 4))
    for evaluation in ({"problems": 3}, {"sample": True}):
        assert run_errors(run_config(train, **evaluation), NANO) == []
        (message,) = run_errors(run_config(train, **evaluation), NANO, tmp_path)
        assert message.startswith(f"evaluation.problems or sample: {tmp_path}: expected the tokenizer")
    assert run_errors(run_config(train), NANO, tmp_path) == []
