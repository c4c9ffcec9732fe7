"""The config.json of a run: a run resumes only with the config, teacher and data that it started with."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from melt_jax.checkpoints import hub
from melt_jax.checkpoints.orbax import weights_digest
from melt_jax.config import ConfigError, TrainConfig
from melt_jax.data import stream
from melt_jax.files import Path, make_folder, read_json, write_text
from melt_jax.training.processes import run_outside, text_from_process_0

# May change when a run is resumed: evaluation, monitoring, and where and how steps run. The teacher may move, too.
RESUMABLE_KEYS = {
    *("run", "log_every", "checkpoint_every", "checkpoints_kept", "evaluation"),
    *("mesh", "gather", "compiler_options", "micro_batches", "remat", "attention", "attention_block", "unroll"),
    "teacher",
}


def keep_config(config: TrainConfig, workdir: Path) -> None:
    """Writes the config to the workdir, or compares it with the config of the run already there.

    The teacher is compared by the digest of its weights, prepared data by its manifest's, and a token file by its own.
    Process 0 computes them at every start, in a second or two per GB.

    Raises:
      ConfigError: in every process: a key that is not in `RESUMABLE_KEYS`, the teacher or the data has changed.
      InputError: in every process: the teacher cannot be read.
    """
    if error := text_from_process_0(_config_error, config, workdir):
        raise ConfigError(error)


def _config_error(config: TrainConfig, workdir: Path) -> str:
    """Writes the config to the workdir; returns an error instead if the run there has another config."""
    path, new = workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if "pretraining" not in config.phases:
        new["teacher weights"] = f"sha256 {run_outside(weights_digest, hub.local_folder(config.teacher))}"
    data = stream.fingerprint(config.data.source, config.data.path)
    for part, digest in data.items():
        new[f"{part} of data.path"] = f"sha256 {digest}"
    old = read_json(path) if path.exists() else new
    before, now = (
        dict(_flatten({key: value for key, value in values.items() if key not in RESUMABLE_KEYS}))
        for values in (old, new)
    )
    moved = {"data.path"} if data else set()  # compared by its contents
    changed = [key for key in sorted({*before, *now} - moved) if before.get(key) != now.get(key)]
    if changed:
        lines = [f"  - {key}: expected {before.get(key)}, found {now.get(key)}" for key in changed]
        return f"{workdir} holds a run with another config, teacher or data; use another workdir:\n" + "\n".join(lines)
    make_folder(workdir)
    write_text(path, json.dumps(new, indent=1, sort_keys=True))
    return ""


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of a dotted key and its value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
