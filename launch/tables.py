"""Runs the experiments behind the tables of configs/README.md, and prints and draws the tables.

    python launch/tables.py --table=gates --workdir=runs/tables      trains what is missing, two runs at a time
    python launch/tables.py --table=all --workdir=runs/tables        every table, in order
    python launch/tables.py --print                                  prints and draws the recorded results

A table is a recipe, a list of overrides and a number of seeds (`TABLES` below). Each run is a `melt_jax.train` on one
core. Its overrides, seed and scores are a line of configs/results/TABLE.csv; runs with such a line are not repeated, so
the command can be stopped and repeated at any time. The exit status is 1 if a run failed. Run it in the repository's
folder with the Python of the virtual environment that launch/setup.sh creates.
"""

import concurrent.futures
import csv
import dataclasses
import io
import itertools
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.stats
from absl import flags
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # the repository is not installed as a package

from launch.sweep import run_command
from melt_jax import command_line
from melt_jax.analysis import figures
from melt_jax.config import GATES, InputError, freeze
from melt_jax.files import write_text

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "configs/results"
COLUMNS: tuple[str, ...] = (
    "row",
    "seed",
    "overrides",
    "answers_transition",
    "answers",
    "kl_chunk",
    "kl_same",
    "kl_decoding",
    "seconds",
)
HEADINGS = ("", "exact after transition", "exact answers", "KL, training chunk", "KL, decoding", "difference", "runs")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table.

    Attributes:
      title: what varies.
      rows: {label: overrides of the recipe, as one string}.
      config: the recipe.
      seeds: runs per row, with the seeds 0, 1, ….
    """

    title: str
    rows: dict[str, str]
    config: str = "configs/hard.py"
    seeds: int = 3

    def runs(self) -> list[tuple[str, int, str]]:
        """Every (row, seed, overrides), seed by seed, so that a stopped experiment has all rows."""
        return [(row, seed, self.rows[row]) for seed in range(self.seeds) for row in self.rows]


def chunk_rows(length: int) -> dict[str, str]:
    """Chunk × window × sweeps, without the sweeps that would change nothing."""
    rows = {}
    for chunk, window, sweeps in itertools.product((1, 4, 16, length), (0, 4, 16), (1, 2, 3)):
        if sweeps <= -(-chunk // (window + 1)):
            name = f"C {chunk if chunk < length else 'all'}, W {window}, s {sweeps}"
            rows[name] = f"chunk_size={chunk} student.window={window} student.sweeps={sweeps}"
    return rows


def recipe_parts(transition: int, alignment: int) -> dict[str, str]:
    """The whole recipe and less of it, in equally many steps."""
    one_phase = f"phases=alignment transition.steps={transition} alignment.steps={transition + alignment}"
    return {
        "full": f"transition.steps={transition} alignment.steps={alignment}",
        "no transition": one_phase,
        "no transition, β = 0": f"{one_phase} alignment.beta=0.0",
    }


ONE_PHASE = "transition.steps=160 alignment.steps=160"  # the steps of both phases
EXACT = "chunk_size=16 student.window=15"  # C = W + 1: training computes what decoding computes
WARM_START = (  # about as many FLOPs as 30 steps of the transition
    "phases=('warm_start','transition','alignment') warm_start.steps=60 warm_start.gate_learning_rate=0.01 "
    "warm_start.warmup_steps=0 transition.steps=30"
)
TABLES = {
    "default": Experiment("the embedded default", {"configs/nano.py": ""}, "configs/nano.py", 5),
    "gates": Experiment(
        "gate variants after a transition of 160 steps (the paper's Table 3)",
        {gate: f"student.gate={gate} phases=transition transition.steps=160" for gate in GATES[1:]},
        seeds=5,
    ),
    "gate_order": Experiment(
        "the two learned gates, with three times the steps, with an exact window, with both, and token by token",
        {
            f"{gate}, {name}": f"student.gate={gate} phases=transition {overrides}"
            for name, overrides in (
                ("480 steps", "transition.steps=480"),
                ("W = 15", f"{EXACT} transition.steps=160"),
                ("W = 15, 480 steps", f"{EXACT} transition.steps=480"),
                ("C = 1", "chunk_size=1 transition.steps=160"),
            )
            for gate in ("elementwise", "scalar")
        },
    ),
    "recipe": Experiment(
        "parts of the recipe removed, with 160 steps in all (the paper's Table 4)",
        {
            "full": "",
            "no alignment": f"phases=transition {ONE_PHASE}",
            "and no transition: α = 1": f"phases=alignment {ONE_PHASE} alignment.beta=0.0",
            "and the last loop's KL only": f"phases=alignment {ONE_PHASE} alignment.beta=0.0 distillation.loops=last",
            "and one chunk": f"phases=alignment {ONE_PHASE} alignment.beta=0.0 distillation.loops=last chunk_size=128",
            "no transition": f"phases=alignment {ONE_PHASE}",
            "the last loop's KL only": "distillation.loops=last",
            "one chunk": "chunk_size=128",
        },
    ),
    "recipe_order": Experiment(
        "the recipe without its parts, with three times the steps and with an exact window",
        {
            f"{part}, {name}": f"{overrides} {common}".strip()
            for name, common, steps in (("480 steps", "", (180, 300)), ("W = 15", EXACT, (60, 100)))
            for part, overrides in recipe_parts(*steps).items()
        },
    ),
    "chunks": Experiment("chunk C, window W and sweeps s", chunk_rows(128)),
    "questions": Experiment(
        "choices that the paper does not state",
        {
            "base: C = 16, W = 15": EXACT,
            "first loop gated": f"{EXACT} student.first_loop=gated",
            "gate bias −2 at the start": f"{EXACT} student.gate_bias=-2.0",
            "gate bias +2 at the start": f"{EXACT} student.gate_bias=2.0",
            "α is 1 after half of the transition": f"{EXACT} transition.ramp=0.5",
            "reverse KL": f"{EXACT} distillation.divergence=reverse",
            "60 steps of warm start for 30 of the transition": f"{EXACT} {WARM_START}",
            "gradients stop at chunks": f"{EXACT} distillation.gradient=chunk",
            **{
                f"alignment: {reduction}, β {beta}": f"{EXACT} alignment.reduction={reduction} alignment.beta={beta}"
                for reduction, betas in (("sum", (0.0, 0.001, 0.01, 0.1)), ("relative", (0.01, 0.1, 1.0)))
                for beta in betas
            },
        },
    ),
}


# ---- runs


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    """The recorded runs of a table; none if there is no such file."""
    if not path.exists():
        return []
    return list(csv.DictReader(io.StringIO(path.read_text())))


def write_csv(path: pathlib.Path, records: Iterable[dict[str, str]]) -> None:
    """Writes the recorded runs of a table, completely or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def missing_runs(experiment: Experiment, records: Sequence[dict[str, str]]) -> list[tuple[str, int, str]]:
    """The runs of a table without a record of the same row, seed and overrides."""
    done = {(record["row"], int(record["seed"]), record["overrides"]) for record in records}
    return [run for run in experiment.runs() if run not in done]


