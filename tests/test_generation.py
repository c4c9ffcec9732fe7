"""Generation: chunks, batches, sampling, stops, loops, exits, compilations."""

import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import load_model
from melt_jax.inference.generation import (
    Sampling,
    SamplingRequest,
    check_request,
    decode_block,
    filter_logits,
    first_tokens,
    generate,
    next_logits,
    prefill,
    sample_tokens,
)
from tests.helpers.tiny import TINY, make_model, random_tokens, run, with_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
LOOPLM = dataclasses.replace(TINY, gate="none")
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (2, 5, 10)]
NEW, CHUNK = 6, 4  # the same in most tests, that they may share compilations


def looplm():
    return with_config(make_model(), LOOPLM)


@pytest.mark.parametrize("chunk", [1, 4])
def test_prefill_of_a_looplm_does_not_depend_on_the_chunk(chunk):
    whole, hidden, _, _ = prefill(looplm(), PROMPTS, NEW, 10)
    cache, other, _, _ = prefill(looplm(), PROMPTS, NEW, chunk)
    chex.assert_trees_all_close(other, hidden, atol=2e-5)
    slots = whole.length
    seen = np.arange(slots) < np.array([len(p) for p in PROMPTS])[:, None]
    for one, two in zip(jax.tree.leaves(whole.per_loop), jax.tree.leaves(cache.per_loop)):
        np.testing.assert_allclose(one[:, :, seen], two[:, :, :, :slots][:, :, seen], atol=2e-5)


def test_prefill_of_a_melt_depends_on_the_chunk():
    hidden = [prefill(make_model(), PROMPTS, NEW, chunk)[1][:, -1] for chunk in (1, CHUNK)]
    assert np.abs(hidden[0] - hidden[1]).max() > 1e-3


@pytest.mark.parametrize("gate", ["elementwise", "none"])
def test_decoding_is_a_sequence_of_chunks_of_one(gate):
    model = make_model() if gate != "none" else looplm()
    generated = generate(model, PROMPTS, NEW, prefill_chunk=1).tokens[-1]
    hidden = run(model, np.array([PROMPTS[-1] + generated]), chunk_size=1).hidden
    greedy = np.argmax(model.logits(hidden[-1]), axis=-1)[0]
    assert generated == greedy[len(PROMPTS[-1]) - 1 : -1].tolist()


@pytest.mark.parametrize("gate", ["elementwise", "none"])
def test_each_prompt_of_a_batch_gives_what_it_gives_alone(gate):
    model = make_model() if gate != "none" else looplm()
    hidden = prefill(model, PROMPTS, NEW, CHUNK)[1]
    for sampling in (Sampling(), Sampling(1.0, seed=5)):
        together = generate(model, PROMPTS, NEW, CHUNK, sampling).tokens
        for index in (0, 2):
            alone = generate(model, [PROMPTS[index]], NEW, CHUNK, sampling, indices=[index]).tokens
            assert alone == [together[index]]
            alone_hidden = prefill(model, [PROMPTS[index]], NEW, CHUNK)[1][:, 0]
            np.testing.assert_allclose(model.logits(alone_hidden), model.logits(hidden[:, index]), atol=1e-4)


def test_blocks_and_streaming_give_the_same():
    pieces = [[] for _ in PROMPTS]

    def collect(new):
        assert all(len(tokens) <= 1 for tokens in new)
        for piece, tokens in zip(pieces, new):
            piece += tokens

    options = {"sampling": Sampling(1.0, seed=1), "stop": (3, 5, 8)}
    streamed = generate(make_model(), PROMPTS, NEW, CHUNK, block=1, on_tokens=collect, **options)
    assert streamed.tokens == pieces == generate(make_model(), PROMPTS, NEW, CHUNK, **options).tokens


def test_a_stop_token_ends_its_sequence_and_no_other():
    free = generate(make_model(), PROMPTS, NEW, CHUNK, Sampling(1.0, seed=2))
    stop = free.tokens[1][3]
    stopped = generate(make_model(), PROMPTS, NEW, CHUNK, Sampling(1.0, seed=2), stop=(stop,))
    for row, whole, ended in zip(stopped.tokens, free.tokens, stopped.stopped):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end]
        assert ended == (stop in whole)
    assert len(stopped.tokens[1]) <= 4


def test_the_loop_ends_when_all_have_stopped():
    model = make_model()
    first = [row[0] for row in generate(model, PROMPTS, NEW, CHUNK).tokens]
    seen = []
    result = generate(model, PROMPTS, NEW, CHUNK, stop=first, block=1, on_tokens=seen.append)
    assert result.tokens == [[token] for token in first]
    assert all(result.stopped)
    assert len(seen) == 1


def test_top_k_and_top_p_are_numpys():
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((5, 17))).astype(np.float32)
    choices = [(0.7, 0, 1.0), (1.0, 4, 1.0), (1.3, 0, 0.6), (1.0, 6, 0.5), (1.0, 1, 1.0), (1.0, 0, 1e-6)]
    filtered = jax.jit(filter_logits)
    for temperature, top_k, top_p in choices:
        got = jax.nn.softmax(filtered(logits, Sampling(temperature, top_k, top_p)), axis=-1)
        for row, found in zip(logits.astype(np.float64) / temperature, got):
            order = np.argsort(-row, kind="stable")[: top_k or None]
            p = np.exp(row[order] - row[order].max())
            p /= p.sum()
            kept = order[: max(1, int(np.sum(np.cumsum(p) - p < top_p)))]
            want = np.zeros(len(row))
            want[kept] = np.exp(row[kept] - row.max())
            np.testing.assert_allclose(found, want / want.sum(), atol=1e-6)


