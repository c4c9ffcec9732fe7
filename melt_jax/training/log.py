"""The log of a run: a progress bar, a line per interval, `metrics.jsonl` and TensorBoard, in one folder."""

import json
import math

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from melt_jax.files import write_text


def add_up(interval):
    """The metrics of some steps, each {name: (sum, count)}, read already, divided last: {name: array}; nan where none
    counts."""
    total = lambda name, i: np.sum([np.asarray(step[name][i], np.float64) for step in interval], axis=0)
    with np.errstate(invalid="ignore"):
        return {name: total(name, 0) / total(name, 1) for name in interval[0]}


def scalars(metrics):
    """Metrics as numbers: entries of [T] and [T, L] arrays get names ending in `/loop1` and `/loop1/layer1`.

    Those that are none, for want of a step that counts, are left out.
    """
    out = {}
    for name, value in metrics.items():
        for index, number in np.ndenumerate(value):
            where = "".join(f"/{axis}{i + 1}" for axis, i in zip(("loop", "layer"), index))
            out[name + where] = float(number)
    return {name: number for name, number in out.items() if math.isfinite(number)}


class RunLog:
    """Writes one phase's metrics, as a context manager; lines of steps after `start` are dropped: they run again.

    Of several processes the first writes.
    """

    def __init__(self, folder, phase, start, steps, console=None):
        self.phase, self.steps = phase, steps
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._path, self._board = folder / "metrics.jsonl", None
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                whole = [line for line in self._path.read_text().splitlines(True) if line.endswith("\n")]
                write_text(self._path, "".join(line for line in whole if json.loads(line)["step"] <= start))
            self._board = SummaryWriter(str(folder), purge_step=start + 1)
        columns = (TextColumn(phase), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(phase, total=steps, completed=start)

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()
        if self._board:
            self._board.close()

    def advance(self):
        """One more step was started."""
        self._bar.advance(self._task)

    def write(self, step, interval, **extra):
        """The line, the JSON record and the TensorBoard points of an interval that ends with `step`."""
        if self._board is None:
            return
        metrics = add_up(interval) | {name: np.asarray(value) for name, value in extra.items()}
        if "alignment" in metrics:
            metrics["alignment_to_kd"] = metrics["alignment"].mean(axis=1) / np.maximum(metrics["kd"], 1e-30)
        numbers = scalars(metrics)
        with self._path.open("a") as file:
            file.write(json.dumps({"phase": self.phase, "step": step, **numbers}) + "\n")
        for name, number in numbers.items():
            self._board.add_scalar(f"{self.phase}/{name}", number, step)
        self.console.print(self._line(step, metrics))

    def _line(self, step, metrics):
        parts = [f"{self.phase} {step}/{self.steps}"]
        for name in sorted(metrics, key=lambda name: name != "loss"):
            value = metrics[name]
            loops = value.mean(axis=tuple(range(1, value.ndim))) if value.ndim > 1 else np.atleast_1d(value)
            parts.append(f"{name} " + " ".join(f"{number:.4g}" for number in loops))
        return "  ".join(parts)
