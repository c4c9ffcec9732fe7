"""Scores the benchmarks of this folder: the fraction of sampled answers that are correct (pass@1 over n samples)."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import Any

LETTERS = "ABCD"


def keep_all(responses: Iterable[Sequence[str]], docs: Any) -> list[Sequence[str]]:
    """Keeps all answers to each problem; the harness would keep only the first."""
    return list(responses)


def pass_at_1(doc: dict[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """The fraction of the answers to a problem that are correct."""
    (answers,) = results
    return {"pass_at_1": sum(is_correct(answer, doc) for answer in answers) / len(answers)}


def is_correct(answer: str, doc: dict[str, Any]) -> bool:
    """Whether the last `\\boxed{…}` of an answer is right: the same letter, or mathematically equal (math_verify)."""
    box, right = last_boxed(answer), gold(doc)
    if box is None:
        return False
    if "letter" in doc:
        return box.removeprefix("\\text{").strip("(){}. ") == right
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]: of the extra `eval`

    return verify(parse(f"${right}$"), parse(f"$\\boxed{{{box}}}$"))


def gold(doc: dict[str, Any]) -> str:
    """The right answer to a problem; several are joined by commas."""
    fields = "letter", "final_answer", "answer", "Answer"
    answer = next(doc[field] for field in fields if field in doc)
    return ", ".join(part.strip("$") for part in answer) if isinstance(answer, list) else str(answer).strip("$")


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{…}` of a text contains; None without one, or if it is not closed."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return None


def shuffle_choices(dataset: Any) -> Any:
    """GPQA's rows with `choices`, in an order that depends on the question only, and `letter`, the right one's."""

    def shuffle(doc):
        choices = [doc["Correct Answer"], *(doc[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
        order = list(range(4))
        random.Random(hashlib.sha256(doc["Question"].encode()).digest()).shuffle(order)
        lines = [f"{letter}. {choices[i].strip()}" for letter, i in zip(LETTERS, order)]
        return {"choices": "\n".join(lines), "letter": LETTERS[order.index(0)]}

    return dataset.map(shuffle)
