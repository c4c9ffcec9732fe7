"""Scores a checkpoint folder: exact answers on the arithmetic; perplexity and KL to a teacher per loop.

    python -m melt_jax.evaluate --checkpoint=runs/nano/alignment/model --teacher=melt_jax/assets/ouro_nano
    python -m melt_jax.evaluate --checkpoint=DIR --teacher=DIR --task=tokens --data=F.npz --rows=1
    python -m melt_jax.evaluate --checkpoint=DIR --teacher=DIR --task=tokens --data=FOLDER --rows=1

Perplexity and KL are measured with chunks of --chunk_size and with decoding's chunk of one; the last column is what
lies between them, the training-inference gap. --all_loops answers the problems with 1, 2, … T loops.
"""

import pathlib

import numpy as np
from absl import app, flags, logging
from rich.table import Table

from melt_jax.checkpoints.orbax import default_chunk, open_model
from melt_jax.config import CHOICES, GATES
from melt_jax.data.arithmetic import NAMES, VOCABULARY
from melt_jax.data.batch import Batch
from melt_jax.data.records import open_records, read_manifest, record_errors
from melt_jax.data.token_files import open_tokens, token_errors
from melt_jax.inference import scoring

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Checkpoint folder, published or of this package.")
TEACHER = flags.DEFINE_string("teacher", None, "Checkpoint folder of the teacher; without one no KL is measured.")
TASK = flags.DEFINE_enum("task", "arithmetic", ("arithmetic", "tokens"), "What to score.")
DATA = flags.DEFINE_string(
    "data", None, "Token file (.npy or .npz), or folder that melt_jax.prepare wrote; task tokens alone."
)
LENGTH = flags.DEFINE_integer("length", None, "Tokens of a sequence, for a file that is one stream.")
SEQUENCES = flags.DEFINE_integer("sequences", 64, "The most sequences of the data, or problems for the KL.")
ROWS = flags.DEFINE_integer("rows", 16, "Sequences run at once.")
PROBLEMS = flags.DEFINE_integer("problems", 256, "Arithmetic problems to answer.")
LOW = flags.DEFINE_integer("low", 2, "The fewest definitions of a problem.")
HIGH = flags.DEFINE_integer("high", 5, "The most definitions of a problem.")
CHUNK_SIZE = flags.DEFINE_integer(
    "chunk_size", None, "Tokens of a chunk of prefill and scoring; by default those a MELT was trained with, or 512."
)
SEED = flags.DEFINE_integer("seed", 1, "Of the problems.")
LOOPS = flags.DEFINE_integer("loops", None, "T, where it is not the checkpoint's.")
ALL_LOOPS = flags.DEFINE_boolean("all_loops", False, "Answer the problems with every number of loops up to T.")
EXIT_THRESHOLD = flags.DEFINE_float(
    "exit_threshold", None, "Cumulative exit probability at which answers take a loop's logits; 1: the last loop's."
)
GATE = flags.DEFINE_enum("gate", None, GATES, "A gate in place of the checkpoint's; none: the LoopLM inside a MELT.")
DTYPE = flags.DEFINE_enum("dtype", None, CHOICES["dtype"], "Of the weights and rows; by default as stored.")


