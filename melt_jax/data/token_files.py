"""Token files: ids prepared elsewhere, read where they lie.

    .npy    [N] one stream, cut into sequences of the wanted length; or [M, S] sequences; mapped, not loaded
    .npz    tokens [M, S], and if wanted segments and loss_mask [M, S]; loaded whole, for numpy cannot map archives

Segments give every packed document an id and padding 0. The loss mask is 1 where the prediction made *at* a token, that
of the next one, is scored; the last token of a document predicts nothing. By default a sequence is one document, all of
it scored.
"""

import dataclasses
import logging
import pathlib
import zipfile
import zlib

import numpy as np

from melt_jax.data.batch import Batch

log = logging.getLogger(__name__)
ROWS_AT_A_TIME = 1024
ARRAYS = ("tokens", "segments", "loss_mask")
# What a damaged file raises. A .npz is a zip archive, of which half a copy has no end that says what is in it.
UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class TokenSequences:
    """A token file as sequences: `len(x)` is their number, `x[i]` a `Batch` of int32 [S] arrays.

    Attributes:
      tokens: [M, S] integers, mapped from a .npy.
      segments: [M, S], or None: each sequence is one document.
      loss_mask: [M, S], or None: everything is scored that predicts a token of its own document.
      dropped: tokens at a stream's end that fill no sequence.
    """

    tokens: np.ndarray
    segments: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    dropped: int = 0

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = np.array(self.tokens[index], np.int32)
        segments = np.ones_like(tokens) if self.segments is None else np.array(self.segments[index], np.int32)
        predicts = np.zeros(len(tokens), bool)
        predicts[:-1] = _predicts(segments)
        targets = np.zeros_like(tokens)
        targets[:-1] = np.where(predicts[:-1], tokens[1:], 0)
        mask = predicts if self.loss_mask is None else self.loss_mask[index]
        return Batch(tokens, segments, np.array(mask, np.int32), targets)


def open_tokens(path, length=None):
    """Opens a token file.

    Args:
      path: a .npy or .npz.
      length: S, tokens of a sequence; for a file of sequences None takes theirs.

    Returns:
      `TokenSequences`. What a stream's end leaves over is told in the log.

    Raises:
      ValueError: everything that is wrong with the file's form, one line each. Values are checked by `token_errors`.
    """
    sequences, found = _open(path, length)
    if found:
        raise ValueError("\n".join(found))
    if sequences.dropped:
        count, width = sequences.tokens.shape
        log.warning("%s: %d sequences of %d tokens; the last %d are left out", path, count, width, sequences.dropped)
    return sequences


