"""The embedded arithmetic task: a chain of definitions in random order, a question, the worked steps, the answer.

    <|im_start|>c=b*3;a=4;b=a+2;c?<think>a=4;b=a+2=6;c=b*3=8</think>8<|im_end|>

Names are `a` to `j`. All values are modulo 10; operands are 0 to 9 in sums and differences, 2 or 3 in products. The
prompt ends with `<think>`; the rest is the completion. Each character and each special token is one token, and a chain
of n definitions takes 14·n tokens.
"""

import dataclasses
import itertools

import numpy as np

from melt_jax.config import InputError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz=+-*?;,.:"
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
END, BEGIN, STOP, THINK, ANSWER = range(5)
NAMES = "abcdefghij"
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, its worked steps and its answer, as text without special tokens."""

    question: str
    steps: str
    answer: str

    @property
    def prompt(self) -> list[int]:
        """Token ids of `<|im_start|>question<think>`."""
        return [BEGIN, *encode(self.question), THINK]

    @property
    def completion(self) -> list[int]:
        """Token ids of `steps</think>answer<|im_end|>`."""
        return [*encode(self.steps), ANSWER, *encode(self.answer), STOP]


def encode(text: str) -> list[int]:
    """Token ids of plain characters; KeyError for a character outside the task's vocabulary."""
    return [VOCABULARY[character] for character in text]


def make_problem(rng: np.random.Generator, definitions: int) -> Problem:
    """A random problem with a chain of `definitions` definitions."""
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:definitions]]
    value = int(rng.integers(10))
    stated, steps = [f"{names[0]}={value}"], [f"{names[0]}={value}"]
    for previous, name in itertools.pairwise(names):
        sign = "+-*"[rng.integers(3)]
        operand = int(rng.integers(2, 4) if sign == "*" else rng.integers(10))
        stated.append(f"{name}={previous}{sign}{operand}")
        result = OPERATIONS[sign](value, operand) % 10
        steps.append(f"{name}={previous}{sign}{operand}={result}")
        value = result
    order = rng.permutation(definitions)
    question = ";".join(stated[i] for i in order) + f";{names[-1]}?"
    return Problem(question, ";".join(steps), str(value))


def problem_tokens(definitions: int) -> int:
    """The number of tokens of a problem, prompt and completion."""
    return 14 * definitions


def pack_problems(
    rng: np.random.Generator, length: int, low: int = 2, high: int = 5, score: str = "completion"
) -> dict[str, np.ndarray]:
    """Fills one sequence with problems of `low` to `high` definitions.

    Returns:
      dict of int32 [length] arrays: tokens; segments (1, 2, … per problem, 0 for padding); targets, the next token;
      loss_mask, 1 if the prediction of the target is scored: in the whole problem (score "all") or in its completion
      ("completion").

    Raises:
      InputError: `score` has another value.
    """
    if score not in ("completion", "all"):
        raise InputError(f'score: expected "completion" or "all", found {score!r}')
    out = {name: np.zeros(length, np.int32) for name in ("tokens", "segments", "targets", "loss_mask")}
    start, segment = 0, 1
    while sizes := [n for n in range(low, high + 1) if problem_tokens(n) <= length - start]:
        problem = make_problem(rng, int(rng.choice(sizes)))
        prompt, completion = problem.prompt, problem.completion
        tokens = prompt + completion
        stop = start + len(tokens)
        out["tokens"][start:stop] = tokens
        out["segments"][start:stop] = segment
        out["targets"][start : stop - 1] = tokens[1:]
        scored = start + (len(prompt) - 1 if score == "completion" else 0)
        out["loss_mask"][scored : stop - 1] = 1
        start, segment = stop, segment + 1
    return out


def arithmetic_batch(
    seed: int, step: int, batch: int, length: int, low: int = 2, high: int = 5, score: str = "completion"
) -> dict[str, np.ndarray]:
    """The batch of one training step, a function of (seed, step): arrays of `pack_problems`, [batch, length]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    rows = [pack_problems(rng, length, low, high, score) for _ in range(batch)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
