"""Scores a model folder: exact answers to arithmetic problems; perplexity and KL to a teacher; openness of gates.

    python -m melt_jax.evaluate --checkpoint=runs/nano/alignment/model --teacher=melt_jax/assets/ouro_nano
    python -m melt_jax.evaluate --checkpoint=DIR --teacher=DIR --task=tokens --data=F.npz --rows=1
    python -m melt_jax.evaluate --checkpoint=DIR --teacher=DIR --task=tokens --data=FOLDER --rows=1

Perplexity and KL are measured with chunks of --chunk_size tokens over whole sequences, and in decoding (chunk 1) over
the first --decoding_tokens of each. The difference between the two on the same tokens is the training-inference gap.
--loops=1,2,4,8 evaluates the model with each of these numbers of loops.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from melt_jax import command_line
from melt_jax.checkpoints import hub
from melt_jax.checkpoints.orbax import default_chunk, open_model
from melt_jax.config import InputError, ModelConfig
from melt_jax.data.arithmetic import NAMES, VOCABULARY, Problem
from melt_jax.data.arithmetic_tokenizer import tokenizer_errors
from melt_jax.data.batch import Batch
from melt_jax.data.records import open_records, read_manifest, record_errors
from melt_jax.data.token_files import open_tokens, token_errors
from melt_jax.files import as_path
from melt_jax.inference import scoring
from melt_jax.inference.answers import Answers, BeforePiece, exact_answers, fresh_problems, problem_batch, silent
from melt_jax.inference.loading import UNCHANGED, ModelChanges, define_model_flags, open_for_inference, read_model_flags
from melt_jax.inference.results import Progress, render
from melt_jax.model.cache import bytes_per_sequence, bytes_per_token
from melt_jax.model.model import LoopedTransformer, reconfigure

FLAGS = flags.FLAGS
MOST = 10**7  # of every count; more would run for months
TASKS = ("arithmetic", "tokens")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an evaluation. None: the checkpoint's value, or the default stated here.

    Attributes:
      checkpoint: folder of the model, or a model of the hub.
      teacher: folder of the teacher, or a model of the hub; None: no KL is measured.
      task: "arithmetic", fresh problems; "tokens", the sequences in `data`.
      data: a token file (.npy or .npz), or a folder written by `melt_jax.prepare`.
      length: tokens per sequence, for a file that is one stream.
      sequences: largest number of sequences, or problems, for perplexity and KL.
      rows: sequences scored at a time.
      decoding_tokens: tokens at the start of each sequence on which decoding is measured; 0: not measured.
      problems: arithmetic problems to answer.
      low, high: fewest and most definitions per problem.
      hops: definitions per value that the steps state.
      seed: of the problems.
      chunk_size: C of prefill and scoring; None: the chunk that a MELT was trained with, or 512.
      loops: numbers of loops, T, with each of which the model is evaluated; None: the checkpoint's.
      changes: other values that replace the checkpoint's; exit threshold and guidance affect answers only.
    """

    checkpoint: str
    teacher: str | None = None
    task: str = "arithmetic"
    data: str | None = None
    length: int | None = None
    sequences: int = 64
    rows: int = 16
    decoding_tokens: int = 512
    problems: int = 256
    low: int = 2
    high: int = 5
    hops: int = 1
    seed: int = 1
    chunk_size: int | None = None
    loops: Sequence[int] | None = None
    changes: ModelChanges = UNCHANGED


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of a checkpoint by number of loops.

    Attributes:
      answers: none for the task "tokens".
      comparisons: perplexity and KL.
      gaps: `scoring.kl_to_decoding` of a MELT, if decoding is measured.
    """

    answers: dict[int, Answers]
    comparisons: dict[int, scoring.Comparison]
    gaps: dict[int, float]


def define_flags() -> None:
    """Defines the command's flags: those of the model, and one for each other field of `Settings`, with its default."""
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Settings)}
    integer = lambda name, text: flags.DEFINE_integer(name, defaults[name], text)
    flags.DEFINE_string("checkpoint", None, "Model folder in either form, or a model of the hub.", required=True)
    flags.DEFINE_string("teacher", None, "The teacher, like --checkpoint; without one, no KL is measured.")
    flags.DEFINE_enum("task", defaults["task"], TASKS, "Fresh arithmetic problems, or the sequences in --data.")
    flags.DEFINE_string("data", None, "For --task=tokens: a token file, or a folder written by melt_jax.prepare.")
    integer("length", "Tokens per sequence, for a file that is one stream.")
    integer("sequences", "Largest number of sequences, or problems, for perplexity and KL.")
    integer("rows", "Sequences scored at a time.")
    integer("decoding_tokens", "Tokens at the start of each sequence on which decoding is measured; 0: not measured.")
    integer("problems", "Arithmetic problems to answer.")
    integer("low", "Fewest definitions per problem.")
    integer("high", "Most definitions per problem.")
    integer("hops", "Definitions per value that the steps state.")
    integer("seed", "Seed of the problems.")
    integer("chunk_size", "Tokens per chunk of prefill and scoring. Default: a MELT's training chunk, or 512.")
    flags.DEFINE_list(
        "loops", None, "Numbers of loops, T, with each of which the model is evaluated. Default: the checkpoint's."
    )
    define_model_flags()


