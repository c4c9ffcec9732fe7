"""Token files: ids prepared with other tools.

    .npy    [N], one stream, cut into sequences of the requested length; or [M, S] sequences; memory-mapped
    .npz    tokens [M, S], and optionally segments and loss_mask [M, S]; loaded, because NumPy cannot map archives

A file in a bucket is loaded too, in each process.

Segments give each packed document an id; padding is 0. The loss mask is 1 if the prediction made *at* a token, of the
next one, is scored; the last token of a document predicts nothing. By default a sequence is one document and all of it
is scored.
"""

import dataclasses
import io
import logging
import zipfile
import zlib
from typing import Any

import numpy as np

from melt_jax.config import InputError
from melt_jax.data.batch import Batch
from melt_jax.files import Path, PathLike, as_path, in_bucket

log = logging.getLogger(__name__)
ROWS_AT_A_TIME = 1024
ARRAYS = ("tokens", "segments", "loss_mask")
# Exceptions of damaged files. A .npz is a zip archive, whose directory is at its end.
UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class TokenSequences:
    """A token file as sequences: `len(x)` is their number, `x[i]` a `Batch` of int32 [S] arrays.

    Attributes:
      tokens: [M, S] integers, mapped from a .npy.
      segments: [M, S], or None: each sequence is one document.
      loss_mask: [M, S], or None: a token is scored if its next token is in the same document.
      dropped: tokens at the end of a stream that do not fill a sequence.
    """

    tokens: np.ndarray
    segments: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        tokens = np.array(self.tokens[index], np.int32)
        segments = np.ones_like(tokens) if self.segments is None else np.array(self.segments[index], np.int32)
        predicts = np.zeros(len(tokens), bool)
        predicts[:-1] = _predicts(segments)
        targets = np.zeros_like(tokens)
        targets[:-1] = np.where(predicts[:-1], tokens[1:], 0)
        mask = predicts if self.loss_mask is None else self.loss_mask[index]
        return Batch(tokens, segments, np.array(mask, np.int32), targets)


def open_tokens(path: PathLike, length: int | None = None) -> TokenSequences:
    """Opens a token file and logs the number of tokens dropped at the end of a stream.

    Args:
      path: a .npy or .npz.
      length: S, tokens of a sequence; may be None for a file of sequences.

    Raises:
      InputError: lists the errors in the file's form. `token_errors` also checks the values.
    """
    sequences, errors = _open(path, length)
    if sequences is None:
        raise InputError("\n".join(errors))
    if sequences.dropped:
        count, width = sequences.tokens.shape
        message = "%s: %d sequences of %d tokens; the last %d tokens are dropped"
        log.warning(message, path, count, width, sequences.dropped)
    return sequences


