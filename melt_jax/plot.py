"""Draws the curves of a run from its logs, all phases on one axis of steps.

    python -m melt_jax.plot --workdir=runs/nano --output=curves.png

A distillation (MELT, arXiv 2605.07721) gives the KL to the teacher, the attention alignment, the gate openness with
the transition's α, and the norms of the gradients; a pre-training (Ouro, arXiv 2510.25741) its cross-entropy and exit
gate instead. A run under way is drawn as far as it has come.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

FORMATS = (".png", ".svg", ".pdf")
GRAY = "0.55"
GROUP_COLORS = {"backbone": "0.25", "gate": "tab:red", "alpha": GRAY}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
      title: what is drawn, with its unit.
      metrics: names in the log; entries per loop (`kd/loop1`) are curves of their own, those per layer are averaged.
      log: whether the vertical axis is logarithmic.
      limits: of the vertical axis, or None.
    """

    title: str
    metrics: tuple
    log: bool = False
    limits: tuple | None = None


PANELS = (
    Panel("KL(teacher ‖ student), nats a token", ("kd",), log=True),
    Panel("cross-entropy, nats a token", ("cross_entropy",), log=True),
    Panel("gate gate_openness, mean of 1 − z; dashed: α", ("gate_openness", "alpha"), limits=(-0.03, 1.03)),
    Panel("exit probability", ("exit_probability",), limits=(-0.03, 1.03)),
    Panel("attention alignment, ‖o student − o teacher‖²", ("alignment",), log=True),
    Panel("exit entropy, nats", ("exit_entropy",)),
    Panel("gradient norm before clipping", ("gradient_norm",), log=True),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has logged.

    Attributes:
      phases: {name: (first step, last step)} in the run's steps, planned ones too.
      curves: {metric: {curve: (steps, values)}}; curve is "loop1" …, "backbone", "gate", or the metric's own name.
    """

    phases: dict
    curves: dict


def read_run(workdir):
    """Reads a run's config and logs.

    Args:
      workdir: folder of the run.

    Returns:
      `Run`.

    Raises:
      FileNotFoundError: the folder holds no run, or nothing has been logged yet.
    """
    workdir = pathlib.Path(workdir)
    file = workdir / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{workdir}: no config.json; expected the workdir of a run of melt_jax.train")
    config = json.loads(file.read_text())
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
        raise FileNotFoundError(f"{workdir}: nothing logged yet; expected lines in {logs}")
    return Run(phases, curves)


def read_log(path):
    """The records of a `metrics.jsonl`; none if there is no such file. A last line still being written is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def average_layers(record):
    """{(metric, curve): value} of one record: `a/loop2/layer1` and `a/loop2/layer2` become the mean ("a", "loop2")."""
    found = collections.defaultdict(list)
    for name, value in record.items():
        if name not in ("phase", "step"):
            metric, _, curve = re.sub(r"/layer\d+$", "", name).partition("/")
            found[metric, curve or metric].append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def draw(run):
    """The curves of a `Run` as a matplotlib figure: one pair of axes for each panel that has something to show."""
    panels = [panel for panel in PANELS if any(metric in run.curves for metric in panel.metrics)]
    if not panels:
        raise ValueError(f"nothing to draw: the run logged {', '.join(sorted(run.curves))}")
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 0.7 + 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    loops = sorted(
        {name for curves in run.curves.values() for name in curves if re.fullmatch(r"loop\d+", name)}, key=natural
    )
    shades = matplotlib.colormaps["viridis_r"]
    colors = {name: shades(0.12 + 0.82 * i / max(len(loops) - 1, 1)) for i, name in enumerate(loops)}
    handles = {}
    for axes, panel in zip(grid, panels):
        for metric in panel.metrics:
            for name, (steps, values) in sorted(run.curves.get(metric, {}).items(), key=lambda item: natural(item[0])):
                color = colors.get(name) or GROUP_COLORS.get(name, "tab:blue")
                style = {"linestyle": "--", "linewidth": 1.2} if metric == "alpha" else {"linewidth": 1.6}
                (handles[name],) = axes.plot(steps, values, color=color, label=name, **style)
        dress(axes, panel, run.phases)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes in grid[max(len(panels) - 2, 0) : len(panels)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    names = {"backbone": "backbone weights", "gate": "gates", "alpha": "α"}
    shown = {name: handles[name] for name in (*loops, "backbone", "gate", "alpha") if name in handles}
    figure.legend(
        shown.values(),
        [names.get(name, name.replace("loop", "loop ")) for name in shown],
        loc="outside upper center",
        ncols=len(shown),
        frameon=False,
    )
    return figure


def dress(axes, panel, phases):
    """Title, scales, and where the phases meet; the phases' names stand at the foot of each panel."""
    axes.set_title(panel.title, fontsize=10, loc="left")
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
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


def natural(name):
    """A sort key by which loop10 comes after loop2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def main(arguments=None):
    """Reads, draws, writes; `arguments` are the command line's unless given."""
    parser = argparse.ArgumentParser("python -m melt_jax.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="folder of a run of melt_jax.train")
    parser.add_argument("--output", required=True, type=pathlib.Path, help=f"the picture: {', '.join(FORMATS)}")
    args = parser.parse_args(arguments)
    if args.output.suffix not in FORMATS:
        parser.error(f"--output: expected a name that ends in {', '.join(FORMATS)}, found {args.output.name}")
    try:
        figure = draw(read_run(args.workdir))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=150)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
