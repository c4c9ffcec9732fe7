"""Generation: prefill in chunks, then token by token, one compilation each (MELT, arXiv 2605.07721).

Everything runs as chunks of the one model: prompts in chunks of `prefill_chunk` tokens, generated tokens in chunks of
one, which is the exact model. A block of generated tokens runs inside one compiled loop, so that the host is asked for
nothing between them; streaming is a block of one. The exit gate picks the loop whose logits are used; all loops run all
the same, as later tokens need their rows.
"""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from melt_jax.model.cache import create_cache
from melt_jax.model.layout import replicated, whole_features
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import exit_loop
from melt_jax.model.sequence import split_chunks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. A pytree of numbers: another choice needs no other compilation.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: only the k likeliest tokens; 0 is no limit.
      top_p: only the likeliest tokens that together reach this probability, at least one; 1 is no limit.
      seed: token n of prompt i is drawn with a key that depends on (seed, i, n) alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def errors(self):
        """What is wrong with the values, a line each."""
        checks = (
            (self.temperature >= 0, f"temperature must be 0 (greedy) or more, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must be 0 (no limit) or more, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}"),
            (0 <= self.seed < 2**31, f"seed must be in [0, 2^31), got {self.seed}"),
        )
        return [message for fine, message in checks if not fine]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: for each prompt, its new tokens, the stop token included.
      exit_loops: for each prompt and new token, the loop (counted from 1) whose logits chose it.
      stopped: for each prompt, whether a stop token ended it.
      loops: T, as run.
      prompt_tokens: of all prompts together.
      cache_bytes: the cache's size, rows of all prompts and slots.
      compile_seconds: spent compiling and making the cache, in none of the times below.
      prefill_seconds: until every prompt's first token was chosen.
      decode_seconds: from there to the end.
    """

    tokens: list
    exit_loops: list
    stopped: list
    loops: int
    prompt_tokens: int
    cache_bytes: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def new_tokens(self):
        """Of all prompts together."""
        return sum(map(len, self.tokens))

    @property
    def prefill_speed(self):
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_speed(self):
        """New tokens per second, without each prompt's first one, which the prefill gave; 0 where there is no other."""
        decoded = self.new_tokens - len(self.tokens)
        return decoded / self.decode_seconds if decoded else 0.0


GREEDY = Sampling()


class DecodeState(NamedTuple):
    """Where each sequence stands, [B] each.

    Attributes:
      tokens: int32, the last token, whose rows are not in the cache.
      lengths: int32, the rows in the cache.
      emitted: int32, the new tokens so far.
      done: bool; a finished sequence is frozen.
    """

    tokens: jax.Array
    lengths: jax.Array
    emitted: jax.Array
    done: jax.Array


class SamplingRequest(NamedTuple):
    """What the choice of tokens follows: `Sampling`, prompt indices [B], stop tokens [n], the most new tokens []."""

    sampling: Sampling
    indices: jax.Array
    stop: jax.Array
    limit: jax.Array


def filter_logits(logits, sampling):
    """Logits over temperature, −inf outside top-k and then outside the nucleus of what is left: [B, V] → [B, V].

    Of equally likely tokens the lower id counts as the likelier.
    """
    logits = logits / jnp.maximum(sampling.temperature, 1e-6)
    order = jnp.argsort(-logits, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    limit = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    ordered = jnp.take_along_axis(jnp.where(rank < limit, logits, -jnp.inf), order, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The first token is kept by name and top_p = 1 keeps all: rounding in the sum decides neither.
    keep = (before < sampling.top_p) | (sampling.top_p >= 1) | (jnp.arange(logits.shape[-1]) == 0)
    ordered = jnp.where(keep, ordered, -jnp.inf)
    return jnp.take_along_axis(ordered, rank, axis=-1)


def sample_tokens(logits, sampling, indices, steps):
    """A token for each prompt: logits [B, V], prompt indices [B], token numbers [B] → [B] int32."""

    def draw(logits):
        root = jax.random.key(sampling.seed)
        keys = jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(root, i), n))(indices, steps)
        return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)

    def greedy(logits):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, greedy, logits)


