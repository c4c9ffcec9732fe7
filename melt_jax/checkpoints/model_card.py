"""The model card of an exported model: README.md with the hub's YAML front matter."""

import re
from collections.abc import Mapping
from typing import Any

from melt_jax.checkpoints.hub import PREFIX, repository
from melt_jax.checkpoints.orbax import open_folder
from melt_jax.files import PathLike, absolute, read_json
from melt_jax.model.cache import bytes_per_sequence, bytes_per_token
from melt_jax.model.model import abstract_model, parameter_count

LICENSE = "apache-2.0"  # of Ouro's weights
PAPERS = {
    "LoopLM": "[LoopLM](https://arxiv.org/abs/2510.25741), a looped transformer",
    "MELT": "[MELT](https://arxiv.org/abs/2605.07721), a looped transformer whose loops share one KV cache",
}
PHASE_KEYS = ("steps", "learning_rate", "gate_learning_rate", "beta", "reduction")  # of a phase, for the table


def model_card(
    folder: PathLike, name: str, source: str, base_model: str | None = None, license_name: str = LICENSE
) -> str:
    """The text of a model card.

    Args:
      folder: the exported model, in published form.
      name: of its repository, "org/name".
      source: the model that was exported, as the user named it. If it is the `model` folder of a phase, or the folder
        that launch/main_job.sh publishes, the card states the records of its run: teacher, recipe and measurements.
      base_model: name of the LoopLM on the hub; None: the run's teacher, if that is a model of the hub, or the one
        that config.json states as the model's origin.
      license_name: of the weights, as the hub spells it.

    Raises:
      InputError: the folder holds no model.
    """
    from huggingface_hub import ModelCardData

    opened = open_folder(folder)
    kind = "LoopLM" if opened.config.gate == "none" else "MELT"
    run, scores = ({}, {}) if repository(source) else run_records(source)
    teacher = run.get("teacher") if kind == "MELT" else None
    base_model = base_model or _hub_name(teacher) or _origin(opened.raw)
    data = ModelCardData(
        license=license_name,
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[kind.lower(), "looped-transformer", "melt_jax", "custom_code"],
    )
    rows = [*_model_rows(opened), ("licence", license_name)]
    if kind == "MELT":
        named = teacher.removeprefix(PREFIX) if teacher and _hub_name(teacher) else base_model or teacher
        rows = [("teacher", named or "not recorded"), *rows, *_recipe_rows(run), *_score_rows(scores)]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""---
{data.to_yaml().strip()}
---

# {name.rpartition("/")[2]}

{PAPERS[kind]}, written by melt_jax.

| | |
|---|---|
{table}

The folder carries its own PyTorch code for transformers 5:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
```
"""


def run_records(source: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config of the run, results of the model) of a model folder of a run; empty if they are missing.

    Args:
      source: the `model` folder of a phase, or the folder `melt` of a workdir: the last phase's model, published.

    Raises:
      InputError: a record is no JSON object.
    """
    folder = absolute(source)
    published = folder.name == "melt"
    workdir = folder.parent if published else folder.parent.parent
    files = (workdir / "config.json", workdir / "results.json")
    run, results = (read_json(file) if file.is_file() else {} for file in files)
    phases = run.get("phases") or [""]
    phase = phases[-1] if published else folder.parent.name
    if phase not in phases:
        return {}, {}
    return run, results.get(f"after {phase}") or {}


def _hub_name(text: str | None) -> str | None:
    found = repository(text) if text and text.startswith(PREFIX) else None
    return found.name if found else None


def _origin(raw: Mapping[str, Any]) -> str | None:
    name = raw.get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None


def _model_rows(opened) -> list[tuple[str, str]]:
    config, size = opened.config, 2
    rows = [
        ("parameters", f"{parameter_count(abstract_model(config)):,}, {opened.dtype or 'several dtypes'}"),
        ("loops", f"{config.loops}"),
        ("KV cache, bfloat16", f"{bytes_per_token(config, size):,} bytes per token"),
    ]
    if config.gate == "none":
        return rows
    chunk = opened.raw.get("chunk_size")
    fixed = bytes_per_sequence(config, size)
    return [
        *rows,
        ("gate", config.gate),
        ("window", f"{config.window} tokens" + (f", {fixed:,} bytes per sequence" if fixed else "")),
        ("chunk", f"{chunk} tokens, sweeps {config.sweeps}" if chunk else f"not recorded, sweeps {config.sweeps}"),
    ]


def _recipe_rows(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not run:
        return [("recipe", "not recorded")]
    data = run.get("data", {})
    rows = []
    for phase in run["phases"]:
        values = run.get(phase) or {}
        shown = ", ".join(f"{key} {values[key]}" for key in PHASE_KEYS if key in values)
        rows.append((f"recipe: {phase}", shown))
    shown = ", ".join(f"{key} {data[key]}" for key in ("source", "length", "batch") if key in data)
    return [*rows, ("recipe: data", shown), ("recipe: seed", str(run.get("seed")))]


def _score_rows(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    comparison = scores.get("comparison") or {}
    rows = []
    for label, key in (
        ("KL to the teacher, chunks as trained", "chunked"),
        ("KL to the teacher, decoding", "decoding"),
    ):
        part = comparison.get(key) or {}
        kl = part.get("final_kl")
        value = "not measured" if kl is None else f"{max(kl, 0.0):.4f} nats per token, {part.get('tokens'):,} tokens"
        rows.append((label, value))
    if scores.get("answers") is not None:
        rows.append(("exact answers", f"{scores['answers']:.1%} of {scores['problems']} problems"))
    return rows
