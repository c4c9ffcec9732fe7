"""Log-likelihoods of continuations: their values, which depend on model, chunk and request only."""

import dataclasses

import numpy as np

from melt_jax.inference.likelihood import Continuation, score_continuations
from melt_jax.model.model import reconfigure
from tests.helpers.tiny import TINY, looplm, make_model, run

CHUNK = 4
REQUESTS = [
    Continuation([3, 1, 4, 1, 5, 9], [2, 6]),
    Continuation([7], [1, 8, 2, 8, 1]),
    Continuation([5, 5, 5], [5]),
    Continuation(list(range(1, 25)), [3, 0, 7]),
]


def scores(model, requests=REQUESTS, rows=3):
    """The scores in the order of the requests."""
    found = dict(score_continuations(model, requests, CHUNK, rows))
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


def logits_after(model, request, loop=-1):
    """[tokens, V]: the logits that predict the tokens of a continuation, run alone and unpadded."""
    ids = np.array([[*request.context, *request.tokens]])[:, :-1]
    hidden = run(model, ids, chunk_size=CHUNK).hidden[loop]
    return np.asarray(model.logits(hidden))[0, len(request.context) - 1 :]


def test_scores_follow_their_definition(float64):
    """Log-probabilities are summed over the continuation alone, in batches of mixed lengths."""
    model = make_model(dataclasses.replace(TINY, window=2))
    for request, score in zip(REQUESTS, scores(model)):
        logits = logits_after(model, request)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = sum(row[token] for row, token in zip(log_p, request.tokens))
        np.testing.assert_allclose(score.log_probability, want, rtol=1e-10)
        assert score.greedy == (logits.argmax(-1).tolist() == list(request.tokens))


def test_greedy_continuations_are_recognised(float64):
    model = make_model()
    context, tokens = [3, 1, 4], []
    for _ in range(3):
        tokens.append(int(logits_after(model, Continuation([*context, *tokens], [0]))[-1].argmax()))
    requests = [Continuation(context, tokens), Continuation(context, [*tokens[:-1], (tokens[-1] + 1) % TINY.vocab])]
    assert [score.greedy for score in scores(model, requests)] == [True, False]


def test_batches_do_not_change_scores(float64):
    model = make_model()
    for request, score in zip(REQUESTS, scores(model, rows=4)):
        (alone,) = scores(model, [request], rows=1)
        np.testing.assert_allclose(score.log_probability, alone.log_probability, rtol=1e-10)


def test_early_exit_selects_the_logits(float64):
    """With a threshold that loop 1 always reaches, continuations are scored by loop 1, as generation would."""
    model = reconfigure(looplm(make_model()), exit_threshold=1e-9)
    for request, score in zip(REQUESTS, scores(model)):
        logits = logits_after(model, request, loop=0)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = sum(row[token] for row, token in zip(log_p, request.tokens))
        np.testing.assert_allclose(score.log_probability, want, rtol=1e-10)