def next_logits(model, hidden, exit_threshold=None):
    """Logits [B, V] of the loop at which the exit gate leaves, and that loop [B] from 0: hidden is [T, B, D].

    `exit_threshold` stands in for the model's own.
    """
    threshold = model.config.exit_threshold if exit_threshold is None else exit_threshold
    chosen = exit_loop(model.exit_pdf(hidden[:, :, None])[:, 0], threshold)
    return model.logits(jnp.take_along_axis(hidden, chosen[None, :, None], axis=0)[0]), chosen


@functools.partial(jax.jit, static_argnames=("loops",), donate_argnums=1)
def prefill_chunk(model, cache, last_hidden, tokens, start, lengths, loops=None):
    """Runs one chunk [B, C] of right-padded prompts and writes its rows.

    Args:
      model: `LoopedTransformer`.
      cache: `Cache`; given away.
      last_hidden: [T, B, D], the hidden states of each prompt's last token, kept from whichever chunk holds it.
      tokens: [B, C] int32.
      start: the chunk's first slot, a scalar.
      lengths: [B], the prompts' lengths.
      loops: T, where it is not the model's.

    Returns:
      (cache, last_hidden).
    """
    slots = start + jnp.arange(tokens.shape[1])
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    out = run_chunk(model, tokens, cache, start, segments=segments, loops=loops)
    last = lengths - 1 - start
    inside = (last >= 0) & (last < tokens.shape[1])
    index = jnp.clip(last, 0, tokens.shape[1] - 1)[None, :, None, None]
    found = jnp.take_along_axis(out.hidden, index, axis=2)[:, :, 0]
    return cache.write(out.kv, out.segments, start), jnp.where(inside[None, :, None], found, last_hidden)


@functools.partial(jax.jit, static_argnames=("exit_threshold",))
def first_tokens(model, hidden, lengths, request, exit_threshold=None):
    """Each prompt's first new token from its last hidden states [T, B, D]: (`DecodeState`, tokens [B], exit loops [B])."""
    none = jnp.zeros_like(lengths)
    state = DecodeState(none, lengths, none, none.astype(bool))
    return _advance(model, state, hidden, request, exit_threshold)


@functools.partial(jax.jit, static_argnames=("block", "loops", "exit_threshold"), donate_argnums=1)
def decode_block(model, cache, state, request, block=1, loops=None, exit_threshold=None):
    """Up to `block` more tokens of each sequence, each run as a chunk of one: the exact model.

    Finished sequences are frozen: no token, and no row that anything sees. The loop ends when all are.

    Returns:
      (cache, `DecodeState`, tokens [block, B] with −1 where there is none, exit loops [block, B] from 0, whether all
      are
      done).
    """
    nothing = jnp.full((block, *state.tokens.shape), -1, jnp.int32)

    def unfinished(carry):
        step, _, state, _, _ = carry
        return (step < block) & ~jnp.all(state.done)

    def one_token(carry):
        step, cache, state, tokens, exits = carry
        live = (~state.done).astype(jnp.int32)[:, None]
        out = run_chunk(model, state.tokens[:, None], cache, state.lengths, segments=live, loops=loops)
        cache = cache.write(out.kv, out.segments, state.lengths)
        state = state._replace(lengths=state.lengths + live[:, 0])
        state, new, left = _advance(model, state, out.hidden[:, :, 0], request, exit_threshold)
        return step + 1, cache, state, tokens.at[step].set(new), exits.at[step].set(left)

    _, cache, state, tokens, exits = jax.lax.while_loop(unfinished, one_token, (0, cache, state, nothing, nothing))
    return cache, state, tokens, exits, jnp.all(state.done)


