"""The plan of a run, printed at its start: how often it repeats its data and how much disk space it needs."""

import math
import shutil
from collections.abc import Iterator

import jax

from melt_jax.config import ModelConfig, TrainConfig
from melt_jax.data import stream
from melt_jax.files import Path, folder_bytes, in_bucket
from melt_jax.model.model import abstract_model, parameter_count

MODEL_BYTES = 4  # per parameter: `model/` holds float32 weights
CHECKPOINT_BYTES = 12  # per parameter: float32 weights and AdamW's two moments


def plan(config: TrainConfig, model: ModelConfig, workdir: Path) -> Iterator[str]:
    """The lines to print: data, unless it is generated, disk, and whether the model is not evaluated.

    Too little data or disk is not an error.

    Args:
      config: the run's config.
      model: the trained model's config.
      workdir: the run's folder, which need not exist.
    """
    sequences = stream.dataset_size(config.data)
    if sequences is not None:
        yield data_line(config, sequences)
    if jax.process_index() == 0:
        yield disk_line(config, model, workdir)
    if not (config.evaluation.problems or config.evaluation.sequences):
        yield "no evaluation: evaluation.problems and evaluation.sequences are 0"


def data_line(config: TrainConfig, sequences: int) -> str:
    """The number of sequences, the number of epochs, and the first step of the run that repeats a sequence."""
    steps = sum(config.phase(name).steps for name in config.phases)
    line = f"data: {sequences:,} sequences, {steps * config.data.batch / sequences:.2f} epochs"
    if steps * config.data.batch <= sequences:
        return line
    return f"{line}: sequences repeat from step {math.ceil((sequences + 1) / config.data.batch)} of {steps} on"


def disk_line(config: TrainConfig, model: ModelConfig, workdir: Path) -> str:
    """The largest size of the workdir during the run, its size now, and on a disk the free space, in GB (1e9 bytes)."""
    used, needed = folder_bytes(workdir), disk_bytes(config, model)
    if in_bucket(workdir):
        return f"bucket: at most {_gb(needed)} in {workdir}, {_gb(used)} used so far"
    existing = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    return f"disk: at most {_gb(needed)} in {workdir}, {_gb(used)} used so far, {_gb(free)} free"


def disk_bytes(config: TrainConfig, model: ModelConfig) -> int:
    """The largest size of the workdir during a run, in bytes; logs, a few MB, are not counted.

    While a checkpoint is being saved, there are `checkpoints_kept` + 1. Each phase ends by writing `model/`; its
    checkpoints are then deleted, except the last phase's.
    """
    parameters = parameter_count(abstract_model(model))
    models = len(config.phases) * MODEL_BYTES
    saving = models - MODEL_BYTES + (config.checkpoints_kept + 1) * CHECKPOINT_BYTES
    ended = models + config.checkpoints_kept * CHECKPOINT_BYTES
    return parameters * max(saving, ended)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
