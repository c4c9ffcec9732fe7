"""The plan of a run: the epochs of its data and the disk space it needs."""

import dataclasses
import math

import jax
import pytest

from configs import nano, ouro_1_4b
from melt_jax.config import ModelConfig, freeze
from melt_jax.model.model import init_model, parameter_count
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.plan import CHECKPOINT_BYTES, data_line, disk_bytes, disk_line
from melt_jax.training.step import init_state
from tests.helpers.tiny import TINY

RUN = freeze(nano.get_config())


@pytest.mark.parametrize(
    "sequences, line",
    [
        (12_800, "data: 12,800 sequences, 1.00 epochs"),
        (25_600, "data: 25,600 sequences, 0.50 epochs"),
        (8_000, "data: 8,000 sequences, 1.60 epochs: sequences repeat from step 251 of 400 on"),
        (12_799, "data: 12,799 sequences, 1.00 epochs: sequences repeat from step 400 of 400 on"),
    ],
)
def test_data_line_states_the_epochs(sequences, line):
    """400 steps of 32 sequences."""
    phases = {name: dataclasses.replace(RUN.phase(name), steps=200) for name in RUN.phases}
    assert data_line(dataclasses.replace(RUN, **phases), sequences) == line


def test_checkpoint_bytes_match_a_state():
    model = jax.eval_shape(lambda: init_model(TINY, jax.random.key(0)))
    optimizer = make_optimizer(RUN.transition, RUN.optimizer, model)
    leaves = jax.tree.leaves(jax.eval_shape(lambda model: init_state(model, optimizer), model))
    arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves if leaf.shape)
    assert arrays == CHECKPOINT_BYTES * parameter_count(model)


def test_disk_line_counts_model_and_checkpoints(tmp_path):
    """One model and three checkpoints for the 1.4B: 40 bytes per parameter."""
    config = ouro_1_4b.get_config()
    config.teacher = "somewhere"
    run = dataclasses.replace(freeze(config), checkpoints_kept=2)
    melt = ModelConfig(gate="elementwise")
    assert disk_bytes(run, melt) == 40 * 1_636_028_417
    line = disk_line(run, melt, tmp_path / "new/run")
    assert line.startswith(f"disk: at most 65.4 GB in {tmp_path / 'new/run'}, 0.0 GB used so far, ")