def prefill(model, prompts, max_new_tokens, chunk, loops=None):
    """Runs prompts of any lengths, chunk after chunk, into a cache with room for `max_new_tokens` more.

    Where chunks begin does not depend on the other prompts, so neither does the outcome.

    Returns:
      (cache, last hidden [T, B, D], lengths [B], seconds spent before the first chunk ran).
    """
    begin = time.perf_counter()
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    chunk = min(chunk, int(lengths.max()))
    chunks = split_chunks(replicated(tokens), chunk)
    slots = max(chunks.shape[0] * chunk, int(lengths.max()) + max_new_tokens)
    cache = create_cache(model.config, len(prompts), slots, model.dtype, loops=loops)
    hidden = jnp.zeros((loops or model.config.loops, len(prompts), model.config.width), model.dtype)
    lengths = replicated(lengths)
    pieces, starts = list(chunks), list(jnp.arange(len(chunks), dtype=jnp.int32) * chunk)
    run, _ = _compiled(prefill_chunk, model, cache, hidden, pieces[0], starts[0], lengths, loops=loops)
    seconds = time.perf_counter() - begin
    for piece, start in zip(pieces, starts):
        cache, hidden = run(model, cache, hidden, piece, start, lengths)
    return cache, hidden, lengths, seconds


def generate(
    model,
    prompts,
    max_new_tokens,
    prefill_chunk=512,
    sampling=GREEDY,
    stop=(),
    loops=None,
    exit_threshold=None,
    block=32,
    indices=None,
    on_tokens=None,
):
    """Continues prompts until each has met a stop token or has `max_new_tokens` new ones.

    Args:
      model: `LoopedTransformer`.
      prompts: lists of token ids, of different lengths if need be; each gives what it gives alone.
      max_new_tokens: the most new tokens of each.
      prefill_chunk: C of the prefill. A MELT's outcome depends on it, a LoopLM's does not.
      sampling: `Sampling`.
      stop: token ids that end a sequence.
      loops: T, where it is not the model's.
      exit_threshold: the cumulative exit probability at which a loop's logits are used, where it is not the model's.
      block: tokens between two looks of the host; 1 streams token by token.
      indices: [B], which prompt of a larger whole each is, for `sampling`; 0, 1, … by default.
      on_tokens: called with the new tokens of each prompt (a list of lists) as they come.

    Returns:
      `Generation`.

    Raises:
      ValueError: names every impossible value and every prompt that cannot be run.
    """
    check_request(model.config, prompts, max_new_tokens, prefill_chunk, sampling, loops, exit_threshold, block)
    clock = time.perf_counter
    indices = np.asarray(range(len(prompts)) if indices is None else indices, np.int32)
    # Filled up with what is no token, so that a few stop tokens more or less need no other compilation.
    stop_tokens = np.asarray((*stop, *[-1] * (8 - len(stop))), np.int32)
    sampling = jax.tree.map(jnp.asarray, sampling)
    request = replicated(SamplingRequest(sampling, indices, stop_tokens, np.int32(max_new_tokens)))
    threshold = None if exit_threshold is None else float(exit_threshold)
    begin = clock()
    cache, hidden, lengths, compiling = prefill(model, prompts, max_new_tokens, prefill_chunk, loops)
    first, seconds = _compiled(first_tokens, model, hidden, lengths, request, exit_threshold=threshold)
    state, tokens, exits = first(model, hidden, lengths, request)
    jax.block_until_ready(tokens)
    compiling += seconds
    prefill_seconds = clock() - begin - compiling
    options = {"block": block, "loops": loops, "exit_threshold": threshold}
    run, seconds = _compiled(decode_block, model, cache, state, request, **options)
    compiling += seconds
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.shared, cache.per_loop)))
    begin = clock()
    first_block = (tokens[None], exits[None], jnp.all(state.done))
    one_block = lambda carry: run(model, *carry, request)
    blocks = -(-(max_new_tokens - 1) // block)
    collected, left = _collect(one_block, (cache, state), first_block, blocks, on_tokens)
    return Generation(
        tokens=collected,
        exit_loops=left,
        stopped=[row[-1] in set(stop) for row in collected],
        loops=loops or model.config.loops,
        prompt_tokens=sum(map(len, prompts)),
        cache_bytes=cache_bytes,
        compile_seconds=compiling,
        prefill_seconds=prefill_seconds,
        decode_seconds=clock() - begin,
    )


def generate_tokens(model, prompts, max_new_tokens, prefill_chunk):
    """Greedy continuation, without a stop token: token lists of any lengths → [B, max_new_tokens] int32."""
    return np.array(generate(model, prompts, max_new_tokens, prefill_chunk).tokens, np.int32)


def check_request(config, prompts, max_new_tokens, prefill_chunk, sampling, loops, exit_threshold, block):
    """Raises a ValueError with a line for every impossible value and every prompt that cannot be run."""
    errors = sampling.errors()
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk), ("block", block)):
        if value < 1:
            errors.append(f"{name} must be 1 or more, got {value}")
    if loops is not None and loops < 1:
        errors.append(f"loops must be 1 or more, got {loops}")
    if exit_threshold is not None and not exit_threshold >= 0:
        errors.append(f"exit_threshold must be 0 or more (1: the last loop), got {exit_threshold}")
    if not prompts:
        errors.append("there is no prompt: give one or more")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            errors.append(f"prompt {index} is empty: a prompt needs at least one token")
        if unknown := sorted({int(token) for token in prompt if not 0 <= token < config.vocab}):
            errors.append(f"prompt {index} has token ids outside the vocabulary of {config.vocab}: {unknown}")
        if len(prompt) + max_new_tokens > config.max_positions:
            errors.append(
                f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones that passes the model's"
                f" {config.max_positions} positions: shorten the prompt or lower max_new_tokens"
            )
    if errors:
        raise ValueError("cannot generate:\n  " + "\n  ".join(errors))