def main(argv: list[str]) -> None:
    """Reads the flags, evaluates and prints."""
    del argv
    names = {field.name for field in dataclasses.fields(Settings)} - {"loops", "changes"}
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    loops = None if FLAGS.loops is None else command_line.read_numbers("loops")
    settings = Settings(loops=loops, changes=read_model_flags(), **values)
    evaluate_checkpoint(settings, show=print, before_piece=Progress("evaluating", Console(stderr=True)))


def evaluate_checkpoint(
    settings: Settings, show: Callable[[str], None] | None = None, before_piece: BeforePiece = silent
) -> Evaluation:
    """Scores a checkpoint.

    Args:
      settings: see `Settings`.
      show: called with each table as soon as it is complete.
      before_piece: called before each piece of the work with its description.

    Raises:
      InputError: lists the values out of range; or the model, the teacher or the data cannot be used.
    """
    if errors := settings_errors(settings):
        raise InputError("\n".join(errors))
    settings = dataclasses.replace(
        settings,
        checkpoint=str(hub.local_folder(settings.checkpoint)),
        teacher=settings.teacher and str(hub.local_folder(settings.teacher)),
    )
    model = open_for_inference(settings.checkpoint, settings.changes)
    models = {loops: reconfigure(model, loops=loops) for loops in settings.loops or (model.config.loops,)}
    teacher = open_model(settings.teacher, dtype=settings.changes.dtype) if settings.teacher else None
    scoring.check_vocabularies(model, teacher)
    chunk = settings.chunk_size
    chunk = default_chunk(settings.checkpoint, model.config) if chunk is None else chunk
    answers, comparisons, gaps = {}, {}, {}
    if settings.task == "arithmetic":
        problems = read_problems(settings, model.config)
        batch = problem_batch(problems[: settings.sequences])
        if settings.decoding_tokens:
            scoring.first_tokens(batch, settings.decoding_tokens)  # its error comes before the answers
        for loops, changed in models.items():
            answers[loops] = exact_answers(changed, problems, chunk, before_piece=before_piece)
        if show:
            show(answer_table(answers, model))
    else:
        batch = read_batch(settings, model.config)
    tokens, rows = settings.decoding_tokens, settings.rows
    for loops, changed in models.items():
        comparisons[loops] = scoring.compare(changed, teacher, batch, chunk, tokens, rows, before_piece)
        if show:
            show(loop_table(comparisons[loops], loops, tokens))
            if changed.config.gate != "none":
                show(gate_table(comparisons[loops].decoding or comparisons[loops].chunked))
        if tokens and changed.config.gate != "none":
            gaps[loops] = scoring.kl_to_decoding(changed, batch, chunk, tokens, rows, before_piece)
            if show:
                show(
                    f"KL(decoding ‖ chunks of {chunk}) of the model itself: {max(gaps[loops], 0.0):.6f} nats per token"
                )
    return Evaluation(answers, comparisons, gaps)


def settings_errors(settings: Settings) -> list[str]:
    """An error for each setting that is out of range or contradicts another."""
    errors = []
    least = {"length": 1, "sequences": 1, "rows": 1, "problems": 1, "chunk_size": 1, "decoding_tokens": 0, "hops": 1}
    for name, minimum in least.items():
        if (value := getattr(settings, name)) is not None and not minimum <= value <= MOST:
            errors.append(f"--{name}: expected at least {minimum} and at most {MOST}, found {value}")
    if settings.seed is not None and not 0 <= settings.seed < 2**63:
        errors.append(f"--seed: expected at least 0 and below 2**63, found {settings.seed}")
    low, high = settings.low, settings.high
    if not 1 <= low <= high <= len(NAMES):
        errors.append(f"--low, --high: expected 1 <= low <= high <= {len(NAMES)}, found {low} and {high}")
    if settings.task == "tokens" and settings.data is None:
        errors.append("--data: expected a token file or a folder for --task=tokens, found none")
    elif settings.task != "tokens" and settings.data is not None:
        errors.append(f"--data: expected none for --task={settings.task}, found {settings.data}; set --task=tokens")
    elif settings.length is not None and settings.data is not None and as_path(settings.data).is_dir():
        errors.append(
            f"--length: expected none, found {settings.length}; the manifest of {settings.data} states the length"
        )
    return errors


def read_problems(settings: Settings, config: ModelConfig) -> list[Problem]:
    """Fresh problems for a model of the arithmetic task.

    Raises:
      InputError: the checkpoint has another tokenizer, or its vocabulary is too small.
    """
    errors = tokenizer_errors(settings.checkpoint)
    if config.vocab < len(VOCABULARY):
        errors.append(f"{settings.checkpoint}: expected a vocabulary of {len(VOCABULARY)} tokens, found {config.vocab}")
    if errors:
        raise InputError("\n".join(errors))
    return fresh_problems(settings.seed, settings.problems, settings.low, settings.high, settings.hops)