def main(argv):
    """Opens, scores, prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if wrong := flag_errors():
        raise app.UsageError("\n".join(wrong))
    try:
        model = open_model(CHECKPOINT.value, dtype=DTYPE.value, gate=GATE.value)
        teacher = open_model(TEACHER.value, dtype=DTYPE.value) if TEACHER.value else None
        scoring.check_vocabularies(model, teacher)
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from error
    chunk_size = default_chunk(CHECKPOINT.value, model.config) if CHUNK_SIZE.value is None else CHUNK_SIZE.value
    if TASK.value == "arithmetic":
        if model.config.vocab < len(VOCABULARY):
            raise app.UsageError(f"arithmetic uses {len(VOCABULARY)} token ids, the model has {model.config.vocab}")
        problems = scoring.fresh_problems(SEED.value, PROBLEMS.value, LOW.value, HIGH.value)
        print(answer_table(model, problems, chunk_size))
        batch = scoring.problem_batch(problems[: SEQUENCES.value])
    else:
        batch = read_batch(model.config)
    chunked, decoding = (
        scoring.perplexity_and_kl(model, teacher, batch, chunk, LOOPS.value, ROWS.value) for chunk in (chunk_size, 1)
    )
    print(loop_table(chunked, decoding))


def flag_errors():
    """What is wrong with the flags, a line each."""
    sizes = (LENGTH, SEQUENCES, ROWS, PROBLEMS, CHUNK_SIZE, LOOPS)
    small = [flag for flag in sizes if flag.value is not None and flag.value < 1]
    wrong = [f"--{flag.name} must be 1 or more, got {flag.value}" for flag in small]
    if not 1 <= LOW.value <= HIGH.value <= len(NAMES):
        wrong.append(f"--low and --high must be 1 <= low <= high <= {len(NAMES)}, got {LOW.value} and {HIGH.value}")
    if EXIT_THRESHOLD.value is not None and not EXIT_THRESHOLD.value >= 0:
        wrong.append(f"--exit_threshold must be 0 or more, got {EXIT_THRESHOLD.value}")
    if (TASK.value == "tokens") != (DATA.value is not None):
        wrong.append("--data names a token file or a folder for --task=tokens, and goes with no other task")
    elif LENGTH.value is not None and DATA.value is not None and pathlib.Path(DATA.value).is_dir():
        wrong.append(f"--length goes with a token file; the sequences of {DATA.value} have a length")
    return wrong


def read_batch(config):
    """The first sequences of the data, of ids and a length that a model of that config has; else UsageError."""
    try:
        sequences, length, wrong = open_data(config.vocab)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if length > config.max_positions:
        wrong.append(f"{DATA.value}: sequences of {length} tokens pass the model's {config.max_positions} positions")
    if wrong:
        raise app.UsageError("\n".join(wrong))
    rows = [sequences[i] for i in range(min(SEQUENCES.value, len(sequences)))]
    return Batch(*(np.stack(field) for field in zip(*rows)))


def open_data(vocab):
    """(sequences, their length, what keeps them from a model of that vocabulary); ValueError: data of another form."""
    if pathlib.Path(DATA.value).is_dir():
        length = read_manifest(DATA.value)["length"]
        return open_records(DATA.value), length, record_errors(DATA.value, length, vocab, CHECKPOINT.value)
    sequences = open_tokens(DATA.value, LENGTH.value)
    length = sequences.tokens.shape[1]
    return sequences, length, token_errors(DATA.value, length, vocab)


def answer_table(model, problems, chunk_size):
    """Exact answers by number of definitions, for each number of loops that is asked for."""
    most = LOOPS.value or model.config.loops
    title = "exact answers (whole completions), greedy, by definitions (problems)"
    out = Table(title=title, box=None, title_justify="left", pad_edge=False)
    out.add_column("loops")
    results = {
        loops: scoring.exact_answers(model, problems, chunk_size, loops, EXIT_THRESHOLD.value)
        for loops in (range(1, most + 1) if ALL_LOOPS.value else (most,))
    }
    for definitions, count, *_ in results[most].by_definitions():
        out.add_column(f"{definitions} ({count})", justify="right")
    out.add_column(f"all ({len(problems)})", justify="right")
    out.add_column("cache bytes/token", justify="right")
    for loops, answers in results.items():
        cells = [f"{exact:.1%} ({whole:.1%})" for _, _, exact, whole in answers.by_definitions()]
        cells.append(f"{answers.answer_exact.mean():.1%} ({answers.completion_exact.mean():.1%})")
        out.add_row(str(loops), *cells, f"{scoring.cache_bytes_per_token(model, loops):,}")
    return scoring.render(out)


def loop_table(chunked, decoding):
    """Perplexity and KL per loop, chunked, decoding and the gap between them."""
    title = f"per loop, {chunked.tokens} scored tokens"
    out = Table(title=title, box=None, title_justify="left", pad_edge=False)
    for heading in ("", "loop", f"chunk {chunked.chunk}", "chunk 1", "gap"):
        out.add_column(heading, justify="right" if heading else "left")
    measures = {"perplexity": (chunked.perplexity, decoding.perplexity)}
    if chunked.kl:
        measures["KL(teacher ‖ model), nats"] = (chunked.kl, decoding.kl)
    for name, pair in measures.items():
        for loop, (one, other) in enumerate(zip(*pair), 1):
            out.add_row(name, str(loop), f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}")
    if chunked.kl:
        one, other = chunked.final_kl, decoding.final_kl
        out.add_row("KL of the last loops", "", f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}")
    return scoring.render(out)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    flags.mark_flag_as_required("checkpoint")
    app.run(main)
