"""Generation: a prefill in chunks, then one token at a time (MELT, arXiv 2605.07721).

Prompts run in chunks of `prefill_chunk` tokens, generated tokens in chunks of one. A block of generated tokens runs
inside one compiled loop without the host; streaming is a block of one. Prefill, first token and decoding are compiled
once each, before any of them runs, so that their times exclude compilation. The exit gate selects the loop whose logits
are used. All loops run in any case, because later tokens need their KV entries.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from melt_jax.config import InputError, ModelConfig
from melt_jax.inference.sampling import GREEDY, Sampling, SamplingRequest, sample_tokens, select_logits
from melt_jax.model.cache import Cache, create_cache
from melt_jax.model.layout import replicated, whole_features
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import LoopedTransformer, is_unstacked, unstack, without_kernel
from melt_jax.model.sequence import split_chunks

STOP_SLOTS = 8  # stop tokens are padded to this number, so that their number does not affect compilation
clock = time.perf_counter


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How to continue prompts.

    Attributes:
      max_new_tokens: largest number of new tokens per prompt.
      prefill_chunk: C of the prefill. A MELT's result depends on it, a LoopLM's does not.
      sampling: how tokens are selected.
      stop: token ids that end a sequence.
      block: tokens decoded before the host reads them; 1 streams token by token.
      slot_multiple: the cache's slots are rounded up to a multiple of it, so that batches of similar lengths share a
        compilation. It does not change results.
    """

    max_new_tokens: int
    prefill_chunk: int = 512
    sampling: Sampling = GREEDY
    stop: tuple[int, ...] = ()
    block: int = 32
    slot_multiple: int = 1


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
      tokens: the new tokens of each prompt, including the stop token.
      exit_loops: for each prompt and new token, the loop (counted from 1) whose logits selected it.
      stopped: for each prompt, whether a stop token ended it.
      loops: T.
      prompt_tokens: over all prompts.
      cache_bytes: size of the KV cache, over all prompts and slots.
      compile_seconds: time spent compiling; included in neither time below.
      prefill_seconds: from the first chunk's dispatch until every prompt's first token is computed.
      decode_seconds: from there to the end.
    """

    tokens: list[list[int]]
    exit_loops: list[list[int]]
    stopped: list[bool]
    loops: int
    prompt_tokens: int
    cache_bytes: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def new_tokens(self) -> int:
        """New tokens over all prompts."""
        return sum(map(len, self.tokens))

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_speed(self) -> float:
        """New tokens per second, without each prompt's first, which the prefill computes; 0 if there are no others."""
        decoded = self.new_tokens - len(self.tokens)
        return decoded / self.decode_seconds if decoded else 0.0


class DecodeState(NamedTuple):
    """The state of each sequence.

    Attributes:
      tokens: the last token, whose KV entry is not in the cache.
      lengths: entries in the cache.
      emitted: new tokens so far.
      done: whether the sequence is finished; a finished sequence no longer changes.
    """

    tokens: Int[Array, " B"]
    lengths: Int[Array, " B"]
    emitted: Int[Array, " B"]
    done: Bool[Array, " B"]


def for_decoding(model: LoopedTransformer) -> LoopedTransformer:
    """The model in the form that decodes fastest: on a CPU without a mesh unstacked, with weights of its own."""
    on_cpu = jax.default_backend() == "cpu" and jax.sharding.get_mesh().empty
    return unstack(model) if on_cpu and not is_unstacked(model) else model


def decoding_options(sequences: int) -> dict[str, str]:
    """XLA's compiler options for `decode_block` with this many sequences.

    On a CPU, XLA computes products with YNNPACK by default. Eigen is faster for four to a few dozen rows, as fast for
    more, and slower for two.
    """
    eigen = jax.default_backend() == "cpu" and sequences >= 4
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if eigen else {}


def next_logits(
    model: LoopedTransformer, hidden: Float[Array, "T B D"]
) -> tuple[Float[Array, "B V"], Int[Array, " B"]]:
    """`select_logits` for one position of each sequence."""
    logits, chosen = select_logits(model, hidden[:, :, None])
    return logits[:, 0], chosen[:, 0]


