"""The declaration of a configuration key: its type, limit and meaning, read from a dataclass field's annotation."""

import dataclasses
import functools
import math
from typing import Any

INT_LIMIT = 2**31  # sizes and step numbers are int32 on the device
FLOAT_LIMIT = 1e30  # numbers are float32 on the device
WORDS = tuple[str, ...]
TYPE_NAMES = {
    int: "an integer",
    int | None: "an integer or none",
    float: "a number",
    bool: "true or false",
    str: "a string",
    WORDS: "a list of words",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a finite number: `least` and `most` are allowed values, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def expected(self, value: float) -> str:
        """The bounds, if the value violates them; empty if it is allowed."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"a finite number, {self}"
        allowed = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        if allowed and isinstance(value, int) and self.most is None and value >= INT_LIMIT:
            return f"below {INT_LIMIT}"
        if allowed and isinstance(value, float) and self.most is None and value >= FLOAT_LIMIT:
            return f"below {FLOAT_LIMIT:g}"
        return "" if allowed else str(self)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The words that a string, or each string of a list, may be."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"

    def expected(self, value: str | tuple[str, ...]) -> str:
        """The allowed words, if a given one is not among them; empty otherwise."""
        given = value if isinstance(value, tuple) else (value,)
        return "" if set(given) <= set(self.words) else str(self)


@dataclasses.dataclass(frozen=True)
class Key:
    """The declaration of a key: type, meaning, limit (if any) and default (MISSING if none)."""

    type: Any
    meaning: str
    limit: Range | OneOf | None
    default: Any

    def __str__(self) -> str:
        """The meaning, with the choices of a string: the key's comment in `configs/base.py`."""
        return self.meaning + (f"; {self.limit}" if self.type is str and self.limit else "")

    def convert(self, value: Any) -> Any:
        """Converts an int to a float or a list to a tuple if the key's type requires it; else returns the value."""
        if self.type is float and type(value) is int and abs(value) < 2**63:
            return float(value)
        return tuple(value) if self.type == WORDS and isinstance(value, list) else value

    def parse(self, text: str) -> Any:
        """The value of a command-line text; the text itself if it does not have the key's type."""
        try:
            if self.type is bool:
                return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
            if self.type == WORDS:
                return tuple(word.strip(" '\"") for word in text.strip("()[]").split(",") if word.strip())
            if self.type == int | None:
                return None if text.lower() == "none" else int(text)
            return self.type(text)
        except ValueError:
            return text

    def error(self, value: Any) -> str:
        """The expected and the found value; empty if the value has the key's type and is within its limit."""
        if value is dataclasses.MISSING:
            return f"missing: {TYPE_NAMES[self.type]}, {self}"
        if not self._has_type(value):
            expected = TYPE_NAMES[self.type] + (f", {self.limit}" if self.limit else "")
        else:
            expected = self.limit.expected(value) if self.limit and value is not None else ""
        return f"expected {expected}, found {value!r:.100}" if expected else ""

    def _has_type(self, value):
        if isinstance(value, bool):
            return self.type is bool
        if self.type == WORDS:
            return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        return isinstance(value, self.type)


@functools.cache
def keys_of(config_class: type, prefix: str = "") -> dict[str, Key]:
    """{dotted name: `Key`} of a config class and the classes of its groups, in the order of their declaration."""
    keys = {}
    for field in dataclasses.fields(config_class):
        kind: Any = field.type  # a class, or Annotated[type, limit, meaning]
        if dataclasses.is_dataclass(kind):
            keys |= keys_of(kind, f"{prefix}{field.name}.")
            continue
        limit = next((item for item in kind.__metadata__ if not isinstance(item, str)), None)
        (meaning,) = (item for item in kind.__metadata__ if isinstance(item, str))
        keys[f"{prefix}{field.name}"] = Key(kind.__origin__, meaning, limit, field.default)
    return keys