def read_batch(settings: Settings, config: ModelConfig) -> Batch:
    """The first sequences of the data.

    Raises:
      InputError: the data cannot be read, or its token ids or length exceed the model's.
    """
    assert settings.data is not None, "checked by settings_errors"
    if as_path(settings.data).is_dir():
        length = read_manifest(settings.data)["length"]
        sequences = open_records(settings.data)
        errors = record_errors(settings.data, length, config.vocab, settings.checkpoint)
    else:
        sequences = open_tokens(settings.data, settings.length)
        length = sequences.tokens.shape[1]
        errors = token_errors(settings.data, length, config.vocab)
    if length > config.max_positions:
        errors.append(
            f"{settings.data}: expected sequences of at most {config.max_positions} tokens, the model's positions,"
            f" found {length}"
        )
    if errors:
        raise InputError("\n".join(errors))
    first = [sequences[i] for i in range(min(settings.sequences, len(sequences)))]
    return Batch(*(np.stack(field) for field in zip(*first)))


def answer_table(answers: Mapping[int, Answers], model: LoopedTransformer) -> str:
    """Exact answers by number of definitions, a row per number of loops."""
    title = "exact answers (whole completions), greedy, by definitions (problems)"
    out = Table(title=title, box=None, title_justify="left", pad_edge=False)
    out.add_column("loops")
    most = answers[max(answers)]
    for definitions, count, *_ in most.by_definitions():
        out.add_column(f"{definitions} ({count})", justify="right")
    out.add_column(f"all ({len(most.definitions)})", justify="right")
    out.add_column("cache bytes/token", justify="right")
    out.add_column("bytes/sequence", justify="right")
    for loops, scores in answers.items():
        cells = [f"{exact:.1%} ({whole:.1%})" for _, _, exact, whole in scores.by_definitions()]
        cells.append(f"{scores.answer_exact.mean():.1%} ({scores.completion_exact.mean():.1%})")
        config = dataclasses.replace(model.config, loops=loops)
        sizes = (size(config, model.dtype.itemsize) for size in (bytes_per_token, bytes_per_sequence))
        out.add_row(str(loops), *cells, *(f"{size:,}" for size in sizes))
    return render(out)


def loop_table(comparison: scoring.Comparison, loops: int, decoding_tokens: int) -> str:
    """Perplexity and KL per loop of a model with T loops: chunked, in decoding, and the gap on the same tokens."""
    chunked, start, decoding = comparison.chunked, comparison.chunked_start, comparison.decoding
    title = f"{loops} loops, {chunked.tokens} scored tokens"
    columns = {f"chunk {chunked.chunk}": chunked}
    if start is not None and decoding is not None:
        if start != chunked:
            title += f", {start.tokens} of them among the first {decoding_tokens} tokens of a sequence"
            columns["all tokens, " + columns.popitem()[0]] = chunked
            columns[f"first tokens, chunk {start.chunk}"] = start
        columns["chunk 1" if start == chunked else "first tokens, chunk 1"] = decoding
    out = Table(title=title, box=None, title_justify="left", pad_edge=False)
    for heading in ("", "loop", *columns, *(["gap"] if decoding is not None else [])):
        out.add_column(heading, justify="right" if heading else "left")

    def add(name: str, loop: str, value: Callable[[scoring.LoopScores], Any]) -> None:
        values = [value(scores) for scores in columns.values()]
        gap = [f"{values[-1] - values[-2]:+.4f}"] if decoding is not None else []
        out.add_row(name, loop, *(f"{x:.4f}" for x in values), *gap)

    for loop in range(len(chunked.perplexity)):
        add("perplexity", str(loop + 1), lambda scores, loop=loop: scores.perplexity[loop])
    for loop in range(len(chunked.kl)):
        add("KL(teacher ‖ model), nats", str(loop + 1), lambda scores, loop=loop: scores.kl[loop])
    if chunked.final_kl is not None:
        add("KL of the last loops", "", lambda scores: scores.final_kl)
    return render(out)


def gate_table(scores: scoring.LoopScores) -> str:
    """Gate openness: a row per loop, a column per layer."""
    title = f"gate openness, mean of 1 − z, chunk {scores.chunk}, {scores.tokens} tokens; columns: layers"
    out = Table(box=None, pad_edge=False)
    out.add_column("loop")
    for layer in range(len(scores.gate_openness[0])):
        out.add_column(str(layer + 1), justify="right")
    for loop, layers in enumerate(scores.gate_openness):
        out.add_row(str(loop + 1), *(f"{value:.2f}" for value in layers))
    return f"{title}\n{render(out, width=8 + 7 * len(scores.gate_openness[0]))}"


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