@functools.partial(jax.jit, donate_argnums=1)
def prefill_chunk(
    model: LoopedTransformer,
    cache: Cache,
    last_hidden: Float[Array, "T B D"],
    tokens: Int[Array, "B C"],
    start: Int[Array, ""],
    lengths: Int[Array, " B"],
) -> tuple[Cache, Float[Array, "T B D"]]:
    """Runs one chunk of right-padded prompts and adds its KV entries to the cache.

    Args:
      model: the model.
      cache: donated.
      last_hidden: the hidden states of each prompt's last token, if its chunk has run.
      tokens: the chunk.
      start: the chunk's first slot.
      lengths: of the prompts.

    Returns:
      (cache, last_hidden).
    """
    slots = start + jnp.arange(tokens.shape[1])
    segments = (slots[None] < lengths[:, None]).astype(jnp.int32)
    out = run_chunk(without_kernel(model), tokens, cache.in_place(), start, segments=segments)
    last = lengths - 1 - start
    inside = (last >= 0) & (last < tokens.shape[1])
    index = jnp.clip(last, 0, tokens.shape[1] - 1)[None, :, None, None]
    at_last = jnp.take_along_axis(out.hidden, index, axis=2)[:, :, 0]
    # A start for each sequence keeps the padding of shorter prompts out of their windows.
    starts = start if cache.window is None else jnp.broadcast_to(start, lengths.shape)
    return cache.write(out.kv, out.segments, starts), jnp.where(inside[None, :, None], at_last, last_hidden)


@jax.jit
def first_tokens(
    model: LoopedTransformer, hidden: Float[Array, "T B D"], state: DecodeState, request: SamplingRequest
) -> tuple[DecodeState, Int[Array, " B"], Int[Array, " B"]]:
    """Selects each prompt's first new token from its last hidden states.

    Returns:
      (state, tokens, exit loops from 0).
    """
    return _advance(model, state, hidden, request)


@functools.partial(jax.jit, static_argnames=("block",), donate_argnums=1)
def decode_block(
    model: LoopedTransformer, cache: Cache, state: DecodeState, request: SamplingRequest, block: int = 1
) -> tuple[Cache, DecodeState, Int[Array, "block B"], Int[Array, "block B"], Bool[Array, ""]]:
    """Decodes up to `block` more tokens of each sequence, each as a chunk of one.

    Finished sequences emit no token, and their KV entries are padding. The loop ends when all are finished.

    Returns:
      (cache, state, tokens with −1 for none, exit loops from 0 with −1 for none, whether all sequences are finished).
    """
    nothing = jnp.full((block, *state.tokens.shape), -1, jnp.int32)

    def unfinished(carry):
        step, _, state, _, _ = carry
        return (step < block) & ~jnp.all(state.done)

    def one_token(carry):
        step, cache, state, tokens, exits = carry
        live = (~state.done).astype(jnp.int32)[:, None]
        out = run_chunk(model, state.tokens[:, None], cache.in_place(), state.lengths, segments=live)
        start = _after(out.hidden, state.lengths) if is_unstacked(model) else state.lengths
        cache = cache.write(out.kv, out.segments, start)
        state = state._replace(lengths=state.lengths + live[:, 0])
        state, new, left = _advance(model, state, out.hidden[:, :, 0], request)
        return step + 1, cache, state, tokens.at[step].set(new), exits.at[step].set(left)

    start = jnp.int32(0), cache, state, nothing, nothing
    _, cache, state, tokens, exits = jax.lax.while_loop(unfinished, one_token, start)
    return cache, state, tokens, exits, jnp.all(state.done)


class Prefill(NamedTuple):
    """The inputs of a prefill, on the devices.

    Attributes:
      chunks: [B, C] each.
      starts: the first slot of each chunk.
      lengths: of the prompts.
      cache: empty, with slots for prompts and new tokens.
      last_hidden: zeros.
    """

    chunks: list[Int[Array, "B C"]]
    starts: list[Int[Array, ""]]
    lengths: Int[Array, " B"]
    cache: Cache
    last_hidden: Float[Array, "T B D"]

    @property
    def arguments(self) -> tuple:
        """The arguments of `prefill_chunk` after the model, for the first chunk."""
        return self.cache, self.last_hidden, self.chunks[0], self.starts[0], self.lengths


