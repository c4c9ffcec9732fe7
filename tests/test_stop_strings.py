"""Stop strings are found wherever tokens are cut."""

import itertools

import pytest

from melt_jax.data.text import Tokenizer
from melt_jax.inference.stop_strings import StopFinder


class Pieces(Tokenizer):
    """A tokenizer whose token i is the i-th piece; token −1 is its stop token."""

    stop_ids = (-1,)

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, skip_special=False):
        return "".join(self.pieces[i] for i in ids)


def cut_everywhere(text):
    """Every way to cut a text into pieces."""
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        pieces = [text[0]]
        for cut, character in zip(cuts, text[1:]):
            if cut:
                pieces.append(character)
            else:
                pieces[-1] += character
        yield pieces


@pytest.mark.parametrize("stops", [["bc"], ["x", "bcd"], ["cdb"]])
def test_stops_are_found_across_token_borders(stops):
    """The text ends with the first piece that completes a stop string."""
    for pieces in cut_everywhere("abcdbcd"):
        finder = StopFinder(Pieces(pieces), stops)
        ended = [finder.push([i]) for i in range(len(pieces))]
        text = "".join(pieces)
        end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        lengths = list(itertools.accumulate(map(len, pieces)))
        assert ended == [length >= end for length in lengths]
        assert finder.text == text[: next(length for length in lengths if length >= end)]


def test_stops_count_only_after_the_thinking():
    for pieces in cut_everywhere("ab</ab"):
        finder = StopFinder(Pieces(pieces), ["ab"], after="</")
        assert finder.push(range(len(pieces))) == finder.done
        assert finder.text == "ab</ab"
    early = StopFinder(Pieces(["ab", "a"]), ["ab"], after="</")
    assert not early.push([0, 1])


def test_stop_token_and_the_rest_are_dropped():
    finder = StopFinder(Pieces(["a", "b"]), ["never"])
    assert finder.push([0, -1, 1])
    assert finder.finish() == "a"
