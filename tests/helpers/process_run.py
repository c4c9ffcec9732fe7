"""A short training run, and restores on other meshes; tests/test_processes.py starts it in several processes.

    python -m tests.helpers.process_run TEACHER WORKDIR OUTPUT         trains, as process `MELT_PROCESS` if it is set
    python -m tests.helpers.process_run TEACHER WORKDIR OUTPUT OTHER   also restores the checkpoints of the run in OTHER

Process i writes its results to OUTPUTi.json.
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import numpy as np

from configs import nano
from melt_jax import train
from melt_jax.config import MeshConfig, freeze
from melt_jax.data import stream
from melt_jax.sharding import make_mesh, place_weights
from melt_jax.training.checkpoints import Checkpoints, flatten
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.processes import initialize_distributed
from melt_jax.training.step import init_state
from tests.helpers.runs import differing, read_checkpoint
from tests.helpers.tiny import TINY, make_model

STEPS, BATCH = 3, 8
MESH = {"replica": 2, "fsdp": 2, "tensor": 2}
OTHERS = ((1, 8, 1), (8, 1, 1), (1, 1, 1))  # in this order; the last uses one of the eight devices


def tiny_run(teacher, mesh):
    """The config of a few transition steps on eight devices."""
    config = nano.get_config()
    config.teacher, config.phases = teacher, ("transition",)
    config.mesh.update(mesh)
    config.data.length, config.data.batch, config.data.high = 32, BATCH, 2
    config.chunk_size, config.log_every = 16, 1
    config.transition.steps, config.transition.warmup_steps = STEPS, 1
    config.evaluation.problems, config.evaluation.sequences, config.evaluation.sample = 0, 0, False
    return config


def train_and_record(config, workdir):
    """Trains; returns the tokens of this process's part of every batch, [steps, sequences, length]."""
    seen, make_batches = [], stream.batches

    def recorded(*args):
        for batch in make_batches(*args):
            seen.append(np.asarray(batch.tokens).tolist())
            yield batch

    stream.batches = recorded
    train.run(config, workdir)
    return seen


def restore_elsewhere(teacher, source, folder):
    """Restores and saves a run's last checkpoint on one mesh after another; returns {mesh: leaves that differ}."""
    stored, out = read_checkpoint(source / "transition/checkpoints" / str(STEPS) / "default"), {}
    config = freeze(tiny_run(teacher, MESH))
    checkpoints = Checkpoints(source / "transition/checkpoints", 1, 1)
    other = make_model(dataclasses.replace(TINY, vocab=64), 7)
    for shape in OTHERS:
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
        with jax.set_mesh(mesh):
            params = place_weights(jax.tree.map(np.copy, other), mesh)  # `init_state` donates them
            state = init_state(params, make_optimizer(config.transition, config.optimizer, params))
            abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            state = checkpoints.restore(STEPS, jax.tree.map(abstract, state))
            checkpoints = Checkpoints(folder / "x".join(map(str, shape)), 1, 1)
            checkpoints.save(STEPS, state, force=True)
            checkpoints.wait_until_finished()
        out[str(shape)] = differing({name: np.asarray(x) for name, x in flatten(state).items()}, stored)
    return out


def resume_elsewhere(teacher, source):
    """Resumes the run on other meshes of as many devices; returns {mesh: weights that differ}."""
    stored = read_checkpoint(source / "transition/checkpoints" / str(STEPS) / "default")
    stored = {name.removeprefix("params."): x for name, x in stored.items() if name.startswith("params.")}
    out = {}
    for shape in OTHERS[:-1]:
        shutil.rmtree(source / "transition/model", ignore_errors=True)  # so that the checkpoint is read instead
        weights = train.run(tiny_run(teacher, dict(zip(MESH, shape))), source)
        out[str(shape)] = differing({name: np.asarray(x) for name, x in flatten(weights).items()}, stored)
    return out


def main():
    """Trains, and restores the run in OTHER if it is given."""
    teacher, workdir, output, *other = sys.argv[1:]
    initialize_distributed()
    results = {"tokens": train_and_record(tiny_run(teacher, MESH), pathlib.Path(workdir))}
    for source in map(pathlib.Path, other):
        results["restored"] = restore_elsewhere(teacher, source, pathlib.Path(workdir) / "restored")
        results["resumed"] = resume_elsewhere(teacher, source)
    pathlib.Path(f"{output}{jax.process_index()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
