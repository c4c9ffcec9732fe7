"""The training stream: the batch of step n is a function of (seed, n), whatever came before.

So nothing about the data is saved with a run: one that starts again at step n goes on with exactly the batches that it
would have met. Batches are made by background threads while the device computes. Of several processes each makes its
own rows of the same global batch.
"""

import dataclasses
import difflib
import functools
import pathlib

import grain
import numpy as np

from melt_jax.config import DataConfig
from melt_jax.data import arithmetic
from melt_jax.data.batch import Batch
from melt_jax.data.records import MANIFEST, open_records, record_errors, sha256
from melt_jax.data.text import TOKENIZER_FILES
from melt_jax.data.token_files import open_tokens, token_errors

SOURCES = ("arithmetic", "tokens", "records")
SCORES = ("completion", "all")
SEED_LIMIT = 2**32
PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def data_errors(data, model, tokenizer=None):
    """Everything that keeps a `DataConfig` from feeding a model of that `ModelConfig`: a list of messages.

    Empty if nothing does. A token file is read through once to check its ids. Records must be written with the
    tokenizer of the checkpoint folder `tokenizer`, if one is given and it has one.
    """
    found = []
    if data.batch < 1:
        found.append(f"data.batch: expected at least 1 sequence, found {data.batch}")
    if data.length < 2:
        found.append(f"data.length: expected at least 2 tokens, found {data.length}")
    if data.length > model.max_positions:
        found.append(
            f"data.length: {data.length} tokens exceed the model's max_positions, {model.max_positions};"
            " shorten the sequences"
        )
    if data.source not in SOURCES:
        found.append(f"data.source: {_unknown(data.source, SOURCES)}")
    elif data.source == "arithmetic":
        found += _arithmetic_errors(data, model)
    elif not data.path:
        needed = "a .npy or .npz file" if data.source == "tokens" else "a folder that melt_jax.prepare wrote"
        found.append(f'data.path: source "{data.source}" needs {needed}; none is given')
    elif data.source == "records":
        wrong = record_errors(data.path, data.length, model.vocab, tokenizer)
        found += [f"data.path: {message}" for message in wrong]
    elif data.length >= 2:
        found += [f"data.path: {message}" for message in token_errors(data.path, data.length, model.vocab)]
    return found


def run_errors(config, model, tokenizer=None):
    """Everything that keeps a `TrainConfig` from training and evaluating: a list of messages, as of `data_errors`.

    A run evaluates on other sequences than it trains on: arithmetic of another seed, or files of their own. `model` is
    the `ModelConfig` of its teacher; in pre-training, of what it makes.
    """
    evaluation, source = config.evaluation, config.data.source
    found, given = _teacher_errors(config, model), f'evaluation.path: "{evaluation.path}"'
    found += data_errors(config.data, model, tokenizer)
    if config.tokenizer:
        missing = [name for name in TOKENIZER_FILES if not (pathlib.Path(config.tokenizer) / name).is_file()]
        found += [f"tokenizer: {config.tokenizer} has no {name}" for name in missing]
    if source != "arithmetic" and (evaluation.problems or evaluation.sample):
        found += [f"evaluation.problems or sample: {line}" for line in _definition_errors(config.data, model)]
    if not evaluation.sequences or source == "arithmetic":
        why = "evaluation.sequences is 0" if not evaluation.sequences else f'source "{source}" reads no file'
        return found + [f"{given} goes unused, {why}; drop it"] * bool(evaluation.path)
    if not evaluation.path:
        return [*found, f'evaluation.path: source "{source}" needs sequences kept from training; none are given']
    if pathlib.Path(evaluation.path).resolve() == pathlib.Path(config.data.path).resolve():
        return [*found, f"{given} is data.path: expected sequences kept from training"]
    data = evaluation_data(config)
    wrong = [line.replace("data.path: ", "evaluation.path: ", 1) for line in data_errors(data, model, tokenizer)]
    if not wrong and (count := len(_open_source(data))) < evaluation.sequences:
        wrong = [f"evaluation.sequences: expected at most {count}, as {evaluation.path} has, found {data.batch}"]
    return found + [line for line in wrong if line not in found]


def _teacher_errors(config, model):
    # A student with the gates of a MELT would begin as that MELT, and have nothing to learn from it.
    if model.gate == "none":
        return []
    return [
        f"teacher: {config.teacher} is a MELT (gate {model.gate}); expected a LoopLM, such as melt_jax.convert"
        " --gate=none writes"
    ]


