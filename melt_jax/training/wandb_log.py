"""The log of a run in Weights & Biases, an optional package: metrics, configuration and git commit.

`run.wandb` names the project. All attempts of a workdir write to one W&B run; `wandb.json` in the workdir has its id.
Only process 0 writes. `WANDB_MODE=offline` keeps everything in the workdir, for `wandb sync`; if the workdir is in a
bucket, in `wandb/` of the current folder.
"""

import contextlib
import dataclasses
import importlib.util
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from melt_jax.config import InputError, TrainConfig
from melt_jax.files import Path, in_bucket, write_text
from melt_jax.training.attempts import git_commit

_run: Any = None  # of this process


@contextlib.contextmanager
def wandb_run(config: TrainConfig, workdir: Path) -> Iterator[None]:
    """Opens the run's W&B log for the block if `run.wandb` names a project.

    Raises:
      InputError: in every process: the package is missing, or W&B cannot be used; the latter in process 0.
    """
    global _run
    if not config.run.wandb:
        yield
        return
    if importlib.util.find_spec("wandb") is None:
        raise InputError(
            "run.wandb: expected the package wandb, found none; run pip install -e '.[wandb]' in the repository, or set"
            " run.wandb to ''"
        )
    if jax.process_index() > 0:
        yield
        return
    _run, status = _open(config, workdir), 1
    try:
        yield
        status = 0
    except SystemExit:
        status = 0  # preempted: the run resumes
        raise
    finally:
        run, _run = _run, None
        run.finish(exit_code=status)


def write(phase: str, step: int, numbers: Mapping[str, float]) -> None:
    """Queues the numbers of an interval of steps, under the names that TensorBoard has; returns at once."""
    if _run is not None:
        _run.log({f"{phase}/step": step} | {f"{phase}/{name}": number for name, number in numbers.items()})


def _open(config: TrainConfig, workdir: Path) -> Any:
    import wandb

    entity, _, project = config.run.wandb.rpartition("/")
    path = workdir / "wandb.json"
    if not path.exists():
        write_text(path, json.dumps({"id": secrets.token_hex(4)}))
    try:
        run = wandb.init(
            entity=entity or None,
            project=project,
            id=json.loads(path.read_text())["id"],
            resume="allow",
            name=workdir.name,
            dir=None if in_bucket(workdir) else str(workdir),
            config=dataclasses.asdict(config) | {"git_commit": git_commit(), "workdir": str(workdir)},
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        raise InputError(f"run.wandb: expected access to W&B, found {error}; set WANDB_MODE=offline") from error
    for phase in config.phases:
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    return run
