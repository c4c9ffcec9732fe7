"""Generation: chunks, batches, stop tokens, loops, exits, compilations and times."""

import dataclasses
import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import generate_tokens, load_model
from melt_jax.config import InputError
from melt_jax.inference import generation
from melt_jax.inference.generation import (
    GenerationOptions,
    cache_bytes,
    decode_block,
    generate,
    next_logits,
    prefill,
    prepare_prefill,
    request_errors,
)
from melt_jax.inference.sampling import Sampling
from melt_jax.model.model import reconfigure, unstack
from tests.helpers.tiny import TINY, looplm, make_model, random_tokens, run

pytestmark = pytest.mark.usefixtures("float64")
GOLDEN = pathlib.Path(__file__).parent / "golden"
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (2, 5, 10)]
NEW, CHUNK = 6, 4  # the same in most tests, so that they share compilations
OPTIONS = GenerationOptions(NEW, CHUNK)


def sampled(**changes):
    """`OPTIONS` with sampling at temperature 1."""
    return dataclasses.replace(OPTIONS, sampling=Sampling(1.0, seed=1), **changes)


def early_looplm():
    """A LoopLM whose exit gate selects different loops."""
    return reconfigure(looplm(make_model()), exit_threshold=0.5)


def test_prefill_of_a_looplm_ignores_the_chunk():
    whole, hidden, _ = prefill(early_looplm(), PROMPTS, NEW, 1)
    cache, other, _ = prefill(early_looplm(), PROMPTS, NEW, CHUNK)
    chex.assert_trees_all_close(other, hidden, atol=1e-11)
    seen = np.arange(whole.length) < np.array([len(p) for p in PROMPTS])[:, None]
    for one, two in zip(jax.tree.leaves(whole.entries), jax.tree.leaves(cache.entries)):
        np.testing.assert_allclose(one[:, :, seen], two[:, :, seen], atol=1e-11)


def test_prefill_of_a_melt_depends_on_the_chunk():
    hidden = [prefill(make_model(), PROMPTS, NEW, chunk)[1][:, -1] for chunk in (1, CHUNK)]
    assert np.abs(hidden[0] - hidden[1]).max() > 1e-3


def test_prefill_keeps_each_prompts_last_token():
    """Its hidden states are those of the whole sequence at that token, whichever chunk the token is in."""
    hidden = prefill(make_model(), PROMPTS, NEW, CHUNK)[1]
    padded = np.array([prompt + [0] * (len(PROMPTS[-1]) - len(prompt)) for prompt in PROMPTS])
    want = run(make_model(), padded, chunk_size=CHUNK).hidden
    for index, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(hidden[:, index], want[:, index, len(prompt) - 1], atol=1e-11)


@pytest.mark.parametrize("gate", ["elementwise", "none"])
def test_decoding_is_a_sequence_of_single_token_chunks(gate):
    """Each token is the most likely one at the loop that the exit gate selects."""
    model = make_model() if gate != "none" else early_looplm()
    result = generate(model, PROMPTS, GenerationOptions(NEW, 1))
    tokens, prompt = result.tokens[-1], PROMPTS[-1]
    hidden = run(model, np.array([prompt + tokens]), chunk_size=1).hidden[:, 0, len(prompt) - 1 : -1]
    pdf = np.asarray(model.exit_pdf(hidden[:, None])[0])
    reached = np.cumsum(pdf, axis=-1) >= model.config.exit_threshold
    reached[:, -1] = True
    exits = np.argmax(reached, axis=-1) if gate == "none" else np.full(NEW, TINY.loops - 1)
    greedy = np.argmax(model.logits(hidden[exits, np.arange(NEW)]), axis=-1)
    assert tokens == greedy.tolist()
    assert result.exit_loops[-1] == (exits + 1).tolist()
    assert (len(set(exits)) > 1) == (gate == "none")


def test_batching_does_not_change_a_prompts_tokens():
    model, prompt = make_model(), [PROMPTS[1]]
    hidden, alone = (prefill(model, prompts, NEW, CHUNK)[1] for prompts in (PROMPTS, prompt))
    np.testing.assert_allclose(alone[:, 0], hidden[:, 1], atol=1e-11)
    for options in (OPTIONS, sampled()):
        assert generate(model, prompt, options, indices=[1]).tokens == [generate(model, PROMPTS, options).tokens[1]]


def test_blocks_and_streaming_do_not_change_tokens():
    pieces = [[] for _ in PROMPTS]

    def collect(new):
        assert all(len(tokens) <= 1 for tokens in new)
        for piece, tokens in zip(pieces, new):
            piece += tokens

    streamed = generate(make_model(), PROMPTS, sampled(stop=(3, 5, 8), block=1), on_tokens=collect)
    assert streamed.tokens == pieces == generate(make_model(), PROMPTS, sampled(stop=(3, 5, 8))).tokens


def test_stop_token_ends_only_its_sequence():
    free = generate(make_model(), PROMPTS, sampled())
    stop = free.tokens[1][3]
    stopped = generate(make_model(), PROMPTS, sampled(stop=(stop,)))
    for tokens, whole, ended in zip(stopped.tokens, free.tokens, stopped.stopped):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert tokens == whole[:end]
        assert ended == (stop in whole)
    assert len(stopped.tokens[1]) <= 4