def test_draws_follow_the_distribution_and_the_seed():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    count = 4000
    repeated = jnp.tile(logits, (count, 1))
    draw = jax.jit(lambda sampling: sample_tokens(repeated, sampling, jnp.zeros(count, int), jnp.arange(count)))
    tokens = draw(Sampling(1.0, seed=3))
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / count, np.exp(logits), atol=0.03)
    assert np.array_equal(tokens, draw(Sampling(1.0, seed=3)))
    assert not np.array_equal(tokens, draw(Sampling(1.0, seed=4)))
    assert set(np.unique(draw(Sampling(1.0, top_p=0.6, seed=3)))) == {0, 1}
    assert set(np.unique(draw(Sampling(0.0, seed=3)))) == {0}


def test_equal_prompts_of_a_batch_draw_their_own_tokens():
    rows = generate(make_model(), [PROMPTS[2]] * 3, NEW, CHUNK, Sampling(3.0)).tokens
    assert rows[0] != rows[1] != rows[2]


def test_one_compilation_each():
    """Of prefill, first token and decoding, however many chunks and tokens; another sampling, other stops need none."""
    prompts = [PROMPTS[2], PROMPTS[1]]
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        generate(make_model(), prompts, NEW, 3, block=2)
        for name in ("prefill_chunk", "first_tokens", "decode_block"):
            assert sum(name in found for found in compiled) == 1, compiled
        compiled.clear()
        generate(make_model(), [p[::-1] for p in prompts], NEW, 3, Sampling(0.5, 3, 0.9, 7), stop=(1, 2), block=2)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_cache_is_given_away():
    model = make_model()
    cache, hidden, lengths, _ = prefill(model, PROMPTS, NEW, CHUNK)
    given = jax.tree.leaves(cache.shared)
    request = SamplingRequest(Sampling(), jnp.arange(len(PROMPTS)), jnp.zeros(8, jnp.int32), jnp.int32(NEW))
    state, _, _ = first_tokens(model, hidden, lengths, request)
    decode_block(model, cache, state, request, block=32)
    assert all(leaf.is_deleted() for leaf in given)


@pytest.mark.parametrize(("gate", "loops"), [("elementwise", 5), ("none", 2)])
def test_loops_at_run_time(gate, loops):
    model = make_model() if gate != "none" else looplm()
    other = with_config(model, dataclasses.replace(model.config, loops=loops))
    one, two = generate(model, PROMPTS, NEW, CHUNK, loops=loops), generate(other, PROMPTS, NEW, CHUNK)
    assert one.tokens == two.tokens
    assert one.loops == loops
    assert one.cache_bytes == two.cache_bytes
    full = generate(model, PROMPTS, NEW, CHUNK).cache_bytes
    assert one.cache_bytes == (full if gate != "none" else full * loops // TINY.loops)


@pytest.mark.parametrize("threshold", [25, 50, 75, 90])
def test_the_exit_threshold_picks_the_references_loop(threshold):
    golden = np.load(GOLDEN / "ouro_tiny" / "golden.npz")
    model = load_model(GOLDEN / "ouro_tiny")
    hidden = jnp.asarray(golden["hidden"])
    loops, batch, length, width = hidden.shape
    logits, chosen = next_logits(model, hidden.reshape(loops, batch * length, width), threshold / 100)
    assert np.array_equal(chosen, golden[f"exit_step_q{threshold:03d}"].reshape(-1))
    want = golden[f"exit_logits_q{threshold:03d}"].reshape(batch * length, -1)
    np.testing.assert_allclose(logits, want, atol=3e-4)


def test_exit_loops_are_those_of_the_tokens():
    model = looplm()
    assert {loop for row in generate(model, PROMPTS, NEW, CHUNK).exit_loops for loop in row} == {TINY.loops}
    early = generate(model, PROMPTS, NEW, CHUNK, exit_threshold=0.5)
    hidden = run(model, np.array([PROMPTS[-1] + early.tokens[-1]]), chunk_size=1).hidden
    pdf = np.cumsum(model.exit_pdf(hidden)[0], axis=-1)[len(PROMPTS[-1]) - 1 : -1]
    wanted = [next(loop for loop, p in enumerate(row, 1) if p >= 0.5 or loop == TINY.loops) for row in pdf]
    assert early.exit_loops[-1] == wanted
    assert len(set(wanted)) > 1


def test_every_problem_of_a_request_is_named():
    prompts = [[], [1, 99, -1], list(range(20)) * 3]
    config = dataclasses.replace(TINY, max_positions=50)
    with pytest.raises(ValueError) as error:
        check_request(config, prompts, 0, 0, Sampling(-1.0, -2, 0.0, -3), 0, -1.0, 0)
    for words in (
        "temperature must be 0", "top_k must be", "top_p must be in", "seed must be", "max_new_tokens must be",
        "prefill_chunk must be", "block must be", "loops must be", "exit_threshold must be", "prompt 0 is empty",
        "prompt 1 has token ids outside the vocabulary of 29: [-1, 99]", "prompt 2 has 60 tokens", "50 positions",
    ):  # fmt: skip
        assert words in str(error.value)
    with pytest.raises(ValueError, match="there is no prompt"):
        generate(make_model(), [], 3)


def test_prefill_keeps_the_last_token_of_each_prompt():
    """Whichever chunk holds it: the hidden states are those of the whole sequence at that token."""
    hidden = prefill(make_model(), PROMPTS, NEW, CHUNK)[1]
    for index, prompt in enumerate(PROMPTS):
        padded = np.array([prompt + [0] * (len(PROMPTS[-1]) - len(prompt))])
        want = run(make_model(), padded, chunk_size=CHUNK).hidden[:, 0, len(prompt) - 1]
        np.testing.assert_allclose(hidden[:, index], want, atol=2e-5)
