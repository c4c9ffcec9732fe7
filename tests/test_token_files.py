"""Token files: streams are cut into sequences, targets stay within segments, malformed files are reported."""

import pathlib

import numpy as np
import pytest

from melt_jax.data.token_files import open_tokens, token_errors


def write(path, **arrays):
    """Writes the arrays as .npz, or `tokens` as .npy; returns the path as text."""
    if pathlib.Path(path).suffix == ".npy":
        np.save(path, arrays["tokens"])
    else:
        np.savez(path, **arrays)
    return str(path)


def test_stream_is_cut_and_the_rest_reported(tmp_path, caplog):
    path = write(tmp_path / "x.npy", tokens=np.arange(23, dtype=np.uint16))
    sequences = open_tokens(path, 5)
    assert "4 sequences of 5 tokens; the last 3 tokens are dropped" in caplog.text
    assert len(sequences) == 4 and sequences.dropped == 3
    np.testing.assert_array_equal(sequences[2].tokens, [10, 11, 12, 13, 14])
    np.testing.assert_array_equal(sequences[2].targets, [11, 12, 13, 14, 0])
    np.testing.assert_array_equal(sequences[2].loss_mask, [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(sequences[2].segments, np.ones(5))


def test_npy_is_mapped_not_loaded(tmp_path):
    sequences = open_tokens(write(tmp_path / "x.npy", tokens=np.arange(20)), 5)
    assert not sequences.tokens.flags.owndata and not sequences.tokens.flags.writeable
    assert isinstance(sequences.tokens, np.memmap)


def test_segments_bound_targets_and_mask(tmp_path):
    path = write(tmp_path / "x.npz", tokens=[[3, 4, 5, 6, 7, 8]], segments=[[1, 1, 2, 2, 2, 0]])
    row = open_tokens(path)[0]
    np.testing.assert_array_equal(row.targets, [4, 0, 6, 7, 0, 0])
    np.testing.assert_array_equal(row.loss_mask, [1, 0, 1, 1, 0, 0])
    masked = write(tmp_path / "y.npz", tokens=[[3, 4, 5, 6]], loss_mask=np.array([[False, True, True, False]]))
    np.testing.assert_array_equal(open_tokens(masked)[0].loss_mask, [0, 1, 1, 0])
    assert token_errors(path, 6, 64) == token_errors(masked, 4, 64) == []


GOOD = np.arange(12).reshape(3, 4)
FORM = {
    "expected a file, found none": ("a.npy", None),
    'expected a .npy or .npz file, found ".txt"': ("a.txt", b"1 2 3"),
    "expected a .npy file": ("a.npy", b"not an array"),
    "expected a .npz file": ("a.npz", b"PK not an archive"),
    'expected an array "tokens", found ids': ("a.npz", {"ids": GOOD}),
    "arrays: expected tokens, segments, loss_mask, found mask": ("a.npz", {"tokens": GOOD, "mask": GOOD}),
    "tokens: expected integers, found float64": ("a.npy", {"tokens": GOOD * 1.0}),
    "segments: expected the tokens' shape [3, 4], found [3, 3]": ("a.npz", {"tokens": GOOD, "segments": GOOD[:, 1:]}),
    "tokens: expected [sequences, length], found shape [12]": ("a.npz", {"tokens": GOOD.ravel()}),
    "tokens: expected [tokens] or [sequences, length], found shape [1, 3, 4]": ("a.npy", {"tokens": GOOD[None]}),
    "expected at least one sequence of 4 tokens, found a stream of 3": ("a.npy", {"tokens": np.arange(3)}),
    "expected at least one sequence, found shape [0, 4]": ("a.npy", {"tokens": GOOD[:0]}),
    "expected sequences of 4 tokens, found 2; set the length to 2": ("a.npy", {"tokens": GOOD[:, :2]}),
}


@pytest.mark.parametrize("message", FORM)
def test_malformed_files_are_reported(tmp_path, message):
    name, content = FORM[message]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, **content)
    with pytest.raises(ValueError) as error:
        open_tokens(path, 4)
    assert message in str(error.value) and str(path) in str(error.value)
    assert token_errors(path, 4, 64) == str(error.value).split("\n")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_archives_are_reported(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, tokens=np.arange(4000).reshape(40, 100) % 97, segments=np.ones((40, 100), np.int32))
    whole = path.read_bytes()
    overwritten = whole[:200] + bytes(60) + whole[260:]
    for content in (whole[: len(whole) // 2], whole[:-1], whole[:3], b"", overwritten):
        path.write_bytes(content)
        (message,) = token_errors(path, 100, 97)
        assert message.startswith(f"{path}: expected a .npz file, found ")


def test_stream_needs_a_length(tmp_path):
    with pytest.raises(ValueError, match="set the length"):
        open_tokens(write(tmp_path / "x.npy", tokens=np.arange(8)))


def test_all_form_errors_are_listed(tmp_path):
    path = write(tmp_path / "x.npz", tokens=GOOD * 1.0, segments=GOOD[:2], loss_mask=GOOD * 1.0, more=GOOD)
    found = "\n".join(token_errors(path, 5, 64))
    for part in (
        "loss_mask, found more",
        "tokens: expected int",
        "segments: expected the",
        "loss_mask: expected int",
        "of 5",
    ):
        assert part in found


VALUES = {
    "expected token ids from 0 to 10, found 0 to 11": {},
    "expected token ids from 0 to 10, found -1 to 10": {"tokens": GOOD - 1},
    "segments: expected ids of 0 (padding) or more": {"segments": np.where(GOOD == 6, -1, 1)},
    "segments: expected ids below 2³¹, found a larger one": {"segments": np.where(GOOD > 5, 2**31, 1)},
    "expected a document's tokens to be consecutive": {"segments": [[1, 1, 1, 1], [1, 2, 1, 1], [0, 0, 0, 0]]},
    "loss_mask: expected 0 and 1": {"loss_mask": np.where(GOOD == 5, 2, 0)},
    "loss_mask: expected 0 at padding (segment 0)": {"segments": np.where(GOOD == 6, 0, 1), "loss_mask": GOOD == 6},
    "loss_mask: expected 0 at a document's last token": {"loss_mask": GOOD == 7},
}


@pytest.mark.parametrize("message", VALUES)
def test_impossible_values_are_reported(tmp_path, message):
    path = write(tmp_path / "x.npz", **{"tokens": GOOD, **VALUES[message]})
    found = token_errors(path, 4, 11)
    matching = [text for text in found if message in text]
    assert len(matching) == 1 and path in matching[0]
    if message.startswith(("segments", "loss_mask", "expected a document")):
        assert matching[0].endswith("first in sequence 1")


def test_file_without_scores_is_refused(tmp_path):
    path = write(tmp_path / "a.npz", tokens=np.ones((2, 4), int), loss_mask=np.zeros((2, 4), int))
    assert token_errors(path, 4, 8) == [
        f"{path}: expected scored tokens, found none in any sequence; correct loss_mask or segments"
    ]


def test_valid_values_have_no_errors(tmp_path):
    segments = [[1, 1, 2, 2], [0, 7, 7, 0], [5, 5, 3, 0]]
    path = write(
        tmp_path / "x.npz", tokens=GOOD, segments=segments, loss_mask=[[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    )
    assert token_errors(path, 4, 12) == []