def test_decoding_ends_when_all_have_stopped():
    first = [tokens[0] for tokens in generate(make_model(), PROMPTS, OPTIONS).tokens]
    seen = []
    options = dataclasses.replace(OPTIONS, stop=tuple(first), block=1)
    result = generate(make_model(), PROMPTS, options, on_tokens=seen.append)
    assert result.tokens == [[token] for token in first]
    assert all(result.stopped)
    assert len(seen) == 1


def test_callback_can_end_the_generation():
    seen = []
    options = dataclasses.replace(OPTIONS, block=1)
    result = generate(make_model(), PROMPTS, options, on_tokens=lambda new: seen.append(new) or len(seen) == 2)
    assert len(seen) == 2
    assert result.tokens == [tokens[:2] for tokens in generate(make_model(), PROMPTS, OPTIONS).tokens]


def test_rounding_slots_changes_no_token():
    rounded = dataclasses.replace(OPTIONS, slot_multiple=50)
    whole, padded = (generate(make_model(), PROMPTS, options) for options in (OPTIONS, rounded))
    assert padded.tokens == whole.tokens
    assert padded.cache_bytes > whole.cache_bytes


def test_equal_prompts_draw_their_own_tokens():
    hot = dataclasses.replace(OPTIONS, sampling=Sampling(3.0))
    first, second, third = generate(make_model(), [PROMPTS[2]] * 3, hot).tokens
    assert first != second != third


def test_everything_compiles_once():
    """Prefill, first token and decoding compile once for any number of chunks, tokens and values of sampling."""
    prompts = [PROMPTS[2], PROMPTS[1]]
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        generate(make_model(), prompts, GenerationOptions(NEW, 3, block=2))
        for name in ("prefill_chunk", "first_tokens", "decode_block"):
            assert sum(name in found for found in compiled) == 1, compiled
        compiled.clear()
        options = GenerationOptions(NEW, 3, Sampling(0.5, 3, 0.9, 7), stop=(1, 2), block=2)
        generate(make_model(), [p[::-1] for p in prompts], options)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


class SimulatedMachine:
    """A clock that moves only when the host compiles or waits, and a device that runs in parallel with it.

    A compilation takes the host 100 s. A program takes the device 3 s, and starts when it has been dispatched and the
    programs before it have ended.
    """

    def __init__(self):
        self.now, self.device_free = 0.0, 0.0

    def compile(self, function, *args, compiler_options=None, **static):
        self.now += 100

        def program(*args):
            self.device_free = max(self.device_free, self.now) + 3
            return function(*args, **static)

        return program

    def wait(self, tree):
        self.now = max(self.now, self.device_free)
        return tree


def test_times_contain_the_device_and_no_compilation(monkeypatch):
    """Three prefill chunks and a first token take 12 s, five decoded tokens 15 s, three compilations 300 s."""
    machine, device_get = SimulatedMachine(), jax.device_get
    monkeypatch.setattr(generation, "clock", lambda: machine.now)
    monkeypatch.setattr(generation, "_compile", machine.compile)
    monkeypatch.setattr(jax, "block_until_ready", machine.wait)
    monkeypatch.setattr(jax, "device_get", lambda tree: machine.wait(device_get(tree)))
    result = generate(make_model(), PROMPTS, dataclasses.replace(OPTIONS, block=1))
    assert (result.compile_seconds, result.prefill_seconds, result.decode_seconds) == (300, 12, 15)
    assert result.prefill_speed == sum(map(len, PROMPTS)) / 12
    assert result.decode_speed == (NEW - 1) * len(PROMPTS) / 15


def test_cache_is_donated():
    model = make_model()
    cache, hidden, lengths = prefill(model, PROMPTS, NEW, CHUNK)
    given = jax.tree.leaves(cache.entries)
    request, state = generation._request(OPTIONS, range(len(PROMPTS))), generation._initial_state(lengths)
    state, _, _ = generation.first_tokens(model, hidden, state, request)
    decode_block(model, cache, state, request, block=32)
    assert all(leaf.is_deleted() for leaf in given)


@pytest.mark.parametrize(("gate", "factor"), [("elementwise", 1), ("none", 2)])
def test_only_a_per_loop_cache_grows_with_loops(gate, factor):
    model = reconfigure(make_model(), gate=gate, loops=2)
    size = lambda model: cache_bytes(prepare_prefill(model, PROMPTS, NEW, CHUNK).cache)
    assert size(reconfigure(model, loops=4)) == factor * size(model)