def token_errors(path: PathLike, length: int, vocab: int) -> list[str]:
    """Errors of a token file as sequences of `length` tokens with ids below `vocab`; reads the whole file."""
    sequences, errors = _open(path, length)
    if sequences is None:
        return errors
    lowest, highest, messages, scored = np.inf, -np.inf, {}, False
    for first in range(0, len(sequences), ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        tokens = sequences.tokens[rows]
        lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
        scored = scored or any(sequences[row].loss_mask.any() for row in range(*rows.indices(len(sequences))))
        for message, bad in _bad_rows(sequences, rows):
            if bad.any():
                messages.setdefault(message, first + int(np.argmax(bad)))
    if lowest < 0 or highest >= vocab:
        errors.append(
            f"{path}: expected token ids from 0 to {vocab - 1}, found {lowest} to {highest}; write it with the model's"
            " tokenizer"
        )
    if not (errors or messages or scored):
        errors.append(f"{path}: expected scored tokens, found none in any sequence; correct loss_mask or segments")
    return errors + [f"{path}: {message}; first in sequence {row}" for message, row in messages.items()]


def _open(path: PathLike, length: int | None) -> tuple[TokenSequences | None, list[str]]:
    """(`TokenSequences`, []) or (None, errors in the file's form)."""
    path = as_path(path)
    if not path.is_file():
        return None, [f"{path}: expected a file, found none"]
    if path.suffix not in (".npy", ".npz"):
        return None, [f'{path}: expected a .npy or .npz file, found "{path.suffix}"']
    try:
        if path.suffix == ".npy":
            arrays = {"tokens": _load_array(path)}
        else:
            # Opened here: NumPy does not close the file of a damaged archive.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
    except UNREADABLE as error:
        return None, [f"{path}: expected a {path.suffix} file, found {error}"]
    errors = [f"{path}: {message}" for message in _form_errors(arrays, path.suffix == ".npz", length)]
    if errors:
        return None, errors
    tokens = arrays["tokens"]
    if tokens.ndim == 2:
        return TokenSequences(**arrays), []
    assert length is not None  # checked by `_form_errors`
    count, dropped = divmod(len(tokens), length)
    return TokenSequences(tokens[: count * length].reshape(count, length), dropped=dropped), []


def _load_array(path: Path) -> Any:
    if in_bucket(path):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _form_errors(arrays: dict[str, np.ndarray], archive: bool, length: int | None) -> list[str]:
    if "tokens" not in arrays:
        return [f'expected an array "tokens", found {", ".join(sorted(arrays)) or "none"}']
    errors = []
    if unknown := sorted(set(arrays) - set(ARRAYS)):
        errors.append(f"arrays: expected {', '.join(ARRAYS)}, found {', '.join(unknown)}")
    tokens = arrays["tokens"]
    for name, array in arrays.items():
        if name in ARRAYS and array.dtype.kind not in ("iu" if name == "tokens" else "iub"):
            errors.append(f"{name}: expected integers, found {array.dtype}")
        if name in ARRAYS and array.shape != tokens.shape:
            errors.append(f"{name}: expected the tokens' shape {list(tokens.shape)}, found {list(array.shape)}")
    return errors + _shape_errors(tokens, archive, length)


def _shape_errors(tokens: np.ndarray, archive: bool, length: int | None) -> list[str]:
    """At most one message."""
    if tokens.ndim not in ((2,) if archive else (1, 2)):
        expected = "[sequences, length]" if archive else "[tokens] or [sequences, length]"
        return [f"tokens: expected {expected}, found shape {list(tokens.shape)}"]
    if tokens.ndim == 2 and 0 in tokens.shape:
        return [f"expected at least one sequence, found shape {list(tokens.shape)}"]
    if tokens.ndim == 2 and length not in (None, tokens.shape[1]):
        found = tokens.shape[1]
        return [f"expected sequences of {length} tokens, found {found}; set the length to {found}"]
    if tokens.ndim == 1 and length is None:
        return ["expected the length of a sequence for one stream of tokens, found none; set the length"]
    if tokens.ndim == 1 and length is not None and len(tokens) < length:
        return [f"expected at least one sequence of {length} tokens, found a stream of {len(tokens)}"]
    return []


def _bad_rows(sequences: TokenSequences, rows: slice) -> list[tuple[str, np.ndarray]]:
    """[(message, [rows] bool, true for sequences with that error)] of segments and loss masks."""
    segments = np.ones(sequences.tokens[rows].shape, np.int64)
    out = []
    if sequences.segments is not None:
        segments = sequences.segments[rows]
        out.append(("segments: expected ids of 0 (padding) or more, found a negative one", (segments < 0).any(1)))
        out.append(("segments: expected ids below 2³¹, found a larger one", (segments >= 2**31).any(1)))
        segments = segments.astype(np.int64)
        message = "segments: expected a document's tokens to be consecutive, found its id again after another"
        out.append((message, _runs(segments) > _distinct(segments)))
    if sequences.loss_mask is None:
        return out
    mask = sequences.loss_mask[rows].astype(np.int64)
    out.append(("loss_mask: expected 0 and 1, found another value", ((mask != 0) & (mask != 1)).any(1)))
    out.append(("loss_mask: expected 0 at padding (segment 0), found a scored token", _any(mask, segments == 0)))
    last = np.ones(mask.shape, bool)
    last[:, :-1] = ~_predicts(segments)
    message = "loss_mask: expected 0 at a document's last token, which predicts nothing, found it scored; a 1 marks the"
    out.append((f"{message} token before the one predicted", _any(mask, last & (segments != 0))))
    return out


def _any(mask: np.ndarray, where: np.ndarray) -> np.ndarray:
    return ((mask != 0) & where).any(1)


def _runs(segments: np.ndarray) -> np.ndarray:
    """The number of runs of equal ids above 0 in each sequence."""
    starts = (segments != np.roll(segments, 1, axis=1)) & (segments > 0)
    starts[:, 0] = segments[:, 0] > 0
    return starts.sum(1)


def _distinct(segments: np.ndarray) -> np.ndarray:
    """The number of different ids above 0 in each sequence."""
    ordered = np.sort(segments, axis=1)
    return ((np.diff(ordered, axis=1, prepend=0) != 0) & (ordered > 0)).sum(1)


def _predicts(segments: np.ndarray) -> np.ndarray:
    """Whether each token of [..., S] but the last is followed by one of the same document: [..., S − 1] bool."""
    return (segments[..., :-1] == segments[..., 1:]) & (segments[..., :-1] != 0)