def token_errors(path, length, vocab):
    """Everything wrong with a token file for sequences of that length and ids below vocab; reads it through once."""
    sequences, found = _open(path, length)
    if found:
        return found
    lowest, highest, messages = np.inf, -np.inf, {}
    for first in range(0, len(sequences), ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        tokens = sequences.tokens[rows]
        lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
        for message, bad in _bad_rows(sequences, rows):
            if bad.any():
                messages.setdefault(message, first + int(np.argmax(bad)))
    if lowest < 0 or highest >= vocab:
        found.append(
            f"{path}: token ids run from {lowest} to {highest}, but the model's vocabulary from 0 to {vocab - 1};"
            " was it written with this model's tokenizer?"
        )
    return found + [f"{path}: {message}; first in sequence {row}" for message, row in messages.items()]


def _open(path, length):
    """(`TokenSequences`, []) or (None, what is wrong with the file's form)."""
    path = pathlib.Path(path)
    if not path.is_file():
        return None, [f"{path}: no such file"]
    if path.suffix not in (".npy", ".npz"):
        return None, [f'{path}: expected a .npy or .npz file, found "{path.suffix}"']
    try:
        if path.suffix == ".npy":
            arrays = {"tokens": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
    except UNREADABLE as error:
        return None, [f"{path}: cannot be read as {path.suffix}: {error}"]
    found = [f"{path}: {message}" for message in _form_errors(arrays, path.suffix == ".npz", length)]
    if found:
        return None, found
    tokens = arrays["tokens"]
    if tokens.ndim == 2:
        return TokenSequences(**arrays), []
    count, dropped = divmod(len(tokens), length)
    return TokenSequences(tokens[: count * length].reshape(count, length), dropped=dropped), []


def _form_errors(arrays, archive, length):
    if "tokens" not in arrays:
        return [f'expected an array "tokens", found {", ".join(sorted(arrays)) or "none"}']
    found = []
    if unknown := sorted(set(arrays) - set(ARRAYS)):
        found.append(f"unknown arrays {', '.join(unknown)}; expected {', '.join(ARRAYS)}")
    tokens = arrays["tokens"]
    for name, array in arrays.items():
        if name in ARRAYS and array.dtype.kind not in ("iu" if name == "tokens" else "iub"):
            found.append(f"{name}: expected integers, found {array.dtype}")
        if name in ARRAYS and array.shape != tokens.shape:
            found.append(f"{name}: expected the tokens' shape {list(tokens.shape)}, found {list(array.shape)}")
    dimensions = (2,) if archive else (1, 2)
    if tokens.ndim not in dimensions:
        expected = "[sequences, length]" if archive else "[tokens] or [sequences, length]"
        return [*found, f"tokens: expected {expected}, found shape {list(tokens.shape)}"]
    if tokens.ndim == 1 and length is None:
        found.append("one stream of tokens has to be cut: give the length of a sequence")
    elif tokens.ndim == 1 and len(tokens) < length:
        found.append(f"expected at least one sequence of {length} tokens, found a stream of {len(tokens)}")
    elif tokens.ndim == 2 and 0 in tokens.shape:
        found.append(f"expected at least one sequence, found shape {list(tokens.shape)}")
    elif tokens.ndim == 2 and length not in (None, tokens.shape[1]):
        found.append(
            f"expected sequences of {length} tokens, found {tokens.shape[1]}; set the length to {tokens.shape[1]}"
            " or write the file again"
        )
    return found


def _bad_rows(sequences, rows):
    """[(what is wrong, [rows] bool)] of segments and loss masks."""
    out = []
    segments = np.ones(sequences.tokens[rows].shape, np.int32)
    if sequences.segments is not None:
        segments = sequences.segments[rows]
        out.append(("segments: expected ids of 0 (padding) or more, found a negative one", (segments < 0).any(1)))
        out.append(("segments: expected ids below 2³¹, found a larger one", (segments >= 2**31).any(1)))
        segments = segments.astype(np.int64)
        starts = (segments != np.roll(segments, 1, axis=1)) & (segments > 0)
        starts[:, 0] = segments[:, 0] > 0
        ordered = np.sort(segments, axis=1)
        distinct = ((np.diff(ordered, axis=1, prepend=0) != 0) & (ordered > 0)).sum(1)
        out.append(
            (
                "segments: a document's tokens must stand together, found an id again after another",
                starts.sum(1) > distinct,
            )
        )
    if sequences.loss_mask is not None:
        mask = sequences.loss_mask[rows].astype(np.int64)
        out.append(("loss_mask: expected 0 and 1", ((mask != 0) & (mask != 1)).any(1)))
        out.append(("loss_mask: padding (segment 0) is scored", ((mask != 0) & (segments == 0)).any(1)))
        crosses = np.ones(mask.shape, bool)
        crosses[:, :-1] = ~_predicts(segments)
        message = "loss_mask: the last token of a document is scored, but what it predicts is not in it; a 1 marks the"
        out.append((f"{message} token before the one predicted", ((mask != 0) & crosses & (segments != 0)).any(1)))
    return out


def _predicts(segments):
    """Whether each token but the last of [..., S] is followed by one of its own document: [..., S − 1] bool."""
    return (segments[..., :-1] == segments[..., 1:]) & (segments[..., :-1] != 0)