def evaluation_data(config):
    """The `DataConfig` of the sequences that a `TrainConfig` evaluates on: a batch of them, from `evaluation.path`."""
    return dataclasses.replace(config.data, path=config.evaluation.path, batch=config.evaluation.sequences)


def fingerprints(config):
    """{key: sha256 of the manifest} of the prepared data that a `TrainConfig` names; empty for other sources."""
    if config.data.source != "records":
        return {}
    paths = {"data.path": config.data.path, "evaluation.path": config.evaluation.path}
    return {key: sha256(pathlib.Path(path) / MANIFEST) for key, path in paths.items() if path}


def dataset_size(data: DataConfig) -> int | None:
    """The number of sequences in the data; None for arithmetic, which never ends.

    Raises:
      InputError: the data cannot be read.
    """
    return None if data.source == "arithmetic" else len(_open_source(data))


def batches(data, seed, start, stop, rows=None):
    """The batches of steps start … stop − 1, in order, made ahead of their use.

    Args:
      data: `melt_jax.config.DataConfig`, free of `data_errors`.
      seed: in [0, 2³²); another seed gives other problems, or another order of the file's sequences.
      start, stop: step numbers.
      rows: sorted indices of the rows of the global batch to make, such as `sharding.local_batch_indices`; None: all.

    Returns:
      An iterator of `Batch`, [batch, length] int32 numpy arrays, of the asked rows.

    Raises:
      ValueError: steps or seed out of range, an unknown source, or data that cannot be read.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"steps: expected 0 <= start <= stop, found start {start}, stop {stop}")
    make = batch_maker(data, seed, rows)
    if start == stop:
        return iter(())
    return iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(PREFETCH))


def batch_maker(data, seed, rows=None):
    """The function step → `Batch` that `batches` walks over; for single batches, and evaluation."""
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed: expected 0 <= seed < 2**32, found {seed}")
    rows = np.arange(data.batch) if rows is None else np.arange(data.batch)[rows]
    if data.source == "arithmetic":
        return functools.partial(_arithmetic_step, data, seed, rows)
    if data.source in SOURCES:
        # `seed` is hashed before the shuffle adds the epoch to it: neighbouring seeds must not share their orders.
        ordered = grain.MapDataset.source(_open_source(data)).seed(seed).shuffle().repeat()
        return functools.partial(_file_step, ordered, data.batch, rows)
    raise ValueError(f"data.source: {_unknown(data.source, SOURCES)}")


def _open_source(data):
    return open_records(data.path) if data.source == "records" else open_tokens(data.path, data.length)


def _arithmetic_step(data, seed, rows, step):
    # One random stream makes the whole batch; it is quick.
    fields = arithmetic.arithmetic_batch(seed, int(step), data.batch, data.length, data.low, data.high, data.score)
    return Batch(**{name: field[rows] for name, field in fields.items()})


def _file_step(ordered, batch, rows, step):
    return Batch(*(np.stack(field) for field in zip(*[ordered[int(step) * batch + int(row)] for row in rows])))


def _arithmetic_errors(data, model):
    found = []
    if data.path:
        path = pathlib.Path(data.path).name
        found.append(f'data.path: source "arithmetic" reads no file; drop {path}, or set data.source to "tokens"')
    if data.score not in SCORES:
        found.append(f"data.score: {_unknown(data.score, SCORES)}")
    wrong = _definition_errors(data, model)
    if not wrong and (longest := arithmetic.problem_tokens(data.high)) > data.length:
        found.append(
            f"data.high: a problem of {data.high} definitions takes {longest} tokens, but data.length is {data.length};"
            " lengthen the sequences or lower data.high"
        )
    return found + wrong


def _definition_errors(data, model):
    """Why no problems are made, or the model cannot read them."""
    found, names = [], len(arithmetic.NAMES)
    if not 1 <= data.low <= data.high <= names:
        found.append(
            f"data.low, data.high: expected 1 <= low <= high <= {names} definitions, found {data.low} and {data.high}"
        )
    if model.vocab < (needed := len(arithmetic.VOCABULARY)):
        found.append(f"model vocab: arithmetic uses {needed} token ids, but the model has {model.vocab}")
    return found


def _unknown(name, known):
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return f'unknown "{name}", expected one of {", ".join(known)}{hint}'
