"""The training stream: the batch of step n is a function of (seed, n) alone.

A checkpoint therefore stores no data state: a run that resumes at step n gets the same batches as an uninterrupted one.
Background threads make batches while the device computes. With several processes, each makes its own sequences of the
same global batch.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from melt_jax.config import DataConfig, InputError, ModelConfig, TrainConfig
from melt_jax.data import arithmetic
from melt_jax.data.arithmetic_tokenizer import tokenizer_errors
from melt_jax.data.batch import Batch
from melt_jax.data.records import (
    MANIFEST,
    RecordSequences,
    compatibility_errors,
    open_records,
    read_manifest,
    record_errors,
    sha256,
)
from melt_jax.data.text import TOKENIZER_FILES
from melt_jax.data.token_files import TokenSequences, open_tokens, token_errors
from melt_jax.files import PathLike, absolute, as_path

SOURCES = ("arithmetic", "tokens", "records")
SCORES = ("completion", "all")
SEED_LIMIT = 2**32
# The step of the arithmetic batch for evaluation. Training never reaches it, so evaluation may use the training seed.
EVALUATION_STEP = 2**62
PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def data_errors(data: DataConfig, model: ModelConfig, tokenizer: PathLike | None = None) -> list[str]:
    """Mismatches between data and a model, and errors in the data itself.

    Args:
      data: the configuration of the data. A token file is read once to check its ids.
      model: the configuration of the model.
      tokenizer: a model folder. If it has a tokenizer, records must have been written with it, and arithmetic
        needs the tokenizer of that task.
    """
    errors = []
    if data.batch < 1:
        errors.append(f"data.batch: expected at least 1 sequence, found {data.batch}")
    if data.length < 2:
        errors.append(f"data.length: expected at least 2 tokens, found {data.length}")
    if data.length > model.max_positions:
        errors.append(
            f"data.length: expected at most the model's max_positions, {model.max_positions}, found {data.length};"
            " shorten the sequences"
        )
    if data.source not in SOURCES:
        errors.append(f"data.source: {_unknown(data.source, SOURCES)}")
    elif data.source == "arithmetic":
        errors += _arithmetic_errors(data, model)
        errors += [f"data.source: {message}" for message in tokenizer_errors(tokenizer)] if tokenizer else []
    elif not data.path:
        needed = "a .npy or .npz file" if data.source == "tokens" else "a folder written by melt_jax.prepare"
        errors.append(f'data.path: expected {needed} for source "{data.source}", found none')
    elif data.source == "records":
        messages = record_errors(data.path, data.length, model.vocab, tokenizer)
        errors += [f"data.path: {message}" for message in messages]
    elif data.length >= 2:
        errors += [f"data.path: {message}" for message in token_errors(data.path, data.length, model.vocab)]
    return errors


def run_errors(config: TrainConfig, model: ModelConfig, tokenizer: PathLike | None = None) -> list[str]:
    """Mismatches between a run's teacher, training data and evaluation data.

    Args:
      config: the run. Its evaluation sequences must not be its training sequences.
      model: the configuration of the teacher; in pretraining, of the new model.
      tokenizer: as in `data_errors`.
    """
    errors = _teacher_errors(config, model) + data_errors(config.data, model, tokenizer)
    if config.tokenizer:
        missing = [name for name in TOKENIZER_FILES if not (as_path(config.tokenizer) / name).is_file()]
        errors += [f"tokenizer: expected {name} in {config.tokenizer}, found none" for name in missing]
    if config.data.source != "arithmetic":
        errors += _problem_errors(config, model, tokenizer)
    return errors + [error for error in _evaluation_errors(config, model, tokenizer) if error not in errors]


def _teacher_errors(config: TrainConfig, model: ModelConfig) -> list[str]:
    # A student with a MELT's gates would start as that MELT and have nothing to learn from it.
    if model.gate == "none":
        return []
    return [
        f"teacher: expected a LoopLM, such as melt_jax.convert --gate=none writes, found a MELT (gate {model.gate}) in"
        f" {config.teacher}"
    ]


def _problem_errors(config: TrainConfig, model: ModelConfig, tokenizer) -> list[str]:
    """Errors of the arithmetic problems, if any are evaluated, for a model that is trained on other data."""
    evaluation = config.evaluation
    if not (evaluation.problems or evaluation.sample):
        return []
    errors = _definition_errors(config.data, model) + (tokenizer_errors(tokenizer) if tokenizer else [])
    return [f"evaluation.problems or sample: {message}" for message in errors]


def _evaluation_errors(config: TrainConfig, model: ModelConfig, tokenizer) -> list[str]:
    evaluation, source = config.evaluation, config.data.source
    found = f'evaluation.path: expected none, found "{evaluation.path}"'
    if not evaluation.sequences:
        return [f"{found}; remove it, or set evaluation.sequences above 0"] if evaluation.path else []
    if source == "arithmetic":
        return [f'{found}; remove it: source "arithmetic" reads no file'] if evaluation.path else []
    if not evaluation.path:
        return [f'evaluation.path: expected held-out sequences for source "{source}", found none']
    if absolute(evaluation.path) == absolute(config.data.path):
        return ["evaluation.path: expected held-out sequences, found data.path"]
    data = evaluation_data(config)
    errors = [line.replace("data.path: ", "evaluation.path: ", 1) for line in data_errors(data, model, tokenizer)]
    if errors:
        return errors
    if (count := len(_open_source(data))) < evaluation.sequences:
        errors.append(
            f"evaluation.sequences: expected at most the {count} sequences of {evaluation.path}, found"
            f" {evaluation.sequences}"
        )
    if source == "records":
        errors += _form_errors(config)
    return errors


def _form_errors(config: TrainConfig) -> list[str]:
    """At most one message: training and evaluation conversations were rendered differently."""
    try:
        training, evaluation = read_manifest(config.data.path), read_manifest(config.evaluation.path)
    except InputError:  # reported with data.path
        return []
    return [f"evaluation.path: {message}" for message in compatibility_errors(evaluation, training, config.data.path)]


def evaluation_data(config: TrainConfig) -> DataConfig:
    """The data of a run's evaluation: one batch of `evaluation.sequences` sequences, from `evaluation.path`."""
    return dataclasses.replace(config.data, path=config.evaluation.path, batch=config.evaluation.sequences)


