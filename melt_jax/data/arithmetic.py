"""Worked arithmetic: the embedded task. A chain of definitions in random order, a question, the steps, the answer.

    <|im_start|>c=b*3;a=4;b=a+2;c?<think>a=4;b=a+2=6;c=b*3=8</think>8<|im_end|>

Names are `a` to `j`. Every value is modulo 10; sums and differences are with 0 to 9, products with 2 or 3. What stands
up to and including `<think>` is the prompt, the rest the completion. A chain of n definitions takes 14·n tokens: one
per character or special token.
"""

import dataclasses
import itertools

import numpy as np

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz=+-*?;,.:"
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
END, BEGIN, STOP, THINK, ANSWER = range(5)
NAMES = "abcdefghij"
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question as text (without special tokens), the steps that answer it, and the answer."""

    question: str
    steps: str
    answer: str

    @property
    def prompt(self):
        """Token ids of `<|im_start|>question<think>`."""
        return [BEGIN, *encode(self.question), THINK]

    @property
    def completion(self):
        """Token ids of `steps</think>answer<|im_end|>`."""
        return [*encode(self.steps), ANSWER, *encode(self.answer), STOP]


def encode(text):
    """Token ids of plain characters; KeyError names one that the task does not have."""
    return [VOCABULARY[character] for character in text]


def make_problem(rng, definitions):
    """A problem with a chain of that many definitions, from a `numpy.random.Generator`."""
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


def problem_tokens(definitions):
    """The tokens of a problem, prompt and completion."""
    return 14 * definitions


def pack_problems(rng, length, low=2, high=5, score="completion"):
    """Fills one sequence with problems of `low` to `high` definitions.

    Returns:
      dict of int32 [length] arrays: tokens; segments (1, 2, … per problem, 0 padding); targets, the next token;
      loss_mask, 1 where the prediction of the target is scored: all of a problem's targets ("all") or its completion
      ("completion").

    Raises:
      ValueError: another `score`.
    """
    if score not in ("completion", "all"):
        raise ValueError(f'score: expected "completion" or "all", found {score!r}')
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


def arithmetic_batch(seed, step, batch, length, low=2, high=5, score="completion"):
    """The batch of one training step, a function of (seed, step): dict of [batch, length] int32 arrays."""
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    rows = [pack_problems(rng, length, low, high, score) for _ in range(batch)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
