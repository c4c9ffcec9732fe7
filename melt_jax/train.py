"""Trains a MELT from a LoopLM in two phases, or a small LoopLM from scratch.

    python -m melt_jax.train --config=configs/nano.py --workdir=runs/nano
    python -m melt_jax.train --config=configs/nano.py --workdir=gs://BUCKET/nano

Rerun the command to resume a killed run from its last checkpoint; the result is bitwise identical to an uninterrupted
run. The workdir gets `config.json`, `results.json` (the evaluations), `attempts/` (the seconds and the git commit of
each start), and a folder for each phase: `checkpoints/` (weights, moments, step), `metrics.jsonl`, TensorBoard files
and, when the phase has ended, `model/`, a model folder for `melt_jax.generate`, `.evaluate` and `.convert`. When a
phase's model is written, its checkpoints are deleted, except the last phase's. After SIGTERM the command saves a
checkpoint and exits with status 75; after a stall of `run.stall_seconds` it exits with status 76. Rerun it in both
cases (`melt_jax.training.preemption`).
"""

import dataclasses
import sys
import traceback

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from melt_jax import command_line
from melt_jax.checkpoints import hub
from melt_jax.checkpoints.folder import not_finite, weight_name
from melt_jax.checkpoints.orbax import open_folder, open_model, save_model
from melt_jax.config import ConfigError, InputError, ModelConfig, TrainConfig, freeze
from melt_jax.data import stream
from melt_jax.files import Path, PathLike, as_path, is_complete, remove_folder
from melt_jax.inference import scoring
from melt_jax.inference.results import Results
from melt_jax.model.model import (
    LoopedTransformer,
    abstract_model,
    init_model,
    module_leaves,
    parameter_count,
    reconfigure,
)
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
from melt_jax.training.attempts import Attempt, spent
from melt_jax.training.checkpoints import Checkpoints, SaveError
from melt_jax.training.compiler_options import compiler_options
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.plan import plan
from melt_jax.training.preemption import PREEMPTED, exit_if_preempted, exit_on_sigterm
from melt_jax.training.processes import (
    all_processes_fail,
    broadcast_from_process_0,
    initialize_distributed,
    is_communication_error,
    record_failure,
    text_from_process_0,
    wait_for_abort,
)
from melt_jax.training.run_config import keep_config
from melt_jax.training.skipped import NonFiniteError
from melt_jax.training.step import OBJECTIVES, init_state, make_train_step
from melt_jax.training.step_monitor import PhaseStart, StepMonitor
from melt_jax.training.wandb_log import wandb_run
from melt_jax.training.workdir import claim_workdir


def define_flags() -> None:
    """Defines the command's flags."""
    command_line.define_config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run; a run already in it is resumed.", required=True)


def main(argv: list[str]) -> None:
    """Reads the flags and trains."""
    config = command_line.read_config()
    if not flags.FLAGS.workdir.strip():
        raise InputError("--workdir: expected a folder, found an empty name")
    lost_seconds = freeze(config).run.lost_seconds  # reports errors of the config before the processes join
    initialize_distributed(lost_seconds)
    exit_on_sigterm()
    try:
        run(config, as_path(flags.FLAGS.workdir, "--workdir"))
    except Exception as error:
        if is_communication_error(error):
            wait_for_abort(error, lost_seconds)  # returns if no process is lost
        record_failure(error)
        if isinstance(error, SaveError):
            command_line.exit_at_once(error)
        if jax.process_count() == 1 or (isinstance(error, InputError) and all_processes_fail()):
            raise
        if not isinstance(error, InputError):
            traceback.print_exc()
        command_line.exit_at_once(error)  # a normal exit waits for the other processes, which wait for this one