def evaluation_batch(config: TrainConfig, rows: np.ndarray | None = None) -> Batch:
    """The sequences on which a run is evaluated, a function of `evaluation.seed`; arguments and result as in `batches`.

    Arithmetic sequences are those of `EVALUATION_STEP`, which no run trains on, whatever its seed.
    """
    data = evaluation_data(config)
    step = EVALUATION_STEP if data.source == "arithmetic" else 0
    return batch_maker(data, config.evaluation.seed, rows)(step)


def fingerprint(source: str, path: str) -> dict[str, str]:
    """{"manifest": sha256} of prepared data, {"contents": sha256} of a token file; empty without a path.

    It reads a token file as a whole, in a second or two per GB.
    """
    if not path or source == "arithmetic":
        return {}
    if source == "records":
        return {"manifest": sha256(as_path(path) / MANIFEST)}
    return {"contents": sha256(as_path(path))}


def dataset_size(data: DataConfig) -> int | None:
    """The number of sequences in the data; None for arithmetic, which is unlimited.

    Raises:
      InputError: the data cannot be read.
    """
    return None if data.source == "arithmetic" else len(_open_source(data))


def batches(data: DataConfig, seed: int, start: int, stop: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """The batches of steps start to stop − 1, in order, prefetched.

    Args:
      data: a config for which `data_errors` finds no error. Sequences from files are shuffled anew for each epoch.
      seed: in [0, 2³²); it determines the arithmetic problems or the order of the sequences.
      start, stop: step numbers.
      rows: sorted indices of the sequences of the global batch to make, from `sharding.local_batch_indices`; None: all.

    Returns:
      An iterator of `Batch`, int32 NumPy arrays [rows, length].

    Raises:
      InputError: steps or seed out of range, an unknown source, or data that cannot be read.
    """
    if not 0 <= start <= stop:
        raise InputError(f"steps: expected 0 <= start <= stop, found start {start}, stop {stop}")
    make = batch_maker(data, seed, rows)
    if start == stop:
        return iter(())
    return iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(PREFETCH))


def batch_maker(data: DataConfig, seed: int, rows: np.ndarray | None = None) -> Callable[[int], Batch]:
    """The function step → `Batch` behind `batches`, with the same arguments and errors."""
    if not 0 <= seed < SEED_LIMIT:
        raise InputError(f"seed: expected 0 <= seed < 2**32, found {seed}")
    rows = np.arange(data.batch) if rows is None else np.arange(data.batch)[rows]
    if data.source == "arithmetic":
        return functools.partial(_arithmetic_step, data, seed, rows)
    if data.source in SOURCES:
        # Grain hashes this seed before it adds the epoch; otherwise neighboring seeds would share orders.
        ordered = grain.MapDataset.source(_open_source(data)).seed(seed).shuffle().repeat()
        return functools.partial(_file_step, ordered, data.batch, rows)
    raise InputError(f"data.source: {_unknown(data.source, SOURCES)}")


def _open_source(data: DataConfig) -> RecordSequences | TokenSequences:
    return open_records(data.path) if data.source == "records" else open_tokens(data.path, data.length)


def _arithmetic_step(data, seed, rows, step):
    # One random stream makes the whole batch, so every process makes all of it; this is cheap.
    fields = arithmetic.arithmetic_batch(seed, int(step), data)
    return Batch(**{name: field[rows] for name, field in fields.items()})


def _file_step(ordered, batch, rows, step):
    return Batch(*(np.stack(field) for field in zip(*[ordered[int(step) * batch + int(row)] for row in rows])))


def _arithmetic_errors(data: DataConfig, model: ModelConfig) -> list[str]:
    errors = []
    if data.path:
        errors.append(
            f'data.path: expected none for source "arithmetic", found {data.path}; remove it, or set data.source'
        )
    if data.score not in SCORES:
        errors.append(f"data.score: {_unknown(data.score, SCORES)}")
    definition_errors = _definition_errors(data, model)
    if not definition_errors and (longest := arithmetic.problem_tokens(data.high, data.hops)) > data.length:
        errors.append(
            f"data.high: expected a problem within data.length, {data.length} tokens, found {longest} tokens for"
            f" {data.high} definitions; lengthen the sequences or lower data.high"
        )
    return errors + definition_errors


def _definition_errors(data: DataConfig, model: ModelConfig) -> list[str]:
    """Errors that prevent problems from being generated, or from being read by the model."""
    errors, names = [], len(arithmetic.NAMES)
    if not 1 <= data.low <= data.high <= names:
        errors.append(
            f"data.low, data.high: expected 1 <= low <= high <= {names} definitions, found {data.low} and {data.high}"
        )
    if model.vocab < (needed := len(arithmetic.VOCABULARY)):
        errors.append(f"model vocab: expected at least the {needed} token ids of arithmetic, found {model.vocab}")
    return errors


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return f'expected one of {", ".join(known)}, found "{name}"{hint}'
