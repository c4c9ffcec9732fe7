"""Small runs of `melt_jax.train` that are interrupted, and what is compared of two runs.

A program that calls `start` must not use JAX itself: commands run in forks of it (`tests.helpers.run_commands`).
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from melt_jax import train
from melt_jax.checkpoints.orbax import open_model, save_model
from melt_jax.training.checkpoints import flatten
from tests.helpers.run_commands import Fork, in_fork, start_command
from tests.helpers.tiny import TINY, make_model
from tests.helpers.xla_flags import QUICK

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = {"transition": 7, "alignment": 8}  # steps
TIMES = re.compile("seconds|tokens_per_second|goodput|mfu|memory")  # numbers of a log that depend on the machine
OVERRIDES = {
    "data.length": 32,
    "data.batch": 4,
    "data.high": 2,
    "chunk_size": 8,
    "student.window": 0,
    "log_every": 1,
    "checkpoint_every": 3,
    "evaluation.problems": 0,
    "evaluation.sequences": 2,
    "evaluation.decoding_tokens": 0,
    "evaluation.baselines": False,
    "evaluation.sample": False,
    **{f"{phase}.steps": steps for phase, steps in PHASES.items()},
    **{f"{phase}.warmup_steps": 1 for phase in PHASES},
}


def prepare(folder: pathlib.Path, anew: bool = False) -> None:
    """Prepares a folder for small runs: FOLDER/teacher is a random LoopLM, FOLDER/jax JAX's cache of programs.

    Args:
      folder: created if it is missing.
      anew: remove what is in it.
    """
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.update({name: os.environ.get(name, value) for name, value in cache.items()})
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if (folder / "teacher").exists():
        return
    tiny = dataclasses.replace(TINY, vocab=64, gate="none")
    in_fork(lambda: save_model(folder / "teacher", make_model(tiny), ROOT / "melt_jax/assets/ouro_nano") and None)


def start(
    workdir: pathlib.Path, processes: int = 1, devices: int = 1, joined: bool = False, **changes: Any
) -> list[Fork]:
    """Starts a small run, whose teacher is beside its workdir, and returns its processes.

    Args:
      workdir: its folder; process i appends its output to WORKDIR.i.log.
      processes: their number; several join through `jax.distributed`.
      devices: of each process.
      joined: a single process uses `jax.distributed` too, so that it adds numbers in the same order as several.
      changes: config keys, with __ for each dot.
    """
    arguments = arguments_of(workdir, **{"mesh__fsdp": processes * devices} | changes)
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}"}
    joined |= processes > 1
    variables |= {"MELT_COORDINATOR": f"127.0.0.1:{_free_port()}" if joined else ""}
    variables |= {"MELT_PROCESSES": str(processes)}
    return [
        start_command(
            train.__name__,
            arguments,
            log_of(workdir, i),
            variables | {"MELT_PROCESS": str(i) if joined else ""},
        )
        for i in range(processes)
    ]


def arguments_of(workdir: pathlib.Path, **changes: Any) -> list[str]:
    """The arguments of `melt_jax.train` for a small run, whose teacher is beside its workdir.

    Args:
      workdir: its folder.
      changes: config keys, with __ for each dot.
    """
    overrides = OVERRIDES | {"teacher": workdir.parent / "teacher"}
    overrides |= {key.replace("__", "."): value for key, value in changes.items()}
    arguments = [f"--config={ROOT}/configs/nano.py", f"--workdir={workdir}"]
    return arguments + [f"--config.{key}={value}" for key, value in overrides.items()]


def log_of(workdir: pathlib.Path, process: int = 0) -> pathlib.Path:
    """The file with the output of a process of a small run."""
    return workdir.with_name(f"{workdir.name}.{process}.log")


def contents(workdir: pathlib.Path, phases: dict[str, int] = PHASES) -> dict[str, Any]:
    """What equal runs have equal: {name: array, or number of a line of a log, or row of results}."""
    out: dict[str, Any] = dict(in_fork(leaves, workdir, phases))
    for phase in phases:
        for number, line in enumerate(log_lines(workdir, phase)):
            out |= {f"{phase}.metrics.jsonl:{number + 1} {key}": value for key, value in line.items()}
    return out | {f"results.json {name}": row for name, row in scores(workdir).items()}


def log_lines(workdir: pathlib.Path, phase: str) -> list[dict[str, Any]]:
    """The lines of a phase's log, without times."""
    lines = [json.loads(line) for line in (workdir / phase / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not TIMES.search(key)} for line in lines]


def scores(workdir: pathlib.Path) -> dict[str, Any]:
    """The rows of a run's results; empty if it measured nothing."""
    path = workdir / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def last_step(workdir: pathlib.Path, phase: str) -> int:
    """The last step in a phase's log; 0 if there is none."""
    path = workdir / phase / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def read_checkpoint(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """{name: NumPy array} of a checkpoint that any devices may have written."""
    reader = ocp.PyTreeCheckpointer()
    stored = reader.metadata(folder).item_metadata.tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    return reader.restore(folder, restore_args=on_host)


def leaves(workdir: pathlib.Path, phases: dict[str, int] = PHASES) -> dict[str, np.ndarray]:
    """{name: array} of every phase's model and the last phase's last checkpoint; `phases`: {name: steps}."""
    out = {}
    for phase, steps in phases.items():
        if phase == list(phases)[-1]:  # earlier phases' checkpoints are deleted
            state = read_checkpoint(workdir / phase / "checkpoints" / str(steps) / "default")
            out |= {f"{phase}.checkpoint.{name}": leaf for name, leaf in state.items()}
        model = open_model(workdir / phase / "model", dtype="float32")
        out |= {f"{phase}.model.{name}": np.asarray(leaf) for name, leaf in flatten(model).items()}
    return out


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of values that are missing on one side or not bitwise equal."""

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, np.ndarray):
            return json.dumps(a) == json.dumps(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return sorted(found.keys() ^ wanted.keys()) + [
        name for name in sorted(found.keys() & wanted.keys()) if not same(found[name], wanted[name])
    ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
