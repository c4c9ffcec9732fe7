"""Perplexity and KL per loop: their values, which depend only on the models and the tokens."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from melt_jax.config import InputError
from melt_jax.data.batch import Batch
from melt_jax.inference import scoring
from melt_jax.model.model import reconfigure
from tests.helpers.devices import several_devices
from tests.helpers.tiny import TINY, looplm, make_model, random_batch, run

ROOT = pathlib.Path(__file__).parent.parent
LENGTH, CHUNK = 11, 4
BATCH = random_batch(3, LENGTH)


def teacher():
    return looplm(make_model())


def log_probabilities(model, batch, chunk):
    """[T, B, S, V] of whole sequences."""
    hidden = run(model, batch.tokens, chunk_size=chunk, segments=batch.segments).hidden
    logits = np.asarray(model.logits(hidden))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def mean(values, batch):
    """The mean of [T, B, S] values over the scored tokens."""
    return (values * batch.loss_mask).sum((-1, -2)) / batch.loss_mask.sum()


def kl(log_p, log_q, batch):
    return mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), batch)


def test_perplexity_and_kl_match_the_distributions(float64):
    scores = scoring.perplexity_and_kl(make_model(), teacher(), BATCH, CHUNK, rows=2)
    log_p, log_q = log_probabilities(teacher(), BATCH, LENGTH), log_probabilities(make_model(), BATCH, CHUNK)
    np.testing.assert_allclose(scores.kl, kl(log_p, log_q, BATCH), rtol=1e-10)
    assert scores.final_kl == pytest.approx(scores.kl[-1], rel=1e-12)
    at_target = np.take_along_axis(log_q, BATCH.targets[None, ..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.perplexity, np.exp(-mean(at_target, BATCH)), rtol=1e-10)
    assert scores.tokens == BATCH.loss_mask.sum()


@pytest.mark.slow
def test_sweeps_bring_chunks_to_decoding(float64):
    """KL(decoding ‖ chunks) follows its definition, falls with every sweep, and is 0 once C ≤ sweeps · (W + 1)."""
    model = lambda sweeps: make_model(dataclasses.replace(TINY, window=1, sweeps=sweeps))
    found = [scoring.kl_to_decoding(model(sweeps), BATCH, 6, 9) for sweeps in (1, 2, 3)]
    start = Batch(*(field[:, :9] for field in BATCH))
    wanted = kl(log_probabilities(model(1), start, 1), log_probabilities(model(1), start, 6), start)[-1]
    assert found[0] == pytest.approx(wanted, rel=1e-9)
    assert found[0] > found[1] > 1e-9 and abs(found[2]) < 1e-13


def test_gate_openness_is_the_mean_over_scored_tokens(float64):
    """Per loop and layer; the first loop copies its input, so its gate is open. A LoopLM has none."""
    scores = scoring.perplexity_and_kl(make_model(), None, BATCH, CHUNK, rows=2)
    openness = run(make_model(), BATCH.tokens, chunk_size=CHUNK, segments=BATCH.segments).gate_openness
    np.testing.assert_allclose(scores.gate_openness, mean(openness, BATCH), rtol=1e-10)
    assert scores.gate_openness[0] == pytest.approx([1.0] * TINY.layers)
    assert scoring.perplexity_and_kl(teacher(), None, BATCH, CHUNK, rows=2).gate_openness == []


def test_scores_do_not_depend_on_rows(float64):
    """With 2 rows the last piece is one sequence and one of padding; 16 rows are more than the batch has."""
    two, all_at_once = (scoring.perplexity_and_kl(make_model(), teacher(), BATCH, CHUNK, rows=n) for n in (2, 16))
    np.testing.assert_allclose(two.kl, all_at_once.kl, rtol=1e-10)
    np.testing.assert_allclose(two.perplexity, all_at_once.perplexity, rtol=1e-10)


@pytest.mark.parametrize(("length", "chunk", "size"), [(10_000, 500, 500), (512, 1, 512), (600, 1, 300), (11, 4, 12)])
def test_pieces_hold_whole_chunks(length, chunk, size):
    assert scoring.piece_size(length, chunk) == size


@pytest.mark.slow
def test_first_tokens_match_at_both_chunk_sizes(float64, monkeypatch):
    """Chunked scores and decoding match, each in several pieces; for a MELT the two differ."""
    monkeypatch.setattr(scoring, "PIECE_TOKENS", 4)
    melt = scoring.compare(make_model(), teacher(), BATCH, CHUNK, 6, rows=2)
    first = Batch(*(field[:, :6] for field in BATCH))
    assert melt.chunked.tokens == BATCH.loss_mask.sum()
    assert melt.chunked_start.tokens == melt.decoding.tokens == first.loss_mask.sum()
    log_p = log_probabilities(teacher(), first, LENGTH)
    for scores in (melt.chunked_start, melt.decoding):
        want = kl(log_p, log_probabilities(make_model(), first, scores.chunk), first)
        np.testing.assert_allclose(scores.kl, want, rtol=1e-10)
    assert abs(melt.chunked_start.final_kl - melt.decoding.final_kl) > 1e-3


def test_decoding_scores_the_requested_tokens(monkeypatch):
    """With 0 tokens decoding is not measured; with the whole sequence no tokens are scored twice."""
    asked = []

    def perplexity_and_kl(model, teacher, batch, chunk, *_):
        asked.append((batch.tokens.shape[1], chunk))
        return scoring.LoopScores(chunk, 1, [], [], None)

    monkeypatch.setattr(scoring, "perplexity_and_kl", perplexity_and_kl)
    for tokens, want in ((0, [(11, 4)]), (6, [(11, 4), (6, 4), (6, 1)]), (512, [(11, 4), (11, 1)])):
        asked.clear()
        found = scoring.compare(make_model(), None, BATCH, CHUNK, tokens)
        assert asked == want
        assert (found.decoding is None) == (tokens == 0)
    assert found.chunked_start is found.chunked


def test_decoding_without_a_scored_token_is_named():
    unscored = BATCH._replace(loss_mask=np.arange(BATCH.tokens.shape[1])[None] * np.ones_like(BATCH.loss_mask) > 3)
    with pytest.raises(InputError, match=r"decoding_tokens: expected 0 or at least 5, .*, found 4$"):
        scoring.first_tokens(unscored, 4)
    assert scoring.first_tokens(unscored, 5).loss_mask.sum() == len(BATCH.tokens)


def test_exceptions_before_a_piece_propagate(float64):
    pieces = []

    def exit_at_second(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise SystemExit(75)

    with pytest.raises(SystemExit):
        scoring.perplexity_and_kl(make_model(), teacher(), BATCH, CHUNK, rows=2, before_piece=exit_at_second)
    assert pieces == [f"chunk 4, 11 tokens of sequences {which} of 3" for which in ("1 to 2", "3 to 3")]


def test_different_loop_counts_can_be_compared(float64):
    """Loops of both models are compared one by one, and the last loop of one with the last loop of the other."""
    scores = scoring.perplexity_and_kl(reconfigure(teacher(), loops=1), teacher(), BATCH, LENGTH, rows=2)
    np.testing.assert_allclose(scores.kl, [0], atol=1e-12)
    log_p = log_probabilities(teacher(), BATCH, LENGTH)
    assert scores.final_kl == pytest.approx(kl(log_p[-1], log_p[0], BATCH), rel=1e-10)


def test_incomparable_models_are_errors():
    other = jax.eval_shape(make_model)
    other.config = dataclasses.replace(TINY, gate="none", vocab=31)
    with pytest.raises(InputError, match=r"expected a vocabulary of 29 tokens.*found 31"):
        scoring.perplexity_and_kl(make_model(), other, BATCH, CHUNK)
    unscored = BATCH._replace(loss_mask=np.zeros_like(BATCH.tokens))
    with pytest.raises(InputError, match="expected at least one scored token"):
        scoring.perplexity_and_kl(make_model(), None, unscored, CHUNK)


def test_memory_is_linear_in_the_sequence(monkeypatch):
    """Longer sequences add KV entries and tokens to the temporaries, but no hidden states or logits."""
    model = make_model()
    monkeypatch.setattr(scoring, "PIECE_TOKENS", 32)

    def temporaries(length):
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, length), x.dtype), BATCH)
        compiled = scoring.comparison_sums.lower(model, teacher(), batch, 32).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Bytes per position of two sequences: keys and values of one shared entry and of a per-loop entry for each loop.
    entries = 2 * 2 * TINY.layers * TINY.kv_heads * TINY.head_width * 4 * (1 + TINY.loops)
    tokens = 2 * 4 * len(BATCH)
    assert (temporaries(64 + 512) - temporaries(64)) / 512 < 2 * entries + 2 * tokens


@pytest.mark.slow
def test_meshes_give_the_single_device_result():
    """Weights split over fsdp and tensor, gathered at each use or before; sequences split over the batch axes."""
    environment = several_devices(8)
    command = [sys.executable, "-m", "tests.helpers.mesh_scores"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    gaps = json.loads(done.stdout.splitlines()[-1])
    assert set(gaps) == {"gathered at use", "gathered before"}
    assert all(gap < 1e-10 for gap in gaps.values()), gaps
