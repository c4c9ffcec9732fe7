"""Newly drawn arithmetic problems, and the exactness of a model's answers."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from melt_jax.data import arithmetic
from melt_jax.data.batch import Batch
from melt_jax.inference.generation import GenerationOptions, generate
from melt_jax.model.model import LoopedTransformer

PROBLEM_STREAM = 2**63  # a random stream that no training step uses: steps count from 0
SPARE_TOKENS = 12  # room for a completion that is one step longer than the correct one

# Called before each piece of work with its description; it may print progress, or raise to stop the work.
BeforePiece = Callable[[str], None]


def silent(piece: str) -> None:
    """A `before_piece` that does nothing."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers to problems, one entry per problem.

    Attributes:
      definitions: definitions in the problem.
      answer_exact: the tokens between `</think>` and the end are the correct answer.
      completion_exact: every token is correct, including the steps.
      completions: the generated tokens.
    """

    definitions: Int[np.ndarray, " problems"]
    answer_exact: Bool[np.ndarray, " problems"]
    completion_exact: Bool[np.ndarray, " problems"]
    completions: list[list[int]]

    def by_definitions(self) -> list[tuple[int, int, float, float]]:
        """[(definitions, problems, fraction of exact answers, fraction of exact completions)]."""
        out = []
        for count in np.unique(self.definitions):
            same = self.definitions == count
            exact, whole = float(self.answer_exact[same].mean()), float(self.completion_exact[same].mean())
            out.append((int(count), int(same.sum()), exact, whole))
        return out


def fresh_problems(seed: int, count: int, low: int = 2, high: int = 5, hops: int = 1) -> list[arithmetic.Problem]:
    """Problems of a random stream that training does not use; the number of definitions cycles from low to high.

    A short problem may also occur in training by chance: there are few of them.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, PROBLEM_STREAM]))
    return [arithmetic.make_problem(rng, low + i % (high - low + 1), hops) for i in range(count)]


def exact_answers(
    model: LoopedTransformer,
    problems: Sequence[arithmetic.Problem],
    prefill_chunk: int,
    batch: int = 256,
    before_piece: BeforePiece = silent,
) -> Answers:
    """Answers problems greedily and compares the answers with the correct ones.

    Args:
      model: its config sets `loops`, `exit_threshold` and `guidance`.
      problems: at least one.
      prefill_chunk: C of the prefill.
      batch: problems answered at a time.
      before_piece: see `BeforePiece`.
    """
    limit = max(len(problem.completion) for problem in problems) + SPARE_TOKENS
    options = GenerationOptions(limit, prefill_chunk, stop=(arithmetic.STOP,))
    completions = []
    for first in range(0, len(problems), batch):
        piece = problems[first : first + batch]
        before_piece(f"problems {first + 1} to {first + len(piece)} of {len(problems)}")
        completions += generate(model, [problem.prompt for problem in piece], options).tokens
    return Answers(
        np.array([problem.question.count(";") for problem in problems]),
        np.array([answer_of(tokens) == answer_of(p.completion) for tokens, p in zip(completions, problems)]),
        np.array([tokens == p.completion for tokens, p in zip(completions, problems)]),
        completions,
    )


def answer_of(completion: list[int]) -> list[int] | None:
    """The tokens between the first `</think>` and the final `<|im_end|>`; None if either is missing."""
    if arithmetic.ANSWER not in completion or completion[-1] != arithmetic.STOP:
        return None
    return completion[completion.index(arithmetic.ANSWER) + 1 : -1]


def problem_batch(problems: Sequence[arithmetic.Problem]) -> Batch:
    """A `Batch` with one problem per sequence, padded to the longest; completions are scored."""
    length = max(len(problem.prompt) + len(problem.completion) for problem in problems)
    tokens, segments, mask, targets = (np.zeros((len(problems), length), np.int32) for _ in range(4))
    for i, problem in enumerate(problems):
        ids = problem.prompt + problem.completion
        tokens[i, : len(ids)] = ids
        segments[i, : len(ids)] = 1
        targets[i, : len(ids) - 1] = ids[1:]
        mask[i, len(problem.prompt) - 1 : len(ids) - 1] = 1
    return Batch(tokens, segments, mask, targets)
