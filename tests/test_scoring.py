"""Scoring: exact answers, perplexity and KL per loop, the table."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from melt_jax import ModelConfig
from melt_jax.data import arithmetic
from melt_jax.inference import scoring
from tests.helpers.tiny import TINY, make_model, random_batch, run, with_config

LOOPLM = dataclasses.replace(TINY, gate="none")
BATCH = random_batch(3, 11)
CHUNK = 4


def teacher():
    return with_config(make_model(), LOOPLM)


def log_probabilities(model, chunk, loops=None):
    """[T, B, S, V] float64 of `BATCH`."""
    hidden = run(model, BATCH.tokens, chunk_size=chunk, segments=BATCH.segments, loops=loops).hidden
    logits = np.asarray(model.logits(hidden), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(log_p, log_q):
    """Mean KL of each loop over the scored tokens of `BATCH`."""
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return (divergence * BATCH.loss_mask).sum((-1, -2)) / BATCH.loss_mask.sum()


@pytest.mark.parametrize("rows", [2, 16])
def test_perplexity_and_kl_are_what_the_distributions_say(rows):
    """However many sequences run at once: two leave a last row of padding, which counts nothing."""
    scores = scoring.perplexity_and_kl(make_model(), teacher(), BATCH, CHUNK, rows=rows)
    log_p, log_q = log_probabilities(teacher(), 11), log_probabilities(make_model(), CHUNK)
    np.testing.assert_allclose(scores.kl, kl(log_p, log_q), rtol=1e-4)
    assert scores.final_kl == pytest.approx(scores.kl[-1], rel=1e-6)
    told = np.take_along_axis(log_q, BATCH.targets[None, ..., None], axis=-1)[..., 0]
    mean = (told * BATCH.loss_mask).sum((-1, -2)) / BATCH.loss_mask.sum()
    np.testing.assert_allclose(scores.perplexity, np.exp(-mean), rtol=1e-4)
    assert scores.tokens == BATCH.loss_mask.sum()


def test_the_gap_between_chunks_is_a_melts_and_not_a_looplms():
    melt, looplm = (
        [scoring.perplexity_and_kl(model, teacher(), BATCH, chunk, rows=2) for chunk in (CHUNK, 1)]
        for model in (make_model(), teacher())
    )
    assert abs(melt[0].final_kl - melt[1].final_kl) > 1e-3
    np.testing.assert_allclose(looplm[0].perplexity, looplm[1].perplexity, rtol=1e-4)
    for scores in looplm:
        np.testing.assert_allclose(scores.kl, 0, atol=1e-5)


def test_a_teacher_that_leaves_after_one_loop():
    """Loop by loop it is the teacher; its last loop is compared with the teacher's last."""
    scores = scoring.perplexity_and_kl(teacher(), teacher(), BATCH, 11, loops=1, rows=2)
    np.testing.assert_allclose(scores.kl, [0], atol=1e-5)
    log_p = log_probabilities(teacher(), 11)
    assert scores.final_kl == pytest.approx(kl(log_p[-1], log_p[0]), rel=1e-4)


def test_what_cannot_be_compared_is_an_error():
    other = jax.eval_shape(lambda: make_model())
    other.config = dataclasses.replace(LOOPLM, vocab=31)
    with pytest.raises(ValueError, match="the teacher has 31 tokens, the model 29"):
        scoring.perplexity_and_kl(make_model(), other, BATCH, CHUNK)
    with pytest.raises(ValueError, match="no token of the batch is scored"):
        scoring.perplexity_and_kl(make_model(), None, BATCH._replace(loss_mask=np.zeros_like(BATCH.tokens)), CHUNK)


def test_fresh_problems_are_a_function_of_the_seed_and_of_no_training_step():
    problems = scoring.fresh_problems(1, 12, 2, 4)
    assert problems == scoring.fresh_problems(1, 12, 2, 4)
    assert problems != scoring.fresh_problems(2, 12, 2, 4)
    assert [problem.question.count(";") for problem in problems] == [2, 3, 4] * 4
    trained = [arithmetic.make_problem(np.random.Generator(np.random.Philox(key=[1, step])), 2) for step in range(50)]
    assert not {problem.question for problem in problems} & {problem.question for problem in trained}


def test_answers_are_compared_with_the_truth(monkeypatch):
    problems = scoring.fresh_problems(1, 8, 2, 3)
    stop, answer = arithmetic.STOP, arithmetic.ANSWER
    made = [problem.completion for problem in problems]
    made[0] = [answer, *made[0][-2:]]  # the answer alone
    made[1] = [*made[1][:-2], arithmetic.VOCABULARY["x"], stop]  # another answer
    made[2] = made[2][:-1]  # no end
    made[3] = [*made[3][:-1], made[3][-2], stop]  # more than the answer
    asked = []

    def generate(model, prompts, limit, prefill_chunk, stop, loops, exit_threshold):
        first = sum(asked)
        asked.append(len(prompts))
        assert limit > max(map(len, made))
        return types.SimpleNamespace(tokens=made[first : first + len(prompts)])

    monkeypatch.setattr(scoring, "generate", generate)
    answers = scoring.exact_answers(None, problems, 4, batch=5)
    assert asked == [5, 3]
    assert answers.answer_exact.tolist() == [True, False, False, False, True, True, True, True]
    assert answers.completion_exact.tolist() == [False, False, False, False, True, True, True, True]
    assert answers.by_definitions() == [(2, 4, 0.75, 0.5), (3, 4, 0.5, 0.5)]


def test_a_batch_of_problems_scores_their_completions():
    problems = scoring.fresh_problems(3, 4)
    batch = scoring.problem_batch(problems)
    for row, problem in enumerate(problems):
        scored = batch.loss_mask[row].astype(bool)
        assert batch.targets[row][scored].tolist() == problem.completion
        assert batch.tokens[row][batch.segments[row] == 1].tolist() == problem.prompt + problem.completion


def test_a_row_is_measured_and_printed():
    config = ModelConfig(
        vocab=64, width=8, layers=1, loops=2, heads=2, kv_heads=2, head_width=4, feed_forward=8, max_positions=256
    )
    looplm = make_model(config)
    problems = scoring.fresh_problems(1, 2, 2, 2)
    scores = scoring.measure(looplm, looplm, problems, scoring.problem_batch(problems), 8)
    assert scores.cache_bytes_per_token == 2 * 2 * 2 * 4 * 4
    assert scores.problems == 2
    rows = {"teacher": json.loads(json.dumps(dataclasses.asdict(scores))), "same": scores}
    lines = scoring.table(rows).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[1:] == lines[2].split()[1:]
    assert lines[1].split()[-4:] == ["2", "0.0000", "0.0000", "128"]
    assert "–" in scoring.table({"empty": scoring.measure(looplm, None)})
    assert "<think>" in scoring.sample(looplm, 1, 8)
