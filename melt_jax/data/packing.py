"""Packing of documents into sequences of fixed length."""

from melt_jax.config import InputError
from melt_jax.data.documents import Document


class Packer:
    """Packs whole documents: each goes into the first open sequence that has room for it.

    Deterministic; the window bounds the memory. A window of 1 fills sequences one after the other.
    """

    def __init__(self, length: int, window: int):
        """`length` is in tokens; `window` is the number of sequences open at a time, at least 1."""
        self._length, self._window = length, window
        self._open: list[tuple[int, list[Document]]] = []

    def add(self, document: Document) -> list[Document] | None:
        """Adds a document of at most `length` tokens; returns the sequence that this closes, or None.

        If the window is full, the fullest sequence is closed; of several, the oldest.

        Raises:
          InputError: the document is longer than a sequence.
        """
        size = len(document.tokens)
        if size > self._length:
            raise InputError(f"{document.place}: expected at most {self._length} tokens, found {size}")
        for i, (used, sequence) in enumerate(self._open):
            if used + size <= self._length:
                self._open[i] = (used + size, [*sequence, document])
                return None
        self._open.append((size, [document]))
        if len(self._open) <= self._window:
            return None
        # The new sequence is never closed: later documents may fit into it, and a window of 1 keeps the order.
        fullest = max(range(self._window), key=lambda i: self._open[i][0])
        return self._open.pop(fullest)[1]

    def finish(self) -> list[list[Document]]:
        """The sequences still open, in order."""
        rest, self._open = [sequence for _, sequence in self._open], []
        return rest


def split(document: Document, length: int) -> list[Document]:
    """Pieces of at most `length` tokens of a document, each a separate document.

    The last token of a piece is not scored: its target is in the next piece. Pieces without scored tokens are kept.
    """
    pieces = []
    for start in range(0, len(document.tokens), length):
        part = slice(start, start + length)
        loss_mask = document.loss_mask[part].copy()
        loss_mask[-1] = False
        pieces.append(document._replace(tokens=document.tokens[part], loss_mask=loss_mask))
    return pieces
