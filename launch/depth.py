"""Answers of trained MELTs and of their teacher with other numbers of loops than in training: a table and a figure.

    python launch/depth.py --runs='runs/tables/questions/base_C_16_W_15/seed_*'    evaluates what is missing
    python launch/depth.py                                                         prints and draws the records

Each run is a workdir of `melt_jax.train` on the arithmetic task; their configs differ in the seed only. They and their
teacher answer the problems of the runs' evaluation with 1 to 8 loops. Each score is a line of
configs/results/depth.csv, with a digest of the config. Run it in the repository's folder with the Python of the virtual
environment that launch/setup.sh creates.
"""

import csv
import glob
import hashlib
import io
import json
import pathlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # the repository is not installed as a package

from launch.tables import RESULTS, interval
from melt_jax import command_line
from melt_jax.analysis import figures
from melt_jax.config import InputError
from melt_jax.files import read_json, write_text
from melt_jax.inference.answers import exact_answers, fresh_problems
from melt_jax.inference.loading import ModelChanges, open_for_inference
from melt_jax.model.model import reconfigure

MODEL = "alignment/model"  # of a workdir
LOOPS = range(1, 9)
COLUMNS = ("config", "model", "seed", "loops", "answers")
Records = dict[tuple[str, str, int, int], float]  # (config, model, seed, loops): fraction of exact answers


def read(path: pathlib.Path) -> Records:
    """The recorded scores; none if there is no such file."""
    if not path.exists():
        return {}
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return {(r["config"], r["model"], int(r["seed"]), int(r["loops"])): float(r["answers"]) for r in rows}


def write(path: pathlib.Path, records: Records) -> None:
    """Writes all scores, completely or not at all."""
    lines = [",".join(COLUMNS)]
    lines += [f"{config},{model},{seed},{loops},{score:.6f}" for (config, model, seed, loops), score in records.items()]
    write_text(path, "\n".join(lines) + "\n")


def read_runs(folders: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """The config of each run.

    Raises:
      InputError: a folder is no finished run of the arithmetic task, or two runs do not differ in the seed only.
    """
    configs = []
    for folder in folders:
        if not (folder / MODEL).exists():
            raise InputError(f"{folder}: expected the workdir of a run whose alignment has ended, found no {MODEL}")
        config = read_json(folder / "config.json")
        if config["data"]["source"] != "arithmetic":
            raise InputError(f"{folder}: expected data.source arithmetic, found {config['data']['source']}")
        configs.append(config)
        if config | {"seed": 0} != configs[0] | {"seed": 0}:
            raise InputError(f"{folder}: expected the config of {folders[0]} but for the seed; match fewer runs")
    if len({config["seed"] for config in configs}) < len(configs):
        raise InputError("--runs: expected one run per seed, found several; match fewer runs")
    return configs


def evaluate(folders: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Adds the scores that are missing, each as soon as it is known.

    Raises:
      InputError: see `read_runs`; or the file has scores of other runs.
    """
    records, configs = read(path), read_runs(folders)
    same = json.dumps(configs[0] | {"seed": 0}, sort_keys=True)
    digest = hashlib.sha256(same.encode()).hexdigest()[:12]
    if others := {config for config, *_ in records} - {digest}:
        raise InputError(
            f"{path}: expected scores of runs with the config {digest}, found {others.pop()}; move it away"
        )
    models = [("teacher", 0, configs[0]["teacher"])]
    models += [("MELT", config["seed"], folder / MODEL) for folder, config in zip(folders, configs)]
    data, evaluation = configs[0]["data"], configs[0]["evaluation"]
    problems = fresh_problems(evaluation["seed"], evaluation["problems"], data["low"], data["high"], data["hops"])
    for name, seed, checkpoint in models:
        model = open_for_inference(checkpoint, ModelChanges())
        for loops in LOOPS:
            if (key := (digest, name, seed, loops)) not in records:
                answers = exact_answers(reconfigure(model, loops=loops), problems, configs[0]["chunk_size"])
                records[key] = float(answers.answer_exact.mean())
                write(path, records)
                print(f"{name}, seed {seed}, {loops} loops: {records[key]:.1%}", flush=True)


def scores_by_loops(records: Records) -> dict[str, dict[int, list[float]]]:
    """{model: {loops: its scores over seeds}}."""
    scores: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, model, _, loops), score in records.items():
        scores[model][loops].append(score)
    return scores


def markdown(scores: Mapping[str, Mapping[int, Sequence[float]]]) -> str:
    """The table: percentages, with 95% confidence intervals where there are several seeds."""
    lines = [f"| loops | {' | '.join(map(str, LOOPS))} |", "|---" * (len(LOOPS) + 1) + "|"]
    for model, by_loops in scores.items():
        cells = []
        for loops in LOOPS:
            mean, half = interval(by_loops[loops]) if loops in by_loops else (np.nan, np.nan)
            cells.append(f"{100 * mean:.1f}" if np.isnan(half) else f"{100 * mean:.1f} ± {100 * half:.1f}")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(scores: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Exact answers over the number of loops."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for model, by_loops in scores.items():
        means, halves = np.array([interval(values) for values in by_loops.values()]).T * 100
        axes.errorbar(list(by_loops), means, yerr=np.nan_to_num(halves), marker="o", capsize=3, label=model)
    axes.set(xlabel="loops", ylabel="exact answers, %", ylim=(0, 103))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(argv: list[str]) -> None:
    """Evaluates what is missing, then prints and draws."""
    del argv
    path = RESULTS / "depth.csv"
    if pattern := flags.FLAGS.runs:
        folders = sorted(map(pathlib.Path, glob.glob(pattern)))
        if not folders:
            raise InputError(f"--runs: expected a pattern of workdirs, found none that matches {pattern}")
        evaluate(folders, path)
    scores = scores_by_loops(read(path))
    if not scores:
        raise InputError(f"{path}: expected recorded scores, found none; give --runs")
    print(markdown(scores))
    figures.save(draw(scores), RESULTS / "depth.png")


if __name__ == "__main__":
    flags.DEFINE_string("runs", None, "Pattern of the workdirs of finished runs.")
    command_line.run(main)