def run(config_dict: ConfigDict, workdir: PathLike) -> LoopedTransformer:
    """Trains as configured, from the start or from the last checkpoint in the folder.

    Args:
      config_dict: a recipe, such as `configs.nano.get_config()`.
      workdir: the run's folder.

    Returns:
      The trained model, float32, split over the mesh.

    Raises:
      InputError: config, teacher, data and devices do not match, the folder holds a run with other ones, another run
        uses it, or it cannot be written.
      NonFiniteError: the loss or a gradient was not finite in too many steps in a row.
      SaveError: the run's files cannot be written, or files that it needs cannot be read.
      SystemExit: SIGTERM was received and a checkpoint was saved (status 75).
    """
    workdir = as_path(workdir)
    console = Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)

    # ---- check everything before anything is allocated
    named = freeze(config_dict)
    named = dataclasses.replace(named, teacher=text_from_process_0(hub.pinned, named.teacher))
    tokenizer = text_from_process_0(hub.pinned, named.tokenizer, hub.TOKENIZER)
    config = with_local_folders(dataclasses.replace(named, tokenizer=tokenizer))
    pretraining = config.phases == ("pretraining",)
    looplm = config.model if pretraining else open_folder(config.teacher).config
    student, trained = config.student, looplm
    if not pretraining:
        trained = dataclasses.replace(looplm, **student.changes)
    errors = stream.run_errors(config, looplm, config.tokenizer or config.teacher) + mesh_errors(config, trained)
    if errors:
        mismatch = "teacher, data and devices do not fit the run:\n"
        raise ConfigError(mismatch + "\n".join(f"  - {error}" for error in errors))
    if not pretraining:
        scoring.check_evaluation(config)
    with claim_workdir(config, trained, workdir):
        keep_config(named, workdir)
        for line in plan(config, trained, workdir):
            console.print(line)

        mesh = make_mesh(config.mesh)
        axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        parameters = parameter_count(abstract_model(trained))
        console.print(f"{parameters:,} parameters on {mesh.size} × {mesh.devices.flat[0].device_kind}: {axes}")
        try:
            with Attempt(workdir, console), wandb_run(config, workdir), jax.set_mesh(mesh):
                return _run(config, looplm, workdir, mesh, console)
        except OSError as error:
            raise SaveError(
                f"{workdir}: expected to read and write files, found {_reason(error)}; correct it, then rerun the"
                " command: it resumes from the last checkpoint"
            ) from error


def _run(
    config: TrainConfig, looplm: ModelConfig, workdir: Path, mesh: jax.sharding.Mesh, console: Console
) -> LoopedTransformer:
    # ---- the teacher, which is read once: in float32, if training starts from its weights
    pretraining = config.phases == ("pretraining",)
    written = [name for name in config.phases if broadcast_from_process_0(is_complete(workdir / name / "model"))]
    ended = config.phases[: config.phases.index(written[-1]) + 1 if written else 0]
    for name in config.phases[len(ended) + 1 :]:
        if broadcast_from_process_0((workdir / name / "checkpoints").exists()):
            missing = workdir / config.phases[config.phases.index(name) - 1] / "model"
            raise InputError(
                f"{missing}: expected the model from which {name} started, found none; restore it, or remove"
                f" {workdir / name} to train again from {config.phases[len(ended)]}"
            )
    stored = teacher = None
    results = Results(workdir / "results.json")
    if not pretraining:
        shardings = weight_shardings(abstract_model(looplm), mesh)
        stored = open_model(config.teacher, dtype=config.dtype if ended else "float32", shardings=shardings)
        teacher = stored if ended else cast_copy(stored, config.dtype)
        teacher = reconfigure(teacher, **config.computation)
        if config.evaluation.baselines:
            untrained = lambda: reconfigure(teacher, gate="last")
            results.measure("teacher", lambda: teacher, teacher, config)
            results.measure("single shared KV entry, untrained", untrained, teacher, config)

    # ---- phases that an earlier run has ended; their evaluation may be missing
    for name in written:
        _delete_checkpoints(name, config, workdir / name)
        results.measure(f"after {name}", lambda name=name: read_model(workdir / name, mesh), teacher, config)

    # ---- the weights to train: the last ended phase's, new ones, or the teacher's with new gates
    key = jax.random.key(config.seed)
    if ended:
        params = read_model(workdir / ended[-1], mesh)
        console.print(f"{ended[-1]}: complete, read from {workdir / ended[-1] / 'model'}")
    elif stored is None:
        stds = config.pretraining
        params = place_weights(init_model(looplm, key, stds.init_std, embedding_std=stds.embedding_std), mesh)
    else:
        params = place_weights(make_student(stored, config, key), mesh)
    del stored

    # ---- the phases that remain
    for name in config.phases[len(ended) :]:
        params = run_phase(name, config, mesh, workdir / name, params, teacher, console)
        results.measure(f"after {name}", lambda params=params: params, teacher, config)

    # ---- the table of results and a sample
    if table := results.table():
        console.print(table)
    if config.evaluation.sample:
        melt = for_inference(params, config.dtype)
        console.print(scoring.sample(melt, config), markup=False)
    return params