def check(experiment: Experiment) -> None:
    """Checks the configs of all rows.

    Raises:
      InputError: the errors of the first row whose config has any.
    """
    for row, overrides in experiment.rows.items():
        try:
            freeze(command_line.load_config(experiment.config, pairs(overrides)))
        except InputError as error:
            raise InputError(f"{row}: {error}") from error


def pairs(overrides: str) -> list[tuple[str, str]]:
    """[(key, value)] of "key=value key=value"."""
    return [tuple(word.split("=", 1)) for word in overrides.split()]  # type: ignore[misc]


def folder_name(row: str) -> str:
    """The name of a row's folder."""
    return re.sub(r"[^\w.−+-]+", "_", row).strip("_")


def train(experiment: Experiment, run: tuple[str, int, str], workdir: pathlib.Path) -> dict[str, str]:
    """Trains one run, or resumes it, and returns its record.

    Raises:
      subprocess.CalledProcessError: the run failed; its output is in the file `log` of its folder.
    """
    row, seed, overrides = run
    folder = workdir / folder_name(row) / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    fixed = [("seed", str(seed)), ("evaluation.baselines", "false")]
    command = run_command(experiment.config, folder, pairs(overrides) + fixed)
    start = time.monotonic()
    with (folder / "log").open("w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)
    seconds = f"{time.monotonic() - start:.0f}"
    scores = json.loads((folder / "results.json").read_text())
    transition = scores.get("after transition")
    last = scores.get("after alignment", transition)
    comparison = last["comparison"]
    kl = {name: f"{comparison[key]['final_kl']:.6f}" for name, key in
          (("kl_chunk", "chunked"), ("kl_same", "chunked_start"), ("kl_decoding", "decoding"))}  # fmt: skip
    answers = {
        "answers_transition": "" if transition is None else f"{transition['answers']:.6f}",
        "answers": f"{last['answers']:.6f}",
    }
    return {"row": row, "seed": str(seed), "overrides": overrides, **answers, **kl, "seconds": seconds}


def run_experiment(name: str, workdir: pathlib.Path, at_once: int) -> int:
    """Trains the missing runs of a table and records each as soon as it ends; returns the number that failed.

    Args:
      name: a key of `TABLES`.
      workdir: folder of the runs' folders.
      at_once: runs that train at the same time, each on a core of its own.
    """
    experiment, path, failed, lock = TABLES[name], RESULTS / f"{name}.csv", 0, threading.Lock()
    records = read_csv(path)
    todo = missing_runs(experiment, records)
    print(f"{name}: {len(todo)} of {len(experiment.runs())} runs to train", flush=True)
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), at_once):
        cores.put(core)

    def work(run):
        nonlocal failed
        try:
            record = train(experiment, run, workdir / name)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"failed with status {error.returncode}: {run}; see log in its folder", flush=True)
            return
        with lock:
            records.append(record)
            write_csv(path, records)
        print(", ".join(f"{key} {value}" for key, value in record.items()), flush=True)

    # The affinity of a thread passes to the processes that it starts.
    pin = lambda: os.sched_setaffinity(0, {cores.get()})
    with concurrent.futures.ThreadPoolExecutor(at_once, initializer=pin) as pool:
        list(pool.map(work, todo))
    return failed


