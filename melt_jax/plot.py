"""Draws the curves of a run from its logs, all phases on one axis of steps, or compares several runs.

    python -m melt_jax.plot --workdir=runs/nano --output=curves.png
    python -m melt_jax.plot --workdir=runs/nano --output=gates.png --gates
    python -m melt_jax.plot --workdir=runs/nano --workdir=runs/wide --output=both.png

A distillation (MELT, arXiv 2605.07721) has curves of the KL to the teacher, the attention alignment, the gate openness
with the transition's α, and the gradient norms; pretraining (Ouro, arXiv 2510.25741) has cross-entropy and exit
probabilities instead. An unfinished run is drawn up to its last logged step. --gates draws the gate openness of every
loop and layer at the last logged step of each phase instead. Several workdirs are drawn into one figure, a color for
each, with the last loop alone; the command also prints the config keys in which the runs differ. A point is the mean of
the steps since the point before. Logarithmic axes end four decades below their largest value.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from melt_jax import command_line
from melt_jax.analysis import figures
from melt_jax.config import InputError
from melt_jax.files import Path, PathLike, absolute, as_path, parse_json, read_json

GRAY = "0.55"
DECADES = 4  # of a logarithmic axis: at the start of a transition the KL is zero up to rounding
GROUP_COLORS = {"backbone": "0.25", "gate": "tab:red", "alpha": GRAY}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
      title: quantity and unit.
      metrics: names in the log; each loop (`kd/loop1`) is a curve, layers are averaged.
      log: whether the vertical axis is logarithmic.
      limits: of the vertical axis; None: automatic.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("KL(teacher ‖ student), nats per token", ("kd",), log=True),
    Panel("cross-entropy, nats per token", ("cross_entropy",), log=True),
    Panel("gate openness, mean of 1 − z; dashed: α", ("gate_openness", "alpha"), limits=(-0.03, 1.03)),
    Panel("exit probability", ("exit_probability",), limits=(-0.03, 1.03)),
    Panel("attention alignment, scaled as alignment.reduction says", ("alignment",), log=True),
    Panel("exit entropy, nats", ("exit_entropy",)),
    Panel("gradient norm before clipping", ("gradient_norm",), log=True),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The logged metrics of a run.

    Attributes:
      phases: {name: (first step, last step)}, counted from the run's start; planned phases are included.
      curves: {metric: {curve: (steps, values)}}; curve is "loop1" …, "backbone", "gate", or the metric's own name.
    """

    phases: dict[str, tuple[int, int]]
    curves: dict[str, dict[str, tuple[list[int], list[float]]]]


def read_run(workdir: PathLike) -> Run:
    """Reads the config and the logs in a run's workdir.

    Raises:
      InputError: the folder holds no run, or nothing has been logged yet.
    """
    workdir, config = as_path(workdir, "--workdir"), read_config(workdir)
    phases, curves, start = {}, {}, 0
    for name in config["phases"]:
        phases[name] = (start, start + config[name]["steps"])
        for record in read_log(workdir / name / "metrics.jsonl"):
            for (metric, curve), value in average_layers(record).items():
                steps, values = curves.setdefault(metric, {}).setdefault(curve, ([], []))
                steps.append(start + record["step"])
                values.append(value)
        start = phases[name][1]
    if not curves:
        logs = ", ".join(f"{name}/metrics.jsonl" for name in phases)
        raise InputError(f"{workdir}: expected lines in {logs}, found none; wait until the run has logged a step")
    return Run(phases, curves)