def _collect(run, carry, first_block, blocks, on_tokens):
    """Runs up to so many blocks; for each prompt its tokens and its exit loops, the first block's before them."""
    collected, left = [[[] for _ in range(first_block[0].shape[1])] for _ in range(2)]
    waiting = first_block
    while waiting:
        # The next block is under way before this one is read; once all are done it is empty and costs nothing.
        following = None
        if blocks:
            blocks -= 1
            *carry, tokens, exits, done = run(carry)
            following = tokens, exits, done
        tokens, exits, done = jax.device_get(waiting)
        new = [column[column >= 0].tolist() for column in tokens.T]
        for prompt, column in enumerate(exits.T):
            collected[prompt] += new[prompt]
            left[prompt] += (column[column >= 0] + 1).tolist()
        if on_tokens:
            on_tokens(new)
        waiting = None if done else following
    return collected, left


def _advance(model, state, hidden, request, exit_threshold):
    """Chooses tokens from hidden [T, B, D]: (`DecodeState`, tokens [B], exit loops [B]), −1 for finished sequences."""
    logits, left = next_logits(model, hidden, exit_threshold)
    chosen = sample_tokens(whole_features(logits), request.sampling, request.indices, state.emitted)
    live = ~state.done
    emitted = state.emitted + live
    over = (chosen[:, None] == request.stop).any(axis=-1) | (emitted >= request.limit)
    new_state = DecodeState(jnp.where(live, chosen, state.tokens), state.lengths, emitted, state.done | over)
    return new_state, jnp.where(live, chosen, -1), jnp.where(live, left, -1)


def _compiled(function, *args, **static):
    """A jitted function's executable for these arguments, of JAX's cache if it has one, and the seconds that took."""
    begin = time.perf_counter()
    executable = function.lower(*args, **static).compile()
    return executable, time.perf_counter() - begin
