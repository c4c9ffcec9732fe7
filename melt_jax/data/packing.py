"""Documents side by side in sequences of fixed length."""


class Packer:
    """Puts documents whole into sequences: each into the first of a few open sequences that has room for it.

    Deterministic, and as bounded in memory as its window. A window of 1 fills sequences one after the other.
    """

    def __init__(self, length, window):
        """length: tokens of a sequence; window: sequences that are open at a time, at least 1."""
        self._length, self._window, self._open = length, window, []

    def add(self, document):
        """Places a document, a `Document` of at most `length` tokens; returns the sequence that this closes, or None.

        A sequence is a list of documents. One is closed when the window is full: the fullest, the oldest of equals.
        """
        size = len(document.tokens)
        if size > self._length:
            raise ValueError(f"{document.place}: {size} tokens do not fit a sequence of {self._length}")
        for i, (used, sequence) in enumerate(self._open):
            if used + size <= self._length:
                self._open[i] = (used + size, [*sequence, document])
                return None
        self._open.append((size, [document]))
        if len(self._open) <= self._window:
            return None
        # The new one stays: what comes next may fit into it, and with a window of 1 that keeps the order.
        fullest = max(range(self._window), key=lambda i: self._open[i][0])
        return self._open.pop(fullest)[1]

    def finish(self):
        """The sequences still open, in their order."""
        rest, self._open = [sequence for _, sequence in self._open], []
        return rest


def split(document, length):
    """Pieces of at most `length` tokens of a document, each a document of its own: they do not see each other.

    What the last token of a piece would have predicted stands in the next piece, and is not scored. A piece without
    scored predictions is kept: it shows in the counts.
    """
    pieces = []
    for start in range(0, len(document.tokens), length):
        part = slice(start, start + length)
        loss_mask = document.loss_mask[part].copy()
        loss_mask[-1] = False
        pieces.append(document._replace(tokens=document.tokens[part], loss_mask=loss_mask))
    return pieces
