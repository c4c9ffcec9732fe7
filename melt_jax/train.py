"""Trains: a LoopLM becomes a MELT in two phases, or a small LoopLM is made from scratch.

    python -m melt_jax.train --config=configs/nano.py --workdir=runs/nano

Started again with the same workdir, a run goes on from its last checkpoint, to the same bits. The workdir gets, for
each phase, `checkpoints/` (masters, moments, step), `metrics.jsonl` and TensorBoard files, and at its end `model/`, a
checkpoint folder that `melt_jax.generate`, `.evaluate` and `.convert` open; and `results.json`, what the table at the
end is made of. SIGTERM saves a checkpoint and leaves with status 75, a stall that `run.stall_seconds` notices with 76:
both ask to be started again (`melt_jax.training.preemption`).
"""

import dataclasses
import json
import pathlib
import sys

import jax
from absl import flags
from rich.console import Console

from melt_jax import command_line
from melt_jax.checkpoints.orbax import open_folder, open_model, save_model
from melt_jax.config import ConfigError, freeze
from melt_jax.data import stream
from melt_jax.files import write_text
from melt_jax.inference import scoring
from melt_jax.inference.results import Results
from melt_jax.model.model import abstract_model, init_model, parameter_count, reconfigure
from melt_jax.sharding import (
    batch_sharding,
    for_inference,
    local_batch_indices,
    make_mesh,
    mesh_errors,
    place_batch,
    place_weights,
    weight_shardings,
)
from melt_jax.training.checkpoints import Checkpoints
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.preemption import PREEMPTED, exit_if_preempted, exit_on_sigterm
from melt_jax.training.processes import broadcast_from_process_0, initialize_distributed
from melt_jax.training.step import init_state, make_train_step, phase_objective
from melt_jax.training.step_monitor import StepMonitor

RESUMABLE_KEYS = {
    "run",
    "mesh",
    "gather",
    "micro_batches",
}  # may change in a run: how it is watched, and where its steps run


def define_flags() -> None:
    """Defines the flags of this command."""
    command_line.define_config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run; a run that it holds is resumed.", required=True)


def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    config = command_line.read_config()
    freeze(config)  # errors of the config are reported before processes are joined
    initialize_distributed()
    exit_on_sigterm()
    run(config, pathlib.Path(flags.FLAGS.workdir))


def run(config_dict, workdir):
    """One run of a ConfigDict, new or resumed, in a folder. Returns the trained model, float32."""
    console = Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)

    # ---- the config, checked before anything is allocated
    config = freeze(config_dict)
    pretraining = config.phases == ("pretraining",)
    shape = config.model if pretraining else open_folder(config.teacher).config
    wrong = stream.run_errors(config, shape, config.tokenizer or config.teacher)
    wrong += mesh_errors(config, shape if pretraining else dataclasses.replace(shape, gate=config.student.gate))
    if wrong:
        fit = "teacher, data and devices do not fit the run:\n"
        raise ConfigError(fit + "\n".join(f"  - {line}" for line in wrong))
    mesh = make_mesh(config.mesh)
    _keep_config(config_dict, stream.fingerprints(config), workdir)
    with jax.set_mesh(mesh):
        return _run(config, shape, workdir, mesh, console)


def _run(config, shape, workdir, mesh, console):
    # ---- where the student starts
    key = jax.random.key(config.seed)
    teacher = None
    if config.phases == ("pretraining",):
        phase = config.pretraining
        params = init_model(shape, key, phase.init_std, embedding_std=phase.embedding_std)
    else:
        shardings = weight_shardings(abstract_model(shape), mesh)
        teacher = open_model(config.teacher, dtype=config.dtype, shardings=shardings)
        teacher = reconfigure(teacher, attention_block=config.attention_block)
        params = make_student(open_model(config.teacher, dtype="float32", shardings=shardings), config, key)
    params = place_weights(params, mesh)
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    console.print(f"{parameter_count(params):,} parameters on {mesh.size} × {mesh.devices.flat[0].device_kind}: {axes}")
    results = Results(workdir / "results.json")
    if teacher is not None:
        results.measure("teacher", lambda: teacher, teacher, config)
        results.measure("single shared KV entry, untrained", lambda: reconfigure(teacher, gate="last"), teacher, config)

    # ---- the phases
    first_step = 0
    for name in config.phases:
        params = run_phase(name, config, mesh, workdir / name, params, teacher, first_step, console)
        results.measure(f"after {name}", lambda params=params: params, teacher, config)
        first_step += config.phase(name).steps

    # ---- the table, and a sample
    if table := results.table():
        console.print(table)
    if config.evaluation.sample:
        melt = for_inference(params, config.dtype)
        console.print(scoring.sample(melt, config.evaluation.seed, config.chunk_size), markup=False)
    return params