# ---- tables and figures


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of the 95% confidence interval by the t distribution; nan for one value)."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, float("nan")
    return mean, float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)


def numbers(records: Sequence[dict[str, str]], column: str) -> list[float]:
    """A column of some records as numbers; "difference" is the KL in decoding minus that with the training chunk."""
    if column == "difference":
        return [float(record["kl_decoding"]) - float(record["kl_same"]) for record in records]
    return [float(record[column]) for record in records if record[column]]


def current(experiment: Experiment, records: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """{row: its records}, of runs that the experiment still has, in the experiment's order."""
    wanted = set(experiment.runs())
    kept = [r for r in records if (r["row"], int(r["seed"]), r["overrides"]) in wanted]
    return {row: found for row in experiment.rows if (found := [r for r in kept if r["row"] == row])}


def markdown(experiment: Experiment, records: Sequence[dict[str, str]]) -> str:
    """The table: means and 95% confidence intervals over seeds."""

    def cell(found, column, form):
        values = numbers(found, column)
        if not values:
            return "–"
        mean, half = interval(values)
        return form(mean) if np.isnan(half) else f"{form(mean)} ± {form(half)}"

    percent, nats = lambda x: f"{100 * x:.1f}", lambda x: f"{round(x, 5) + 0.0:.5f}"  # no -0.00000
    columns = [("answers_transition", percent), ("answers", percent)]
    columns += [("kl_chunk", nats), ("kl_decoding", nats), ("difference", nats)]
    lines = [" | ".join(("", *HEADINGS, "")).strip(), "|---" * len(HEADINGS) + "|"]
    for row, found in current(experiment, records).items():
        cells = [cell(found, column, form) for column, form in columns]
        lines.append(f"| {' | '.join([row, *cells, str(len(found))])} |")
    return "\n".join(lines)


def draw(experiment: Experiment, records: Sequence[dict[str, str]]) -> Figure:
    """Exact answers and KL of each row, with 95% confidence intervals."""
    rows = current(experiment, records)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    curves = ((left, "answers", 100, "exact answers"), (right, "kl_chunk", 1, "training chunk"),
              (right, "kl_decoding", 1, "decoding"))  # fmt: skip
    for axes, column, factor, label in curves:
        means, halves = np.array([interval(numbers(found, column)) for found in rows.values()]).T * factor
        axes.errorbar(means, places, xerr=np.nan_to_num(halves), fmt="o", capsize=3, label=label)
    left.set(yticks=places, yticklabels=list(rows), xlabel="exact answers, %", title=experiment.title)
    right.set(xlabel="KL(teacher ‖ student), nats per token", xscale="log")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def print_tables(names: Sequence[str]) -> None:
    """Prints the recorded tables as markdown and draws each into configs/results/TABLE.png."""
    for name in names:
        experiment = TABLES[name]
        rows = current(experiment, read_csv(RESULTS / f"{name}.csv"))
        records = list(itertools.chain.from_iterable(rows.values()))
        if not records:
            continue
        seconds = sum(numbers(records, "seconds"))
        print(f"{experiment.title}: {len(records)} of {len(experiment.runs())} runs, {seconds / 3600:.1f} core hours\n")
        print(markdown(experiment, records), end="\n\n")
        figures.save(draw(experiment, records), RESULTS / f"{name}.png")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_enum("table", "all", ["all", *TABLES], "The table.")
    flags.DEFINE_string("workdir", None, "Folder of the runs' folders.")
    flags.DEFINE_integer("at_once", 2, "Runs that train at the same time, each on one core.", lower_bound=1)
    flags.DEFINE_bool("print", False, "Print and draw the recorded results only.")


def main(argv: list[str]) -> None:
    """Trains what is missing, then prints and draws."""
    del argv
    options, failed = flags.FLAGS, 0
    names = list(TABLES) if options.table == "all" else [options.table]
    if not options["print"].value:
        if not options.workdir:
            raise InputError("--workdir: expected the folder of the runs, found none; --print needs none")
        for name in names:
            check(TABLES[name])
        failed = sum(run_experiment(name, pathlib.Path(options.workdir), options.at_once) for name in names)
    print_tables(names)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
