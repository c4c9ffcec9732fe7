"""Prints the memory of generation: weights and KV cache of Ouro, its MELTs and Qwen3, or of a model folder.

    python -m melt_jax.memory                                     at 32,000 tokens, beside the MELT paper's figures
    python -m melt_jax.memory --length=10000 --windows=16,256 --output=memory.png
    python -m melt_jax.memory --checkpoint=FOLDER                 a LoopLM or MELT of your own, beside the other

The figures are for one sequence and 2 bytes per number. They are computed from configs: no model is loaded, and a
sequence may be longer than the model's positions. The activations of a step are left out.
"""

from collections.abc import Callable, Sequence

from absl import flags
from matplotlib.figure import Figure
from rich.table import Table

from melt_jax import command_line
from melt_jax.analysis import figures
from melt_jax.analysis.memory import PAPER, PAPER_LENGTH, Model, looplm_and_melts, published_models
from melt_jax.checkpoints import hub
from melt_jax.checkpoints.published_config import read_config
from melt_jax.config import InputError
from melt_jax.inference.results import render

FLAGS = flags.FLAGS
LOOPS = (1, 2, 4, 8, 16)
LENGTHS = (1_000, 4_000, 16_000, 32_000, 64_000, 128_000)
WINDOWS = (50, 128)


def models_of(checkpoint: str | None, windows: Sequence[int]) -> list[Model]:
    """The models of the tables: Ouro, its MELTs and Qwen3; or a folder's model as a LoopLM and as a MELT.

    Args:
      checkpoint: a model folder, in published or Orbax form, a model of the hub, or None.
      windows: W of the MELTs with a window. That of a folder's MELT is added.

    Raises:
      InputError: the folder holds no model.
    """
    if checkpoint is None:
        return published_models(sorted(windows))
    config = read_config(hub.local_folder(checkpoint, hub.CONFIG))
    gate = "elementwise" if config.gate == "none" else config.gate
    return looplm_and_melts(config, ("LoopLM", "MELT"), sorted({*windows, config.window} - {0}), gate)


def unit_of(models: Sequence[Model], length: int) -> tuple[str, float]:
    """The unit of sizes and its bytes: GB (10⁹), or MB (10⁶) for small models."""
    return ("GB", 1e9) if max(model.total(length) for model in models) >= 1e9 else ("MB", 1e6)


def size_table(models: Sequence[Model], length: int) -> str:
    """Bytes per token and sequence, cache, weights and total at a length, beside the paper's figures."""
    unit, size = unit_of(models, length)
    has_paper = any(model.name in PAPER for model in models)
    out = Table(title=f"one sequence of {length:,} tokens", box=None, title_justify="left", pad_edge=False)
    out.add_column("model")
    headings = ["loops", "bytes/token", "bytes/sequence", f"cache, {unit}", f"weights, {unit}", f"total, {unit}"]
    if has_paper:
        headings += [f"paper at {PAPER_LENGTH:,}: MB/token", "cache, GB", "weights, GB", "total, GB"]
    for heading in headings:
        out.add_column(heading, justify="right")
    for model in models:
        cells = [str(model.config.loops), f"{model.per_token:,}", f"{model.per_sequence:,}"]
        cells += [
            f"{model.cache(length) / size:.2f}",
            f"{model.weights / size:.3f}",
            f"{model.total(length) / size:.2f}",
        ]
        if has_paper:
            paper = PAPER.get(model.name)
            cells += [f"{value:g}" for value in paper] if paper else ["–"] * 4
        out.add_row(model.name, *cells)
    return render(out)


def grid_table(title: str, models: Sequence[Model], columns: Sequence[str], value: Callable[[Model, int], str]) -> str:
    """A table with a row per model; `value(model, i)` is the cell of column i."""
    out = Table(box=None, pad_edge=False)
    out.add_column("model")
    for heading in columns:
        out.add_column(heading, justify="right")
    for model in models:
        out.add_row(model.name, *(value(model, i) for i in range(len(columns))))
    return f"{title}\n{render(out)}"


def tables(models: Sequence[Model], length: int, loops: Sequence[int], lengths: Sequence[int]) -> str:
    """Three tables: sizes at a length; the total against T; the total against the length.

    Args:
      models: see `models_of`.
      length: S of the first two tables, in tokens.
      loops: T of each column of the second table; the others have each model's own T.
      lengths: S of each column of the third table, in tokens.
    """
    unit, size = unit_of(models, length)
    by_loops = grid_table(
        f"weights and cache, {unit}, at {length:,} tokens, by loops",
        models,
        [str(count) for count in loops],
        lambda model, i: f"{model.with_loops(loops[i]).total(length) / size:.2f}",
    )
    by_length = grid_table(
        f"weights and cache, {unit}, by tokens",
        models,
        [f"{count:,}" for count in lengths],
        lambda model, i: f"{model.total(lengths[i]) / size:.2f}",
    )
    return "\n\n".join((size_table(models, length), by_loops, by_length))


def draw(models: Sequence[Model], length: int, loops: Sequence[int], lengths: Sequence[int]) -> Figure:
    """Weights and cache against T and against the length; the arguments are those of `tables`."""
    unit, size = unit_of(models, length)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts, tokens = range(min(loops), max(loops) + 1), [0, *sorted(lengths)]
    family = lambda model: model.name.partition(",")[0]
    families = list(dict.fromkeys(map(family, models)))
    windows = sorted({model.config.window for model in models})
    for model in models:
        line = ("-", "--", ":", "-.")[windows.index(model.config.window) % 4]
        style = {"label": model.name, "color": f"C{families.index(family(model))}", "linestyle": line}
        left.plot(counts, [model.with_loops(count).total(length) / size for count in counts], **style)
        right.plot(tokens, [model.total(count) / size for count in tokens], **style)
    left.set(xlabel="loops", title=f"{length:,} tokens")
    right.set(xlabel="tokens", title="each model's own loops")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (left, right):
        axes.set_ylabel(f"weights and cache of one sequence, {unit}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def define_flags() -> None:
    """Defines the command's flags."""
    text = lambda numbers: list(map(str, numbers))
    flags.DEFINE_integer("length", PAPER_LENGTH, "Tokens of the sequence.")
    flags.DEFINE_list("loops", text(LOOPS), "Numbers of loops of the second table and the figure.")
    flags.DEFINE_list("lengths", text(LENGTHS), "Tokens of the third table and the figure.")
    flags.DEFINE_list("windows", text(WINDOWS), "Windows W of the MELTs, in tokens.")
    flags.DEFINE_string(
        "checkpoint", None, "Model folder, or model of the hub, to show instead of Ouro, its MELTs and Qwen3."
    )
    flags.DEFINE_string("output", None, f"File of the figure: a name that ends in {', '.join(figures.FORMATS)}.")


def main(argv: list[str]) -> None:
    """Reads the flags, prints the tables and draws the figure."""
    del argv
    if FLAGS.length < 1:
        raise InputError(f"--length: expected at least 1, found {FLAGS.length}")
    if FLAGS.output:
        figures.check_name(FLAGS.output)
    loops, lengths, windows = (command_line.read_numbers(name) for name in ("loops", "lengths", "windows"))
    models = models_of(FLAGS.checkpoint, windows)
    print(tables(models, FLAGS.length, loops, lengths))
    if FLAGS.output:
        figures.save(draw(models, FLAGS.length, loops, lengths), FLAGS.output)
        print(f"\nwrote {FLAGS.output}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
