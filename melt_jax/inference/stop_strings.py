"""Stop strings: texts that end a generation, wherever the borders of tokens fall."""

from collections.abc import Collection, Sequence

from melt_jax.data.text import Tokenizer


class StopFinder:
    """Follows the text of one sequence as its tokens arrive, until a stop string or a stop token.

    Args:
      tokenizer: of the model.
      stops: the stop strings; special tokens may be part of them.
      after: stop strings count only after this text, the end of the thinking; empty: everywhere.

    Attributes:
      done: the sequence has ended.
      text: the text up to and including the token that ended it, with special tokens written out, without a stop token.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], after: str = "") -> None:
        self._stop_ids: Collection[int] = tokenizer.stop_ids
        self._stream = tokenizer.stream()
        self._stops = [stop for stop in stops if stop]
        self._after, self._begin = after, None if after else 0
        self.done, self.text = False, ""

    def push(self, tokens: Sequence[int]) -> bool:
        """Adds tokens, ignoring those after the end; returns `done`."""
        for token in tokens:
            if self.done:
                break
            if token in self._stop_ids:
                self.finish()
                break
            self._add(self._stream.push(token))
        return self.done

    def finish(self) -> str:
        """Ends the sequence; returns its text, with the characters that were still incomplete."""
        if not self.done:
            self.done = True
            self._add(self._stream.finish())
        return self.text

    def _add(self, piece: str) -> None:
        before, self.text = len(self.text), self.text + piece
        if self._begin is None:
            found = self.text.find(self._after, max(0, before - len(self._after)))
            self._begin = None if found < 0 else found + len(self._after)
        if self._begin is not None:
            for stop in self._stops:
                self.done |= self.text.find(stop, max(self._begin, before - len(stop))) >= 0
