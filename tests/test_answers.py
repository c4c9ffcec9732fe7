"""Fresh arithmetic problems, exact answers, and the batch of problems that is scored for perplexity and KL."""

import types

import numpy as np
import pytest

from configs import hard
from melt_jax.checkpoints.orbax import open_model
from melt_jax.config import freeze
from melt_jax.data import arithmetic
from melt_jax.inference import answers
from melt_jax.model.model import reconfigure
from tests.helpers.tiny import make_model


def test_fresh_problems_depend_on_the_seed_alone():
    """No training step uses them."""
    problems = answers.fresh_problems(1, 12, 2, 4)
    assert problems == answers.fresh_problems(1, 12, 2, 4)
    assert problems != answers.fresh_problems(2, 12, 2, 4)
    assert [problem.question.count(";") for problem in problems] == [2, 3, 4] * 4
    trained = [arithmetic.make_problem(np.random.Generator(np.random.Philox(key=[1, step])), 2) for step in range(50)]
    assert not {problem.question for problem in problems} & {problem.question for problem in trained}


def test_only_exact_answers_count(monkeypatch):
    """A wrong answer, a missing stop token or an extra token is not exact; a completion also needs exact steps."""
    problems = answers.fresh_problems(1, 8, 2, 3)
    stop, answer = arithmetic.STOP, arithmetic.ANSWER
    made = [problem.completion for problem in problems]
    made[0] = [answer, *made[0][-2:]]  # no steps
    made[1] = [*made[1][:-2], arithmetic.VOCABULARY["x"], stop]  # a wrong answer
    made[2] = made[2][:-1]  # no stop token
    made[3] = [*made[3][:-1], made[3][-2], stop]  # an extra token
    asked, pieces = [], []

    def generate(model, prompts, options):
        first = sum(asked)
        asked.append(len(prompts))
        assert options.max_new_tokens > max(map(len, made))
        assert (options.prefill_chunk, options.stop) == (4, (stop,))
        return types.SimpleNamespace(tokens=made[first : first + len(prompts)])

    monkeypatch.setattr(answers, "generate", generate)
    found = answers.exact_answers(make_model(), problems, 4, batch=5, before_piece=pieces.append)
    assert asked == [5, 3]
    assert pieces == ["problems 1 to 5 of 8", "problems 6 to 8 of 8"]
    assert found.answer_exact.tolist() == [True, False, False, False, True, True, True, True]
    assert found.completion_exact.tolist() == [False, False, False, False, True, True, True, True]
    assert found.by_definitions() == [(2, 4, 0.75, 0.5), (3, 4, 0.5, 0.5)]


def test_batch_of_problems_scores_their_completions():
    problems = answers.fresh_problems(3, 4)
    batch = answers.problem_batch(problems)
    for row, problem in enumerate(problems):
        scored = batch.loss_mask[row].astype(bool)
        assert batch.targets[row][scored].tolist() == problem.completion
        assert batch.tokens[row][batch.segments[row] == 1].tolist() == problem.prompt + problem.completion


@pytest.mark.slow
def test_hard_teacher_needs_its_loops_and_entries():
    """It answers most problems of its recipe; with one loop, or a single shared KV entry, untrained, it answers few."""
    config = freeze(hard.get_config())
    teacher = open_model(config.teacher, dtype="float32")
    problems = answers.fresh_problems(7, 40, config.data.low, config.data.high, config.data.hops)

    def exact(**changes):
        return answers.exact_answers(reconfigure(teacher, **changes), problems, 16).answer_exact.mean()

    assert exact() >= 0.8
    assert exact(loops=1) < 0.4 and exact(gate="last") < 0.4
