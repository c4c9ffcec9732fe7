"""What is measured of a model: exact answers on the arithmetic, perplexity and KL to a teacher per loop, cache bytes.

Perplexity and KL are measured with chunks of a given length, as in training, and with chunks of one, as in decoding:
what lies between the two is the training–inference gap of the model (MELT, arXiv 2605.07721).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from melt_jax.data import arithmetic, stream
from melt_jax.data.batch import Batch
from melt_jax.inference.generation import generate
from melt_jax.model.cache import bytes_per_token
from melt_jax.model.layout import replicated
from melt_jax.model.sequence import run_sequence, split_chunks
from melt_jax.training.objectives import cross_entropy_per_loop, kl_per_loop

PROBLEM_STREAM = 2**63  # beside the training stream, which counts steps: no step reaches it
SPARE_TOKENS = 12  # room for a completion that takes a step more than the truth
HEAD_TOKENS = 512  # tokens whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class Answers:
    """How problems were answered, a flag or number per problem.

    Attributes:
      definitions: of each problem.
      answer_exact: whether what stands between `</think>` and the end is the truth.
      completion_exact: whether every token is, steps included.
      completions: the tokens of each.
    """

    definitions: np.ndarray
    answer_exact: np.ndarray
    completion_exact: np.ndarray
    completions: list

    def by_definitions(self):
        """[(definitions, problems, fraction of exact answers, of exact completions)]."""
        rows = []
        for count in np.unique(self.definitions):
            of = self.definitions == count
            rows.append((int(count), int(of.sum()), self.answer_exact[of].mean(), self.completion_exact[of].mean()))
        return rows


@dataclasses.dataclass(frozen=True)
class LoopScores:
    """Perplexity and KL(teacher ‖ model) over scored tokens.

    Attributes:
      chunk: C, tokens of a chunk.
      tokens: scored.
      perplexity: [T], exp of the mean cross-entropy, per loop.
      kl: [loops of both], nats, loop by loop; empty without a teacher.
      final_kl: nats, the last loop of the teacher against the last that the model ran; None without a teacher.
    """

    chunk: int
    tokens: int
    perplexity: list
    kl: list
    final_kl: float | None


@dataclasses.dataclass(frozen=True)
class Scores:
    """A row of the table; `dataclasses.asdict` of it is plain JSON.

    Attributes:
      answers: fraction of problems with an exact answer, None if none was asked.
      completions: fraction with every token exact.
      problems: how many were asked.
      chunked: `LoopScores` with the chunks of training, or None.
      decoding: `LoopScores` with chunks of one, or None.
      cache_bytes_per_token: in the dtype that the model ran in.
      loops: T, as run.
    """

    answers: float | None
    completions: float | None
    problems: int
    chunked: LoopScores | None
    decoding: LoopScores | None
    cache_bytes_per_token: int
    loops: int


def fresh_problems(seed, count, low=2, high=5):
    """Problems of no training step, as many of each number of definitions, a function of (seed, count, low, high)."""
    rng = np.random.Generator(np.random.Philox(key=[seed, PROBLEM_STREAM]))
    return [arithmetic.make_problem(rng, low + i % (high - low + 1)) for i in range(count)]


def exact_answers(model, problems, prefill_chunk, loops=None, exit_threshold=None, batch=256):
    """Greedy answers to problems.

    Args:
      model: `LoopedTransformer`.
      problems: `arithmetic.Problem`s.
      prefill_chunk: C of the prefill.
      loops: T, where it is not the model's.
      exit_threshold: where it is not the model's.
      batch: problems answered at once.

    Returns:
      `Answers`.
    """
    limit = max(len(problem.completion) for problem in problems) + SPARE_TOKENS
    options = {"stop": (arithmetic.STOP,), "loops": loops, "exit_threshold": exit_threshold}
    completions = []
    for first in range(0, len(problems), batch):
        prompts = [problem.prompt for problem in problems[first : first + batch]]
        completions += generate(model, prompts, limit, prefill_chunk, **options).tokens
    return Answers(
        np.array([problem.question.count(";") for problem in problems]),
        np.array([answer_of(tokens) == answer_of(p.completion) for tokens, p in zip(completions, problems)]),
        np.array([tokens == p.completion for tokens, p in zip(completions, problems)]),
        completions,
    )


def answer_of(completion):
    """What stands between the first `</think>` and the last token, `<|im_end|>`; None where one of them is missing."""
    if arithmetic.ANSWER not in completion or completion[-1] != arithmetic.STOP:
        return None
    return completion[completion.index(arithmetic.ANSWER) + 1 : -1]


def problem_batch(problems):
    """A `Batch` of problems, one a row, padded to the longest; their completions are scored."""
    length = max(len(problem.prompt) + len(problem.completion) for problem in problems)
    tokens, segments, mask, targets = (np.zeros((len(problems), length), np.int32) for _ in range(4))
    for i, problem in enumerate(problems):
        ids = problem.prompt + problem.completion
        tokens[i, : len(ids)] = ids
        segments[i, : len(ids)] = 1
        targets[i, : len(ids) - 1] = ids[1:]
        mask[i, len(problem.prompt) - 1 : len(ids) - 1] = 1
    return Batch(tokens, segments, mask, targets)


def perplexity_and_kl(model, teacher, batch, chunk_size, loops=None, rows=16):
    """Perplexity of a model over a batch and its KL to a teacher, per loop.

    Args:
      model: `LoopedTransformer`.
      teacher: another of the same vocabulary, run over the same tokens with all its loops; or None.
      batch: `Batch` with targets.
      chunk_size: C of the model, and of a teacher whose outcome depends on it.
      loops: T of the model, where it is not its own.
      rows: sequences run at once.

    Returns:
      `LoopScores`.

    Raises:
      ValueError: the vocabularies differ, or nothing is scored.
    """
    check_vocabularies(model, teacher)
    count = int(np.sum(batch.loss_mask))
    if count == 0:
        raise ValueError("no token of the batch is scored: its loss_mask is zero everywhere")
    length = np.shape(batch.tokens)[1]
    rows, total = min(rows, len(batch.tokens)), 0
    for first in range(0, len(batch.tokens), rows):
        part = jax.tree.map(lambda x: _pad_rows(x[first : first + rows], rows), batch)  # noqa: B023
        sums = _comparison_sums(model, teacher, replicated(part), min(chunk_size, length), loops)
        total = jax.tree.map(lambda x, y: x + np.asarray(y, np.float64), total or jax.tree.map(lambda _: 0, sums), sums)
    kl = (total["kl"] / count).tolist() if teacher is not None else []
    perplexity = np.exp(total["cross_entropy"] / count).tolist()
    return LoopScores(chunk_size, count, perplexity, kl[:-1], kl[-1] if kl else None)


def check_vocabularies(model, teacher):
    """ValueError where a model and its teacher, if it has one, have other numbers of tokens."""
    if teacher is not None and teacher.config.vocab != model.config.vocab:
        raise ValueError(
            f"a KL needs one vocabulary: the teacher has {teacher.config.vocab} tokens, the model {model.config.vocab}"
        )


def measure(model, teacher, problems=(), batch=None, chunk_size=512):
    """Everything of a model that a row of the table shows.

    Args:
      model: `LoopedTransformer`.
      teacher: its teacher, or None.
      problems: to be answered; none: not measured.
      batch: `Batch` for perplexity and KL; None: not measured.
      chunk_size: C of prefill and scoring; decoding's chunk of one is measured beside it.

    Returns:
      `Scores`.
    """
    answers = exact_answers(model, problems, chunk_size) if len(problems) else None
    both = [None, None]
    if batch is not None:
        both = [perplexity_and_kl(model, teacher, batch, chunk) for chunk in (chunk_size, 1)]
    return Scores(
        None if answers is None else float(answers.answer_exact.mean()),
        None if answers is None else float(answers.completion_exact.mean()),
        len(problems),
        *both,
        cache_bytes_per_token(model),
        model.config.loops,
    )


def cache_bytes_per_token(model, loops=None):
    """Bytes of cache that a token takes, in the dtype of the weights; T of a LoopLM's rows count, one of a MELT's."""
    return bytes_per_token(model.config, jnp.dtype(model.dtype).itemsize, loops)


def score(model, teacher, config):
    """`measure` by the evaluation that a `TrainConfig` asks for, as plain JSON.

    Problems and sequences are of `evaluation.seed`, of which training has none, or else sequences of `evaluation.path`.
    """
    evaluation, data = config.evaluation, config.data
    problems, batch = (), None
    if evaluation.problems:
        problems = fresh_problems(evaluation.seed, evaluation.problems, data.low, data.high)
    if evaluation.sequences:
        batch = stream.evaluation_batch(config)
    return dataclasses.asdict(measure(model, teacher, problems, batch, config.chunk_size))


def sample(model, seed, prefill_chunk=512):
    """One fresh problem as text: the question, what the model makes of it, and the truth."""
    problem = fresh_problems(seed, 4)[-1]
    answers = exact_answers(model, [problem], prefill_chunk)
    names = dict(enumerate(arithmetic.VOCABULARY))
    text = lambda tokens: "".join(names.get(token, "\N{REPLACEMENT CHARACTER}") for token in tokens)
    verdict = "exact" if answers.answer_exact[0] else f"wrong: the answer is {problem.answer}"
    return f"{text(problem.prompt)}{text(answers.completions[0])}   ({verdict})"


def table(rows):
    """A table as text of {name: `Scores`, or its `asdict`}; the KL is that of the last loops, nats a token."""
    out = Table(box=None, pad_edge=False)
    out.add_column("model")
    for heading in ("loops", "exact answers", "KL to teacher, chunked", "decoding", "cache bytes/token"):
        out.add_column(heading, justify="right")
    for name, scores in rows.items():
        row = scores if isinstance(scores, dict) else dataclasses.asdict(scores)
        answers = "–" if row["answers"] is None else f"{row['answers']:.1%} of {row['problems']}"
        kl = [_kl_text(row[which]) for which in ("chunked", "decoding")]
        out.add_row(name, str(row["loops"]), answers, *kl, f"{row['cache_bytes_per_token']:,}")
    return render(out)


def render(renderable, width=120):
    """A rich renderable as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def _kl_text(scores):
    # Rounding makes the KL of equal models a negative zero.
    return "–" if scores is None or scores["final_kl"] is None else f"{max(scores['final_kl'], 0.0):.4f}"


