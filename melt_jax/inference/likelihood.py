"""Log-likelihoods of given continuations, in batches of mixed lengths.

A continuation is scored with the logits that generation would use: those of the loop that the exit gate selects, with
guidance if the model has it. Tokens run in chunks of `chunk_size`, as in a prefill. A MELT's result depends on it
(MELT, arXiv 2605.07721), a LoopLM's does not.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from melt_jax.data.batch import Batch
from melt_jax.inference.sampling import select_logits
from melt_jax.inference.scoring import piece_size, place_padded, run_piece
from melt_jax.model.cache import create_cache
from melt_jax.model.layout import batch_axes
from melt_jax.model.model import LoopedTransformer
from melt_jax.model.sequence import join_chunks, segment_positions, split_chunks
from melt_jax.sharding import batch_groups, gather_at_use, in_mesh

LENGTH_MULTIPLE = 128  # batches are padded to a multiple of it, so that similar lengths share a compilation


class Continuation(NamedTuple):
    """Token ids of a context and of the continuation to score; both hold at least one token."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """The score of a continuation.

    Attributes:
      log_probability: of the continuation after its context, nats.
      greedy: whether each of its tokens is the most likely one; of equally likely tokens the lowest id counts.
    """

    log_probability: float
    greedy: bool


def score_continuations(
    model: LoopedTransformer, requests: Sequence[Continuation], chunk_size: int, rows: int
) -> Iterator[tuple[int, Likelihood]]:
    """Scores continuations, the longest first, and yields (index of the request, its score) as batches are finished.

    Under a mesh (`jax.set_mesh`) each batch is split over its batch axes.

    Args:
      model: the model.
      requests: of any lengths. A request's score does not depend on the others.
      chunk_size: C of the model.
      rows: requests that run at a time; under a mesh rounded up to a multiple of its batch groups.
    """
    length = lambda i: len(requests[i].context) + len(requests[i].tokens) - 1
    order = sorted(range(len(requests)), key=length, reverse=True)
    rows = -(-min(rows, len(requests)) // batch_groups()) * batch_groups()
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        batch = continuation_batch([requests[i] for i in chosen])
        chunk = min(chunk_size, batch.tokens.shape[1])
        log_p, best = jax.device_get(token_scores(model, place_padded(batch, rows), chunk))
        for row, index in enumerate(chosen):
            scored = batch.loss_mask[row].astype(bool)
            total = float(np.sum(log_p[row][scored], dtype=np.float64))
            yield index, Likelihood(total, bool(best[row][scored].all()))


def continuation_batch(requests: Sequence[Continuation]) -> Batch:
    """A `Batch` with one request per sequence, padded to a multiple of `LENGTH_MULTIPLE`; continuations are scored."""
    longest = max(len(context) + len(tokens) - 1 for context, tokens in requests)
    shape = len(requests), -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    inputs, segments, mask, targets = (np.zeros(shape, np.int32) for _ in range(4))
    for row, (context, tokens) in enumerate(requests):
        ids = [*context, *tokens]
        end = len(ids) - 1
        inputs[row, :end], targets[row, :end], segments[row, :end] = ids[:-1], ids[1:], 1
        mask[row, len(context) - 1 : end] = 1
    return Batch(inputs, segments, mask, targets)


@functools.partial(jax.jit, static_argnames="chunk_size")
def token_scores(
    model: LoopedTransformer, batch: Batch, chunk_size: int
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """The log-probability of each target, nats, and whether it is the most likely token.

    Only one piece's logits are in memory at a time (`scoring.piece_size`).

    Args:
      model: the model.
      batch: [B, S], with targets; under a mesh split by `sharding.batch_sharding`.
      chunk_size: C of the model; static.
    """
    model = gather_at_use(model)
    length = batch.tokens.shape[1]
    size = piece_size(length, chunk_size)
    pieces = split_chunks((batch, segment_positions(batch.segments)), size)
    count, rows, _ = pieces[0].tokens.shape
    # Behind the barrier, because XLA would otherwise spend seconds folding attention over an empty cache.
    cache = jax.lax.optimization_barrier(
        create_cache(model.config, rows, count * size, model.dtype, batch_axes=batch_axes(batch.tokens))
    )

    def one_piece(cache, xs):
        start, (piece, positions) = xs
        cache, hidden, _ = run_piece(model, cache, piece, positions, start, chunk_size)
        logits, _ = select_logits(model, hidden)
        # Masked reductions instead of indices work on a vocabulary that is split over devices.
        ids, targets = jnp.arange(logits.shape[-1])[None, None], piece.targets[..., None]
        log_p = jnp.sum(jnp.where(ids == targets, jax.nn.log_softmax(logits), 0.0), axis=-1)
        at_best = logits == jnp.max(logits, axis=-1, keepdims=True)
        best = jnp.min(jnp.where(at_best, ids, logits.shape[-1]), axis=-1)
        return cache, (log_p, best == piece.targets)

    starts = jnp.arange(count, dtype=jnp.int32) * size
    _, (log_p, best) = jax.lax.scan(one_piece, cache, (starts, pieces))
    spec = in_mesh(jax.P())  # whole in every process
    whole = lambda x: x if spec is None else jax.reshard(x, spec)
    return whole(join_chunks(log_p, 1)[:, :length]), whole(join_chunks(best, 1)[:, :length])
