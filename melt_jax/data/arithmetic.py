"""The embedded arithmetic task: a chain of definitions in random order, a question, the worked steps, the answer.

    <|im_start|>c=b*3;a=4;b=a+2;c?<think>a=4;b=a+2=6;c=b*3=8</think>8<|im_end|>

Names are `a` to `j`. All values are modulo 10; operands are 0 to 9 in sums and differences, 2 or 3 in products. The
prompt ends with `<think>`; the rest is the completion. Each character and each special token is one token, and a chain
of n definitions takes 14·n tokens.

With `hops` h ≥ 2 the steps leave out values: they state that of every h-th definition after the first, and of the last.
Operands are then 1 to 3 in sums and differences. With 2 hops:

    <|im_start|>c=b*3;a=4;b=a+2;c?<think>a=4;b=a+2;c=b*3=8</think>8<|im_end|>
"""

import dataclasses
import itertools

import numpy as np

from melt_jax.config import DataConfig, InputError

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


def make_problem(rng: np.random.Generator, definitions: int, hops: int = 1) -> Problem:
    """A random problem.

    Args:
      rng: the source of randomness.
      definitions: length of the chain.
      hops: definitions per value that the steps state; see the module.
    """
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:definitions]]
    factors = (2, 4)
    terms = (0, 10) if hops == 1 else (1, 4)
    value = int(rng.integers(10))
    stated, steps = [f"{names[0]}={value}"], [f"{names[0]}={value}"]
    for i, (previous, name) in enumerate(itertools.pairwise(names), start=1):
        sign = "+-*"[rng.integers(3)]
        operand = int(rng.integers(*(factors if sign == "*" else terms)))
        value = OPERATIONS[sign](value, operand) % 10
        stated.append(f"{name}={previous}{sign}{operand}")
        shown = i % hops == 0 or i == definitions - 1
        steps.append(f"{stated[-1]}={value}" if shown else stated[-1])
    order = rng.permutation(definitions)
    question = ";".join(stated[i] for i in order) + f";{names[-1]}?"
    return Problem(question, ";".join(steps), str(value))


def problem_tokens(definitions: int, hops: int = 1) -> int:
    """The number of tokens of a problem, prompt and completion."""
    return 12 * definitions + 2 * (1 - (1 - definitions) // hops)


def pack_problems(rng: np.random.Generator, data: DataConfig) -> dict[str, np.ndarray]:
    """Fills one sequence of `data.length` tokens with problems of `data.low` to `data.high` definitions.

    Returns:
      dict of int32 [length] arrays: tokens; segments (1, 2, … per problem, 0 for padding); targets, the next token;
      loss_mask, 1 if the prediction of the target is scored: in the whole problem (`data.score` "all") or in its
      completion ("completion").

    Raises:
      InputError: `data.score` has another value.
    """
    if data.score not in ("completion", "all"):
        raise InputError(f'score: expected "completion" or "all", found {data.score!r}')
    out = {name: np.zeros(data.length, np.int32) for name in ("tokens", "segments", "targets", "loss_mask")}
    sizes = {n: problem_tokens(n, data.hops) for n in range(data.low, data.high + 1)}
    start, segment = 0, 1
    while fitting := [n for n, size in sizes.items() if size <= data.length - start]:
        problem = make_problem(rng, int(rng.choice(fitting)), data.hops)
        prompt, completion = problem.prompt, problem.completion
        tokens = prompt + completion
        stop = start + len(tokens)
        out["tokens"][start:stop] = tokens
        out["segments"][start:stop] = segment
        out["targets"][start : stop - 1] = tokens[1:]
        scored = start + (len(prompt) - 1 if data.score == "completion" else 0)
        out["loss_mask"][scored : stop - 1] = 1
        start, segment = stop, segment + 1
    return out


def arithmetic_batch(seed: int, step: int, data: DataConfig) -> dict[str, np.ndarray]:
    """The batch of one training step, a function of (seed, step): arrays of `pack_problems`, [batch, length]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    rows = [pack_problems(rng, data) for _ in range(data.batch)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