@pytest.mark.parametrize("threshold", [25, 50, 75, 90])
def test_exit_threshold_selects_the_reference_loop(threshold):
    golden = np.load(GOLDEN / "ouro_tiny" / "golden.npz")
    model = reconfigure(load_model(GOLDEN / "ouro_tiny"), exit_threshold=threshold / 100)
    hidden = jnp.asarray(golden["hidden"])
    loops, batch, length, width = hidden.shape
    logits, chosen = next_logits(model, hidden.reshape(loops, batch * length, width))
    assert np.array_equal(chosen, golden[f"exit_step_q{threshold:03d}"].reshape(-1))
    want = golden[f"exit_logits_q{threshold:03d}"].reshape(batch * length, -1)
    # Both are float32 dot products of `width` terms: errors of n·eps of the terms' sum, with a margin of ten.
    scale = np.abs(np.asarray(hidden)).max() * np.abs(np.asarray(model.logits(jnp.eye(width)))).max()
    np.testing.assert_allclose(logits, want, atol=10 * width * np.finfo(np.float32).eps * width * scale)


@pytest.mark.parametrize("gate", ["elementwise", "none"])
@pytest.mark.parametrize("options", [OPTIONS, sampled()], ids=["greedy", "sampled"])
def test_guidance_of_zero_changes_nothing(gate, options):
    model = reconfigure(make_model(), gate=gate)
    again = generate(reconfigure(model, guidance=0.0), PROMPTS, options)
    assert again.tokens == generate(model, PROMPTS, options).tokens
    hidden = prefill(model, PROMPTS, NEW, CHUNK)[1]
    assert np.array_equal(next_logits(model, hidden)[0], model.logits(hidden[-1]))


@pytest.mark.parametrize("gate", ["elementwise", "none"])
def test_guidance_contrasts_the_loops(gate):
    """Each token is the most likely one by z_T + w (z_T − z₁), of a run without generation."""
    model, weight = reconfigure(make_model(), gate=gate), 1.5
    result = generate(reconfigure(model, guidance=weight), PROMPTS, GenerationOptions(NEW, 1))
    tokens, prompt = result.tokens[-1], PROMPTS[-1]
    hidden = run(model, np.array([prompt + tokens]), chunk_size=1).hidden[:, 0, len(prompt) - 1 : -1]
    first, last = np.asarray(model.logits(hidden[0])), np.asarray(model.logits(hidden[-1]))
    assert tokens == np.argmax(last + weight * (last - first), axis=-1).tolist()
    assert tokens != np.argmax(last, axis=-1).tolist()
    assert result.exit_loops[-1] == [TINY.loops] * NEW


def test_generate_tokens_is_greedy():
    tokens = generate_tokens(make_model(), PROMPTS, NEW, CHUNK)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == generate(make_model(), PROMPTS, OPTIONS).tokens


def test_every_error_of_a_request_is_listed():
    prompts = [[], [1, 99, -1], list(range(20)) * 3]
    config = dataclasses.replace(TINY, max_positions=50)
    errors = "\n".join(request_errors(config, prompts, GenerationOptions(0, 0, Sampling(-1.0), tuple(range(9)), 0)))
    for words in (
        "temperature: expected 0 (greedy) or 0.0001 to 10000",
        "max_new_tokens: expected at least 1, found 0",
        "prefill_chunk: expected",
        "block: expected", "stop: expected at most 8", "prompt 0: expected at least one token",
        "prompt 1: expected token ids from 0 to 28, found [-1, 99]", "prompt 2: expected at most 50 positions",
    ):  # fmt: skip
        assert words in errors
    with pytest.raises(InputError, match="prompts: expected at least one, found none"):
        generate(make_model(), [], OPTIONS)


@pytest.mark.parametrize("changes", [{"gate": "none"}, {}, {"window": 3, "sweeps": 2}], ids=str)
def test_unstacked_models_generate_the_same(changes):
    """A list of layers and of entries computes what the stacked weights and the stacked cache do."""
    model = reconfigure(make_model(), **changes)
    assert generate(unstack(model), PROMPTS, OPTIONS).tokens == generate(model, PROMPTS, OPTIONS).tokens
    (cache, hidden, _), (want, want_hidden, _) = (prefill(m, PROMPTS, NEW, CHUNK) for m in (unstack(model), model))
    np.testing.assert_allclose(hidden, want_hidden, atol=1e-11)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-11), cache, want.unstack())


@pytest.mark.parametrize("gate", ["none", "elementwise"])
def test_unstacked_models_copy_no_weights(gate):
    """A decoded token reads weights and entries where they are."""
    model = unstack(make_model(dataclasses.replace(TINY, gate=gate)))
    inputs = prepare_prefill(model, PROMPTS, 64, CHUNK)
    state = generation._initial_state(inputs.lengths)
    request = generation._request(GenerationOptions(64), range(len(PROMPTS)))
    text = decode_block.lower(model, inputs.cache, state, request, block=4).compile().as_text()
    body = text[text.index("\n%") : text.index("\nENTRY")]  # what is outside the loop runs once in a block
    big = {
        tuple(sorted(x.shape)) for x in jax.tree.leaves((model, inputs.cache._replace(segments=None))) if x.size > 64
    }
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (copy|transpose|slice|dynamic-slice|concatenate)\(", body)
    copied = [(shape, kind) for shape, kind in found if tuple(sorted(map(int, shape.split(",")))) in big]
    assert not copied, copied
