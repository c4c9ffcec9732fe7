"""Generation: prefill in chunks, then token by token, one compilation each (DESIGN §3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from melt_jax.model.cache import create_cache
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import exit_loop
from melt_jax.model.sequence import split_chunks


@functools.partial(jax.jit, static_argnames=("loops",), donate_argnums=1)
def prefill_chunk(model, cache, last_hidden, tokens, start, lengths, loops=None):
    """Runs one chunk [B, C] of right-padded prompts and writes its rows.

    Args:
      last_hidden: [T, B, D], the hidden states of each prompt's last token, kept from whichever chunk holds it.
      start: the chunk's first slot, a scalar.
      lengths: [B], the prompts' lengths.

    Returns:
      (cache, last_hidden).
    """
    slots = start + jnp.arange(tokens.shape[1])
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    out = run_chunk(model, tokens, cache, start, segments=segments, loops=loops)
    here = slots == lengths[:, None] - 1
    found = jnp.einsum("tbcd,bc->tbd", out.hidden, here.astype(out.hidden.dtype))
    last_hidden = jnp.where(here.any(1)[None, :, None], found, last_hidden)
    return cache.write(out.rows, out.segments, start), last_hidden


@functools.partial(jax.jit, static_argnames=("loops",), donate_argnums=1)
def decode_token(model, cache, tokens, lengths, loops=None):
    """Runs one token [B] of each sequence at its slot `lengths` [B]: the exact model. Returns (cache, hidden [T, B, D])."""
    out = run_chunk(model, tokens[:, None], cache, lengths, loops=loops)
    return cache.write(out.rows, out.segments, lengths), out.hidden[:, :, 0]


def next_logits(model, hidden):
    """Logits [B, V] of the loop at which the exit gate leaves, from hidden [T, B, D]."""
    chosen = exit_loop(model.exit_pdf(hidden[:, :, None])[:, 0], model.config.exit_threshold)
    return model.logits(jnp.take_along_axis(hidden, chosen[None, :, None], axis=0)[0])


def prefill(model, prompts, max_new_tokens, chunk, loops=None):
    """Runs prompts of any lengths, chunk after chunk, into a cache with room for `max_new_tokens` more.

    Returns:
      (cache, last hidden [T, B, D], lengths [B]).
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    chunks = split_chunks(tokens, chunk)
    slots = max(chunks.shape[0] * chunk, int(lengths.max()) + max_new_tokens)
    cache = create_cache(model.config, len(prompts), slots, model.dtype, loops=loops)
    hidden = jnp.zeros((loops or model.config.loops, len(prompts), model.config.width), model.dtype)
    for index, piece in enumerate(chunks):
        cache, hidden = prefill_chunk(model, cache, hidden, piece, index * chunk, lengths, loops)
    return cache, hidden, lengths


def generate_tokens(model, prompts, max_new_tokens, prefill_chunk):
    """Greedy continuation, without a stop token.

    Args:
      model: `LoopedTransformer`.
      prompts: lists of token ids, of different lengths if need be.
      max_new_tokens: tokens to generate for each.
      prefill_chunk: C of the prefill.

    Returns:
      [B, max_new_tokens] int32.
    """
    cache, hidden, lengths = prefill(model, prompts, max_new_tokens, prefill_chunk)
    pick = jax.jit(lambda model, hidden: jnp.argmax(next_logits(model, hidden), axis=-1).astype(jnp.int32))
    generated = []
    for step in range(max_new_tokens):
        generated.append(pick(model, hidden))
        if step + 1 < max_new_tokens:
            cache, hidden = decode_token(model, cache, generated[-1], lengths + step)
    return np.stack(generated, axis=1)