def run_phase(
    name: str,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    folder: Path,
    params: LoopedTransformer,
    teacher: LoopedTransformer | None,
    console: Console,
) -> LoopedTransformer:
    """Trains one phase to its end, from its newest checkpoint if it has one, and writes its model.

    Args:
      name: the phase's name.
      config: the run's config.
      mesh: the current mesh.
      folder: the phase's folder.
      params: float32 weights on the mesh from which the phase starts; donated.
      teacher: the frozen LoopLM; None in pretraining.
      console: where lines are printed.

    Returns:
      The trained weights, float32.

    Raises:
      NonFiniteError: the loss or a gradient was not finite in too many steps in a row, or in all steps of the phase.
      SystemExit: SIGTERM was received and a checkpoint was saved (status 75).
    """
    exit_if_preempted()
    phase = config.phase(name)
    first_step = sum(config.phase(earlier).steps for earlier in config.phases[: config.phases.index(name)])

    # ---- the state
    params = reconfigure(params, remat=config.remat, **config.computation)
    optimizer = make_optimizer(phase, config.optimizer, params)
    state = init_state(params, optimizer)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint_every, config.checkpoints_kept, console.print)
    start = checkpoints.latest() or 0
    if start:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state  # its memory is needed for the restored state
        state = checkpoints.restore(start, abstract)
        console.print(f"{name}: resumes from step {start}")

    # ---- step and data
    objective = OBJECTIVES[name](config)
    options = compiler_options(config.compiler_options, mesh.devices.flat[0].device_kind)
    train_step = make_train_step(objective, optimizer, config.micro_batches, config.dtype, config.gather, options)
    sharding, size = batch_sharding(mesh), config.data.batch
    indices = local_batch_indices(sharding, size)
    batches = stream.batches(config.data, config.seed, first_step + start, first_step + phase.steps, indices)

    # ---- the loop
    begin = PhaseStart(start, int(state.skipped), first_step)
    with StepMonitor(name, config, state.params.config, folder, begin, checkpoints, console) as monitor:
        for step, batch in monitor.enumerate(batches):
            batch = place_batch(batch, sharding, indices, size)
            with monitor.annotate(step, state):
                state, metrics = train_step(state, teacher, batch)
            last = monitor.after_dispatch(step, metrics, lambda params=state.params: not_finite_weights(params))
            if last or checkpoints.is_due(step):
                monitor.write_log()
            checkpoints.save(step, state, force=last)
            if last:
                break
        monitor.finish()
    checkpoints.close()
    if monitor.preempted:
        console.print(f"{name}: SIGTERM; step {int(state.step)} is saved; rerun the command to resume")
        sys.exit(PREEMPTED)

    # ---- the result
    if int(state.skipped) == phase.steps:
        raise NonFiniteError(
            f"{name}: expected a step with a finite loss and finite gradients, found none in {phase.steps} steps; no"
            " model is written; inspect teacher and data, or use a lower learning rate in another workdir"
        )
    with spent("saving"):
        save_model(folder / "model", state.params, config.tokenizer or config.teacher, chunk_size=config.chunk_size)
    _delete_checkpoints(name, config, folder)
    return state.params


def with_local_folders(config: TrainConfig) -> TrainConfig:
    """The config with the folders of teacher and tokenizer in place of models of the hub, which are downloaded."""
    folder = lambda text, files: str(hub.local_folder(text, files)) if text else ""
    teacher, tokenizer = folder(config.teacher, hub.MODEL), folder(config.tokenizer, hub.TOKENIZER)
    return dataclasses.replace(config, teacher=teacher, tokenizer=tokenizer)


def cast_copy(model: LoopedTransformer, dtype: str) -> LoopedTransformer:
    """The model in another dtype, with arrays of its own, which remain when those of `model` are donated."""
    return jax.jit(lambda model: jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), model))(model)


def make_student(looplm: LoopedTransformer, config: TrainConfig, key: jax.Array) -> LoopedTransformer:
    """The MELT that training starts from: the LoopLM's weights and new gates."""
    student = config.student
    melt = reconfigure(looplm, key, student.gate_std, **student.changes)
    if student.gate_bias == 0:
        return melt
    is_bias = lambda path: any(getattr(part, "name", None) == "b_z" for part in path)
    fill = lambda path, x: jnp.full_like(x, student.gate_bias) if is_bias(path) else x
    return jax.tree_util.tree_map_with_path(fill, melt)


def read_model(folder: Path, mesh: jax.sharding.Mesh) -> LoopedTransformer:
    """The model of a phase that has ended, float32, split over the mesh."""
    shardings = weight_shardings(abstract_model(open_folder(folder / "model").config), mesh)
    return open_model(folder / "model", dtype="float32", shardings=shardings)


def not_finite_weights(params: LoopedTransformer) -> list[str]:
    """The names of weights with NaN or infinity. Every process of a run must call it."""
    return [weight_name(path, layer) for path, layer in not_finite(dict(module_leaves(params)))]


def _reason(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename and error.strerror else str(error)


def _delete_checkpoints(name: str, config: TrainConfig, folder: Path) -> None:
    """Deletes a phase's checkpoints, except the last phase's, once its model is written.

    If the process is killed meanwhile, the next start deletes the rest.
    """
    if jax.process_index() == 0 and name != config.phases[-1]:
        remove_folder(folder / "checkpoints")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
