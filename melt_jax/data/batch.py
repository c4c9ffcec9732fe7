"""The form in which sequences reach a step."""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """Sequences, [B, S] int32 each.

    Attributes:
      tokens: token ids.
      segments: an id per packed document; 0 is padding.
      loss_mask: 1 where the prediction made at this token is scored.
      targets: the next token of the same document; for pre-training and perplexities.
    """

    tokens: jax.Array
    segments: jax.Array
    loss_mask: jax.Array
    targets: jax.Array | None = None
