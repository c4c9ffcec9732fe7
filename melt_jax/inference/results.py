"""The results of a run: one row per model, stored in a file and printed as a table."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console, RenderableType
from rich.table import Table

from melt_jax.config import TrainConfig
from melt_jax.data import stream
from melt_jax.files import Path, read_json, write_text
from melt_jax.inference import scoring
from melt_jax.model.model import LoopedTransformer
from melt_jax.training.attempts import spent
from melt_jax.training.preemption import exit_if_preempted
from melt_jax.training.processes import text_from_process_0

PROGRESS_SECONDS = 10.0


class Results:
    """The scores of a run's models, stored in a file so that a resumed run measures nothing twice.

    A row is measured again if its settings (`evaluation` and the chunk) differ from those of the config.
    """

    def __init__(self, path: Path):
        """Reads `path` if it exists."""
        self._path = path
        self._rows: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
        self._evaluated: dict[str, str] | None = None  # the fingerprint of the sequences

    @spent("evaluating")
    def measure(
        self,
        name: str,
        make_model: Callable[[], LoopedTransformer],
        teacher: LoopedTransformer | None,
        config: TrainConfig,
    ) -> None:
        """Scores a model and stores its row, unless the file has it. Every process must call it at the same point.

        The teacher itself is not compared with the teacher: that KL is 0 by definition.

        Raises:
          SystemExit: SIGTERM was received; checked before each piece.
        """
        if not (config.evaluation.problems or config.evaluation.sequences):
            return
        if text_from_process_0(self._measured, name, config):
            return
        console = Console(quiet=jax.process_index() > 0)
        progress = Progress(f"evaluating {name}", console)
        model = make_model()
        scores = scoring.score(model, None if model is teacher else teacher, config, progress)
        if comparison := scores.comparison:
            console.print(f"{name}: {comparison}", markup=False, highlight=False, soft_wrap=True)
        if jax.process_index() == 0:
            self._rows[name] = dataclasses.asdict(scores) | {"settings": self._settings(config)}
            write_text(self._path, json.dumps(self._rows, indent=1))

    def _measured(self, name: str, config: TrainConfig) -> str:
        """A text that is empty unless the file has the row of these settings."""
        return "yes" if self._rows.get(name, {}).get("settings") == self._settings(config) else ""

    def _settings(self, config: TrainConfig) -> dict[str, Any]:
        """What the scores of a model depend on, besides its weights."""
        evaluation = config.evaluation
        settings = dataclasses.asdict(evaluation) | {"chunk_size": config.chunk_size}
        del settings["sample"], settings["baselines"]
        if self._evaluated is None:
            self._evaluated = stream.fingerprint(config.data.source, evaluation.path)
        return settings | self._evaluated

    def table(self) -> str:
        """The rows as text; empty if nothing was measured."""
        return table(self._rows) if self._rows else ""


class Progress:
    """A `before_piece` that exits if SIGTERM was received, and prints at most one line per `PROGRESS_SECONDS`."""

    def __init__(self, title: str, console: Console):
        self._title, self._console, self._printed = title, console, -PROGRESS_SECONDS

    def __call__(self, piece: str) -> None:
        """Reports the piece that is about to run."""
        exit_if_preempted()
        if time.monotonic() >= self._printed + PROGRESS_SECONDS:
            self._printed = time.monotonic()
            self._console.print(f"{self._title}: {piece}", markup=False, highlight=False, soft_wrap=True)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """{name: `dataclasses.asdict` of `Scores`} as a text table; the KL compares the last loops, nats per token."""
    comparisons = [row["comparison"] for row in rows.values() if row["comparison"]]
    columns = {"chunked": "KL to teacher, chunked", "decoding": "decoding"}
    if any(c["chunked_start"] not in (None, c["chunked"]) for c in comparisons):
        columns = {
            "chunked": "KL to teacher, chunked",
            "chunked_start": "first tokens, chunked",
            "decoding": "first tokens, decoding",
        }
    out = Table(box=None, pad_edge=False)
    out.add_column("model")
    for heading in ("loops", "exact answers", *columns.values(), "cache bytes/token", "bytes/sequence"):
        out.add_column(heading, justify="right")
    for name, row in rows.items():
        answers = "–" if row["answers"] is None else f"{row['answers']:.1%} of {row['problems']}"
        kl = [_kl_text((row["comparison"] or {}).get(column)) for column in columns]
        sizes = (f"{row[key]:,}" for key in ("cache_bytes_per_token", "cache_bytes_per_sequence"))
        out.add_row(name, str(row["loops"]), answers, *kl, *sizes)
    return render(out)


def render(renderable: RenderableType, width: int = 160) -> str:
    """A rich renderable as plain text, at least `width` characters wide; a wider table is not cut."""
    width = max(width, Console(width=10_000).measure(renderable).maximum)
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def _kl_text(scores: Mapping[str, Any] | None) -> str:
    # The computed KL of two equal models can be slightly negative.
    return "–" if scores is None or scores["final_kl"] is None else f"{max(scores['final_kl'], 0.0):.4f}"