def run_phase(name, config, mesh, workdir, params, teacher, first_step, console):
    """Trains one phase to its end and returns the trained weights, float32.

    Start-up order: a phase that has ended is read; one that has begun goes on from its newest checkpoint; else it
    starts from `params`, what the phase before it made or the converted teacher.

    Args:
      name: of the phase.
      config: `TrainConfig`.
      mesh: of `sharding.make_mesh`, the current one.
      workdir: the phase's folder.
      params: float32 model, on the mesh; given away, so that masters exist once.
      teacher: frozen LoopLM, or None in pre-training.
      first_step: the run's step at which the phase begins, from which its data is counted.
      console: where lines are printed.

    Raises:
      SystemExit: with status 75, when SIGTERM came and a checkpoint was saved.
      NonFiniteError: too many steps in a row had a loss or gradient that is not finite.
    """
    exit_if_preempted()
    phase = config.phase(name)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint_every, config.checkpoints_kept)
    params = reconfigure(params, remat=config.remat, attention_block=config.attention_block)
    optimizer = make_optimizer(phase, config.optimizer, params)
    state = init_state(params, optimizer)
    start = checkpoints.latest() or 0
    if start:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state
        state = checkpoints.restore(start, abstract)
        console.print(f"{name}: goes on from step {start}")

    objective = phase_objective(name, phase, config.chunk_size)
    train_step = make_train_step(objective, optimizer, config.micro_batches, config.dtype, config.gather)
    sharding, size = batch_sharding(mesh), config.data.batch
    rows = local_batch_indices(sharding, size)
    batches = stream.batches(config.data, config.seed, first_step + start, first_step + phase.steps, rows)
    skipped = int(state.skipped)
    with StepMonitor(
        name, config, state.params.config, workdir, start, skipped, first_step, checkpoints, console
    ) as monitor:
        for step, batch in monitor.enumerate(batches):
            with monitor.annotate(step, state):
                state, metrics = train_step(state, teacher, place_batch(batch, sharding, rows, size))
            last = monitor.after_dispatch(step, metrics)
            checkpoints.save(step, state, force=last)
            if last:
                break
        monitor.finish()
    checkpoints.close()
    if monitor.preempted:
        console.print(f"{name}: SIGTERM; step {int(state.step)} is saved, and the same command goes on from there")
        sys.exit(PREEMPTED)
    if not broadcast_from_process_0((workdir / "model").exists()):
        save_model(workdir / "model", state.params, config.tokenizer or config.teacher, chunk_size=config.chunk_size)
    return state.params


def make_student(looplm, config, key):
    """The MELT that a LoopLM starts as: its weights, and fresh gates."""
    student = config.student
    return reconfigure(looplm, key, student.gate_std, gate=student.gate, first_loop=student.first_loop)


def _keep_config(config_dict, fingerprints, workdir):
    """Writes the config, and what its prepared data is known by, beside the run.

    A run is resumed only under the config it began with, but for `RESUMABLE_KEYS`, and with the same data.
    """
    path, new = workdir / "config.json", json.loads(config_dict.to_json())
    new |= {f"manifest of {key}": f"sha256 {digest}" for key, digest in fingerprints.items()}
    old = json.loads(path.read_text()) if path.exists() else new
    keys = sorted({*old, *new} - RESUMABLE_KEYS)
    changed = [f"{key}: {old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if broadcast_from_process_0(bool(changed)):  # one that went on alone would wait for the others
        raise ConfigError(
            f"{workdir} holds a run with another config or other data; take another workdir. Changed:\n"
            + "\n".join(changed)
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(new, indent=1, sort_keys=True))


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