def _pad_rows(x, rows):
    """The last rows of a batch filled up with zeros, padding that nothing scores: one compilation for all."""
    x = np.asarray(x, np.int32)
    return np.pad(x, ((0, rows - len(x)), (0, 0)))


@functools.partial(jax.jit, static_argnames=("chunk_size", "loops"))
def _comparison_sums(model, teacher, batch, chunk_size, loops):
    """Sums over scored tokens: cross_entropy [T]; with a teacher kl [loops of both, and the last of each]."""
    hidden = run_sequence(model, batch.tokens, chunk_size, segments=batch.segments, loops=loops).hidden
    teacher_hidden = None
    if teacher is not None:
        # A LoopLM's outcome does not depend on the chunk: long ones are quicker.
        chunk = max(chunk_size, HEAD_TOKENS) if teacher.config.gate == "none" else chunk_size
        teacher_hidden = jnp.moveaxis(run_sequence(teacher, batch.tokens, chunk, segments=batch.segments).hidden, 0, 2)

    def piece_sums(totals, piece):
        hidden, teacher_hidden, targets, mask = piece
        hidden = jnp.moveaxis(hidden, 2, 0)
        mask = mask.astype(jnp.float32)
        sums = {"cross_entropy": jnp.sum(cross_entropy_per_loop(model, hidden, targets) * mask, axis=(1, 2))}
        if teacher is not None:
            teacher_hidden = jnp.moveaxis(teacher_hidden, 2, 0)
            shared = min(len(hidden), len(teacher_hidden))
            pairs = [jnp.concatenate([x[:shared], x[-1:]]) for x in (teacher_hidden, hidden)]
            sums["kl"] = kl_per_loop(teacher, model, *pairs, mask)
        return jax.tree.map(jnp.add, totals, sums), None

    pieces = (jnp.moveaxis(hidden, 0, 2), teacher_hidden, batch.targets, batch.loss_mask)
    pieces = split_chunks(pieces, min(HEAD_TOKENS, batch.tokens.shape[1]))
    empty = {"cross_entropy": jnp.zeros(len(hidden))}
    if teacher is not None:
        empty["kl"] = jnp.zeros(min(len(hidden), teacher.config.loops) + 1)
    return jax.lax.scan(piece_sums, empty, pieces)[0]