def read_config(workdir: PathLike) -> dict[str, Any]:
    """The config of the run in a workdir; raises InputError if the folder holds no run."""
    file = as_path(workdir, "--workdir") / "config.json"
    if not file.is_file():
        raise InputError(f"{workdir}: expected the workdir of a run of melt_jax.train, found no config.json")
    config = read_json(file)
    phases = config.get("phases")
    for name in phases if isinstance(phases, list) else [phases]:
        phase = config.get(name) if isinstance(name, str) else None
        if not (isinstance(phase, dict) and isinstance(phase.get("steps"), int)):
            raise InputError(f"{file}: expected the config of a run of melt_jax.train, found phases {phases!r:.60}")
    return config


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`, without an incomplete last line; none if there is no such file."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), 1):
        record = parse_json(line, f"{path}:{number}")
        numbers = [value for name, value in record.items() if name != "phase"]
        if not isinstance(record.get("step"), int) or not all(isinstance(value, (int, float)) for value in numbers):
            raise InputError(f"{path}:{number}: expected numbers and a step, found {record!r:.100}; remove the line")
        records.append(record)
    return records


def average_layers(record: dict[str, float]) -> dict[tuple[str, str], float]:
    """{(metric, curve): value} of a record; the mean of `a/loop2/layer1`, `a/loop2/layer2`, … is ("a", "loop2")."""
    found = collections.defaultdict(list)
    for name, value in record.items():
        if name not in ("phase", "step"):
            metric, _, curve = re.sub(r"/layer\d+$", "", name).partition("/")
            found[metric, curve or metric].append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def draw(run: Run) -> Figure:
    """The curves of a run as a matplotlib figure: one panel for each of `PANELS` whose metrics were logged.

    Raises:
      InputError: no panel has logged metrics.
    """
    panels = [panel for panel in PANELS if any(metric in run.curves for metric in panel.metrics)]
    if not panels:
        known = ", ".join(metric for panel in PANELS for metric in panel.metrics)
        raise InputError(f"metrics.jsonl: expected some of {known}, found {', '.join(sorted(run.curves))}")
    figure, grid = panel_grid(len(panels))
    colors = curve_colors(run)
    handles = {}
    for axes, panel in zip(grid, panels):
        for metric in panel.metrics:
            for name, (steps, values) in sorted(run.curves.get(metric, {}).items(), key=lambda item: natural(item[0])):
                style: dict[str, Any] = (
                    {"linestyle": "--", "linewidth": 1.2} if metric == "alpha" else {"linewidth": 1.6}
                )
                color = colors.get(name, "tab:blue")
                (handles[name],) = axes.plot(steps, values, color=color, label=name, **style)
        dress(axes, panel, run.phases)
    labels = {"backbone": "backbone weights", "gate": "gates", "alpha": "α"}
    shown = {name: handles[name] for name in colors if name in handles}
    figure.legend(
        list(shown.values()),
        [labels.get(name, name.replace("loop", "loop ")) for name in shown],
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
    )
    return figure


def panel_grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with that many axes, two in a row, over a common axis of steps."""
    grid_rows = -(-count // 2)
    figure = Figure(figsize=(10, 0.7 + 2.5 * grid_rows), layout="constrained")
    grid = list(figure.subplots(grid_rows, 2, sharex=True, squeeze=False).ravel())
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[max(count - 2, 0) : count]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def draw_comparison(runs: dict[str, Run]) -> Figure:
    """The curves of several runs in one figure, a color for each: the last loop, and the backbone's gradient norm.

    Args:
      runs: {label: run}; lines at the phases' boundaries have the run's color.

    Raises:
      InputError: no panel has logged metrics.
    """
    shown = {label: {metric: comparison_curve(run, metric) for metric in run.curves} for label, run in runs.items()}
    panels = [panel for panel in PANELS if any(panel.metrics[0] in curves for curves in shown.values())]
    if not panels:
        known = ", ".join(panel.metrics[0] for panel in PANELS)
        raise InputError(f"metrics.jsonl: expected some of {known} in one of the runs, found none")
    figure, grid = panel_grid(len(panels))
    colors = {label: matplotlib.colormaps["tab10"](i % 10) for i, label in enumerate(runs)}
    for axes, panel in zip(grid, panels):
        for label, curves in shown.items():
            if curve := curves.get(panel.metrics[0]):
                steps, values = curve
                axes.plot(steps, values, color=colors[label], label=label, linewidth=1.6)
        dress(axes, panel, {"": (0, max(stop for run in runs.values() for _, stop in run.phases.values()))})
        for label, run in runs.items():
            for start, _ in run.phases.values():
                if start:
                    axes.axvline(start, color=colors[label], linewidth=1, alpha=0.5)
    handles = [Line2D([], [], color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    return figure


def comparison_curve(run: Run, metric: str) -> tuple[list[int], list[float]]:
    """The one curve of a metric that comparisons show: the last loop's, the backbone's, or the only one."""
    curves = run.curves[metric]
    loops = sorted((name for name in curves if re.fullmatch(r"loop\d+", name)), key=natural)
    return curves[loops[-1] if loops else "backbone" if "backbone" in curves else next(iter(curves))]


def run_labels(workdirs: Sequence[str]) -> dict[str, str]:
    """{label: workdir}: the last parts of the paths, as many as tell the runs apart.

    Raises:
      InputError: a workdir is given twice.
    """
    parts = [absolute(workdir).parts for workdir in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, workdirs))
    raise InputError(f"--workdir: expected different folders, found {', '.join(workdirs)}")


def config_differences(configs: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each config key whose value is not the same in all runs: the key and the values in their order."""
    flat = [flatten(config) for config in configs]
    lines = []
    for key in sorted(set().union(*flat)):
        values = [str(values.get(key, "none")) for values in flat]
        if len(set(values)) > 1:
            lines.append(f"{key}: {', '.join(values)}")
    return lines


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested dictionaries."""
    out = {}
    for key, value in values.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def curve_colors(run: Run) -> dict[str, Any]:
    """{curve: color}, the same in all panels, in the order of the legend."""
    names = {name for curves in run.curves.values() for name in curves if re.fullmatch(r"loop\d+", name)}
    loops, shades = sorted(names, key=natural), matplotlib.colormaps["viridis_r"]
    return {name: shades(0.12 + 0.82 * i / max(len(loops) - 1, 1)) for i, name in enumerate(loops)} | GROUP_COLORS


def dress(axes: Axes, panel: Panel, phases: dict[str, tuple[int, int]]) -> None:
    """Adds title, scales, phase boundaries, and the phases' names at the bottom."""
    axes.set_title(panel.title, fontsize=10, loc="left")
    if panel.log:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        bottom = max(bottom, top / 10**DECADES)
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 100 * bottom else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    if panel.limits:
        axes.set_ylim(panel.limits)
    axes.set_xlim(0, max(stop for _, stop in phases.values()))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for name, (start, stop) in phases.items():
        if start:
            axes.axvline(start, color=GRAY, linewidth=1)
        if len(phases) > 1:
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text((start + stop) / 2, 0.02, name, color=GRAY, fontsize=9, **place)


def natural(name: str) -> list[int | str]:
    """A sort key that puts loop10 after loop2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def read_gates(workdir: PathLike) -> dict[str, np.ndarray]:
    """{phase, with its last logged step: gate openness [T, L]} of the run in a workdir.

    Raises:
      InputError: the folder holds no run, or no gate openness has been logged.
    """
    gates = {}
    for name in read_config(workdir)["phases"]:
        for record in read_log(as_path(workdir) / name / "metrics.jsonl")[-1:]:
            values = {
                (int(match[1]), int(match[2])): value
                for key, value in record.items()
                if (match := re.fullmatch(r"gate_openness/loop(\d+)/layer(\d+)", key))
            }
            if values:
                openness = np.full(max(values), np.nan)
                for (loop, layer), value in values.items():
                    openness[loop - 1, layer - 1] = value
                gates[f"{name}, step {record['step']}"] = openness
    if not gates:
        raise InputError(f"{workdir}: expected gate_openness in the logs, found none; a LoopLM has no gates")
    return gates


def draw_gates(gates: dict[str, np.ndarray]) -> Figure:
    """A heat map for each entry of `read_gates`: rows are loops, columns layers; with values if the layers are few."""
    few = max(openness.shape[1] for openness in gates.values()) <= 12
    grid = (1, len(gates)) if few else (len(gates), 1)
    figure = Figure(figsize=(10, 0.8 + 2.2 * grid[0]), layout="constrained")
    panels = figure.subplots(*grid, squeeze=False).ravel()
    for axes, (title, openness) in zip(panels, gates.items()):
        loops, layers = openness.shape
        image = axes.imshow(
            openness, vmin=0, vmax=1, aspect="auto", origin="lower", extent=(0.5, layers + 0.5, 0.5, loops + 0.5)
        )
        axes.set(
            xlabel="layer", ylabel="loop", yticks=range(1, loops + 1), xticks=range(1, layers + 1, -(-layers // 24))
        )
        axes.set_title(title, fontsize=10, loc="left")
        for (loop, layer), value in np.ndenumerate(openness) if few else ():
            color = "black" if value > 0.6 else "white"
            axes.text(layer + 1, loop + 1, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=list(panels), label="openness, mean of 1 − z")
    return figure


def plot_run(workdir: PathLike, output: PathLike, gates: bool = False) -> None:
    """Draws the curves of a run, or with `gates` the openness of its gates, into a file.

    Args:
      workdir: the run's folder.
      output: the file, whose suffix is one of `figures.FORMATS`; its folder is created.
      gates: see `draw_gates`.

    Raises:
      InputError: the suffix is unsupported, the workdir holds no run, or nothing to draw has been logged yet.
    """
    figures.check_name(output)
    figures.save(draw_gates(read_gates(workdir)) if gates else draw(read_run(workdir)), output)


def plot_comparison(workdirs: Sequence[str], output: PathLike) -> list[str]:
    """Draws several runs into a file; returns the lines of `config_differences`.

    Raises:
      InputError: as in `plot_run`, or a workdir is given twice.
    """
    figures.check_name(output)
    labels = run_labels(workdirs)
    figures.save(draw_comparison({label: read_run(workdir) for label, workdir in labels.items()}), output)
    return config_differences([read_config(workdir) for workdir in workdirs])


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_multi_string(
        "workdir",
        None,
        "Folder of a run of melt_jax.train; may be given several times, to compare runs.",
        required=True,
    )
    flags.DEFINE_string(
        "output", None, f"File to write: a name that ends in {', '.join(figures.FORMATS)}.", required=True
    )
    flags.DEFINE_boolean("gates", False, "Draw the gate openness of every loop and layer instead of the curves.")


def main(argv: list[str]) -> None:
    """Reads the flags and draws."""
    workdirs, output = flags.FLAGS.workdir, flags.FLAGS.output
    if len(workdirs) == 1:
        plot_run(workdirs[0], output, flags.FLAGS.gates)
    elif flags.FLAGS.gates:
        raise InputError(f"--gates: expected one --workdir, found {len(workdirs)}")
    else:
        for line in plot_comparison(workdirs, output):
            print(line)
    print(f"wrote {output}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
