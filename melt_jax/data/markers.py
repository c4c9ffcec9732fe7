"""Special tokens in untrusted text: contents of messages cannot end a turn or forge one.

A chat template writes markers such as `<|im_end|>`, which the tokenizer turns into special tokens. The same text inside
a content would become the same token. `Markers.protect` therefore replaces it, before the template is applied, with two
private characters that stand for it, and `Markers.split` finds them in the rendered text, so that the tokenizer encodes
that part as ordinary text. Contents without markers are not changed.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken

from melt_jax.config import InputError

ESCAPE = "\U0010fffd"  # private use; in a content it is protected like a marker
FIRST = 0x100000  # the characters after ESCAPE are FIRST + the marker's number
TAG = re.compile(r"[<\[].*[>\]]", re.DOTALL)
THOUGHTS = ("<think>", "</think>")


class Markers:
    """The texts that a tokenizer turns into tokens of their own.

    An assistant's message may contain `<think>`, `</think>` and markers that are not special, such as `<tool_call>`:
    they are part of an answer. In any other text, special tokens and all other tokens in angle or square brackets are
    protected.

    Args:
      added: the tokenizer's added tokens.
      normalize: the tokenizer's normalization of text, or None.
    """

    def __init__(self, added: Sequence[AddedToken], normalize: Callable[[str], str] | None = None):
        special = [token.content for token in added if token.special]
        tags = [token.content for token in added if not token.special and TAG.fullmatch(token.content)]
        self._texts = [ESCAPE, *special, *tags]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._in_answers = _any_of([ESCAPE, *(text for text in special if text not in THOUGHTS)])
        self._elsewhere = _any_of(self._texts)
        self._parts = re.compile(f"{ESCAPE}([{chr(FIRST)}-{chr(FIRST + len(self._texts) - 1)}])")
        normalized = [token.content for token in added if token.normalized and token.content in self._numbers]
        self._normalize = normalize if normalized else None
        self._normal_forms = _any_of([normalize(text) for text in normalized] if normalize else [])

    def protect(self, value: Any, answer: bool = False) -> Any:
        """A text, or lists and dicts of texts, with all markers replaced. A dict with the role assistant is an answer.

        Raises:
          InputError: a text becomes a marker when it is normalized.
        """
        if isinstance(value, dict):
            answer = answer or value.get("role") == "assistant"
            return {self.protect(key, answer): self.protect(item, answer) for key, item in value.items()}
        if isinstance(value, list):
            return [self.protect(item, answer) for item in value]
        if not isinstance(value, str):
            return value
        pattern = self._in_answers if answer else self._elsewhere
        text = pattern.sub(lambda match: ESCAPE + chr(FIRST + self._numbers[match[0]]), value)
        if self._normalize and (match := self._normal_forms.search(self._normalize(text))):
            raise InputError(f"text: expected none that is normalized to {match[0]!r}, found one; rewrite it")
        return text

    def split(self, text: str) -> list[tuple[str, bool]]:
        """[(part, whether it is a protected marker's text)] of a text, without empty parts."""
        parts = self._parts.split(text)
        pairs = [
            (self._texts[ord(part) - FIRST], True) if i % 2 else (part, False) for i, part in enumerate(parts) if part
        ]
        return pairs


def _any_of(texts):
    """A pattern of the texts, in which the longest match wins."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
