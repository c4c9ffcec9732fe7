"""The batch of a training step."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """Sequences, [B, S] int32 each.

    Attributes:
      tokens: token ids.
      segments: an id per packed document; 0 is padding.
      loss_mask: 1 if the prediction made at this token is scored.
      targets: the next token of the same document; for pretraining and perplexity.
    """

    tokens: jax.Array | np.ndarray
    segments: jax.Array | np.ndarray
    loss_mask: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray | None = None