def prepare_prefill(
    model: LoopedTransformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int, slot_multiple: int = 1
) -> Prefill:
    """Pads prompts, splits them into chunks and creates their cache.

    The chunks' starts do not depend on the other prompts, so neither does a prompt's result.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    tokens = np.zeros((len(prompts), longest), np.int32)
    for padded, prompt in zip(tokens, prompts):
        padded[: len(prompt)] = prompt
    round_up = lambda count: -(-count // slot_multiple) * slot_multiple
    chunk = min(chunk, round_up(longest))
    chunks = split_chunks(replicated(tokens), chunk)
    slots = round_up(max(len(chunks) * chunk, longest + max_new_tokens))
    cache = create_cache(model.config, len(prompts), slots, model.dtype)
    return Prefill(
        chunks=list(chunks),
        starts=list(jnp.arange(len(chunks), dtype=jnp.int32) * chunk),
        lengths=replicated(lengths),
        cache=cache.unstack() if is_unstacked(model) else cache,
        last_hidden=jnp.zeros((model.config.loops, len(prompts), model.config.width), model.dtype),
    )


def prefill(
    model: LoopedTransformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int
) -> tuple[Cache, Float[Array, "T B D"], Int[Array, " B"]]:
    """Runs prompts of any lengths, chunk by chunk, into a cache with room for `max_new_tokens` more.

    Returns:
      (cache, hidden states of the last tokens, lengths).
    """
    inputs = prepare_prefill(model, prompts, max_new_tokens, chunk)
    return _run_prefill(prefill_chunk, model, inputs)


def generate(
    model: LoopedTransformer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    indices: Sequence[int] | None = None,
    on_tokens: Callable[[list[list[int]]], object] | None = None,
) -> Generation:
    """Continues prompts until each has reached a stop token or `max_new_tokens`.

    Args:
      model: its config sets `loops`, `exit_threshold` and `guidance`; `reconfigure` changes them. `for_decoding` gives
        it the form that decodes fastest.
      prompts: token ids, of any lengths. A prompt's result does not depend on the other prompts.
      options: see `GenerationOptions`.
      indices: the index of each prompt in a larger set, for its random key; 0, 1, … by default.
      on_tokens: called with the new tokens of each prompt after each block; if it returns True, the generation ends.

    Raises:
      InputError: lists every value out of range and every prompt that cannot be run.
    """
    if errors := request_errors(model.config, prompts, options):
        raise InputError("cannot generate:\n  " + "\n  ".join(errors))
    inputs = prepare_prefill(model, prompts, options.max_new_tokens, options.prefill_chunk, options.slot_multiple)
    size = cache_bytes(inputs.cache)
    request = _request(options, range(len(prompts)) if indices is None else indices)
    state = _initial_state(inputs.lengths)
    blocks = -(-(options.max_new_tokens - 1) // options.block)

    # Everything is compiled before anything runs: a device that runs while the host compiles cannot be timed.
    begin = clock()
    run_chunk = _compile(prefill_chunk, model, *inputs.arguments)
    select = _compile(first_tokens, model, inputs.last_hidden, state, request)
    run_block = _compile(
        decode_block,
        model,
        inputs.cache,
        state,
        request,
        block=options.block,
        compiler_options=decoding_options(len(prompts)),
    )
    jax.block_until_ready((inputs, request, state))
    compiled = clock()

    cache, hidden, _ = _run_prefill(run_chunk, model, inputs)
    state, tokens, exits = select(model, hidden, state, request)
    jax.block_until_ready((cache, state, tokens, exits))
    prefilled = clock()

    first_block = tokens[None], exits[None], jnp.all(state.done)
    one_block = lambda cache, state: run_block(model, cache, state, request)
    collected, left = _collect(one_block, (cache, state), first_block, blocks, on_tokens)
    return Generation(
        tokens=collected,
        exit_loops=left,
        stopped=[new[-1] in options.stop for new in collected],
        loops=model.config.loops,
        prompt_tokens=sum(map(len, prompts)),
        cache_bytes=size,
        compile_seconds=compiled - begin,
        prefill_seconds=prefilled - compiled,
        decode_seconds=clock() - prefilled,
    )


def cache_bytes(cache: Cache) -> int:
    """Bytes of the KV entries of a cache, or of a cache of shapes and dtypes."""
    entries = (cache.entries, cache.window and cache.window.kv)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(entries))


def generate_tokens(
    model: LoopedTransformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, prefill_chunk: int
) -> Int[np.ndarray, "B new"]:
    """Greedy continuations of `max_new_tokens` tokens each; no token ends one early, and prompts may differ in length.

    `prefill_chunk` is C of the prompts. A MELT's result depends on it: use the chunk of its training.
    """
    return np.array(generate(model, prompts, GenerationOptions(max_new_tokens, prefill_chunk)).tokens, np.int32)


def request_errors(config: ModelConfig, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> list[str]:
    """An error for each option out of range and each prompt that cannot be run."""
    errors = options.sampling.errors()
    for name in ("max_new_tokens", "prefill_chunk", "block", "slot_multiple"):
        if getattr(options, name) < 1:
            errors.append(f"{name}: expected at least 1, found {getattr(options, name)}")
    if len(options.stop) > STOP_SLOTS:
        errors.append(f"stop: expected at most {STOP_SLOTS} token ids, found {len(options.stop)}")
    if not prompts:
        errors.append("prompts: expected at least one, found none")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            errors.append(f"prompt {index}: expected at least one token, found none")
        if unknown := sorted({int(token) for token in prompt if not 0 <= token < config.vocab}):
            errors.append(f"prompt {index}: expected token ids from 0 to {config.vocab - 1}, found {unknown}")
        if (total := len(prompt) + options.max_new_tokens) > config.max_positions:
            errors.append(
                f"prompt {index}: expected at most {config.max_positions} positions, the model's, found {len(prompt)}"
                f" tokens and {options.max_new_tokens} new ones, {total}; shorten the prompt or lower max_new_tokens"
            )
    return errors


def _request(options: GenerationOptions, indices: Sequence[int]) -> SamplingRequest:
    stop = np.array((*options.stop, *[-1] * (STOP_SLOTS - len(options.stop))), np.int32)
    sampling = jax.tree.map(jnp.asarray, options.sampling)
    return SamplingRequest(*replicated((sampling, np.array(indices, np.int32), stop, np.int32(options.max_new_tokens))))


def _after(value, index):
    """The index, unchanged, but known only when `value` is.

    It orders the reads of entry lists before the writes: in straight code, XLA may otherwise write first, and then
    copies every list for its reader.
    """
    return index + (value.ravel()[-1] > jnp.inf).astype(index.dtype)  # always 0, also for NaN, but XLA compares


def _initial_state(lengths: Int[Array, " B"]) -> DecodeState:
    none = jnp.zeros_like(lengths)
    return DecodeState(none, lengths, none, none.astype(bool))


def _run_prefill(run_chunk, model, inputs: Prefill):
    cache, hidden = inputs.cache, inputs.last_hidden
    for chunk, start in zip(inputs.chunks, inputs.starts):
        cache, hidden = run_chunk(model, cache, hidden, chunk, start, inputs.lengths)
    return cache, hidden, inputs.lengths


def _collect(run_block, carry, first_block, blocks, on_tokens):
    """Runs up to `blocks` blocks after the first; returns the tokens and the exit loops of each prompt."""
    collected, left = [[[] for _ in range(first_block[0].shape[1])] for _ in range(2)]
    waiting = first_block
    while waiting:
        # The next block is dispatched before this one is read; once all sequences are finished it is empty.
        following = None
        if blocks:
            blocks -= 1
            *carry, tokens, exits, done = run_block(*carry)
            following = tokens, exits, done
        tokens, exits, done = jax.device_get(waiting)
        new = [column[column >= 0].tolist() for column in tokens.T]
        for prompt, column in enumerate(exits.T):
            collected[prompt] += new[prompt]
            left[prompt] += (column[column >= 0] + 1).tolist()
        ended = on_tokens is not None and on_tokens(new) is True
        waiting = None if done or ended else following
    return collected, left


def _advance(model, state, hidden, request):
    """Selects tokens from hidden [T, B, D]: (`DecodeState`, tokens [B], exit loops [B]), −1 for finished sequences."""
    logits, left = next_logits(model, hidden)
    chosen = sample_tokens(whole_features(logits), request.sampling, request.indices, state.emitted)
    live = ~state.done
    emitted = state.emitted + live
    over = (chosen[:, None] == request.stop[None]).any(axis=-1) | (emitted >= request.limit)
    new_state = DecodeState(jnp.where(live, chosen, state.tokens), state.lengths, emitted, state.done | over)
    return new_state, jnp.where(live, chosen, -1), jnp.where(live, left, -1)


def _compile(function, *args, compiler_options=None, **static):
    """The executable of a jitted function for these arguments, from JAX's cache if it is there."""
    return function.lower(*args, **static).compile(compiler_options)
