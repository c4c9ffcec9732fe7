"""The log of a phase: a progress bar, a printed line per interval, `metrics.jsonl`, TensorBoard files and W&B."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeAlias

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter, record_writer

from melt_jax.config import InputError
from melt_jax.files import Path, append_text, as_path, make_folder, parse_json, storage_errors, write_text
from melt_jax.training import wandb_log

ALIGNMENT_RATIO = 10.0  # of β·L_align to L_KD, above which a warning is printed

NOT_FINITE = "not_finite/"  # begins the names of metrics that name the causes of a skipped step; they are not logged


class _EventFile:
    """A TensorBoard file in a bucket, written anew at each flush."""

    def __init__(self, path: str) -> None:
        self._path, self._data = as_path(path), bytearray()

    def write(self, data: bytes) -> None:
        """Adds bytes."""
        self._data += data

    def flush(self) -> None:
        """Writes what there is; if that fails, the next call does. The writer's thread must not end with an error."""
        with contextlib.suppress(OSError, *storage_errors()):
            self._path.write_bytes(bytes(self._data))

    close = flush


class _EventFiles:
    open, directory_check = staticmethod(_EventFile), staticmethod(lambda path: None)


record_writer.register_writer_factory("gs", _EventFiles)

StepMetrics: TypeAlias = Mapping[str, tuple[Any, Any]]  # {name: (sum, count)} of one step


def add_up(interval: Sequence[StepMetrics]) -> dict[str, np.ndarray]:
    """The means over an interval of steps: sums and counts are added, then divided; nan if the count is 0.

    Args:
      interval: the steps' metrics, on the host.
    """

    def total(name, i):
        return np.sum([np.asarray(step[name][i], np.float64) for step in interval], axis=0)

    with np.errstate(invalid="ignore"):
        names = [name for name in interval[0] if not name.startswith(NOT_FINITE)]
        return {name: total(name, 0) / total(name, 1) for name in names}


def scalars(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Metrics as numbers. Entries of [T] and [T, L] arrays get names ending in `/loop1` and `/loop1/layer1`.

    Numbers that are not finite, such as means over zero steps, are left out.
    """
    out = {}
    for name, value in metrics.items():
        for index, number in np.ndenumerate(value):
            entry = "".join(f"/{axis}{i + 1}" for axis, i in zip(("loop", "layer"), index))
            out[name + entry] = float(number)
    return {name: number for name, number in out.items() if math.isfinite(number)}


def _drop_later_steps(path: Path, start: int) -> None:
    """Rewrites a log without the lines of steps after `start` and without an incomplete last line."""
    kept, end = [], path.read_bytes().rpartition(b"\n")[0]
    for number, line in enumerate(end.splitlines(), 1):
        step = parse_json(line, f"{path}:{number}").get("step")
        if not isinstance(step, int):
            raise InputError(f"{path}:{number}: expected a step, found {step!r:.60}; remove the line")
        if step <= start:
            kept.append(line.decode() + "\n")
    write_text(path, "".join(kept))


class RunLog:
    """Writes one phase's metrics, as a context manager. Only process 0 writes.

    Args:
      folder: the phase's folder.
      phase: its name.
      start: the step from which the phase resumes; lines of later steps are dropped, because those steps run again.
      steps: the phase's number of steps.
      console: where lines and the progress bar are printed; by default standard output.
    """

    def __init__(self, folder: Path, phase: str, start: int, steps: int, console: Console | None = None) -> None:
        self.phase, self.steps, self._warned = phase, steps, False
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._path, self._board = folder / "metrics.jsonl", None
        if jax.process_index() == 0:
            make_folder(folder)
            if self._path.exists():
                _drop_later_steps(self._path, start)
            self._board = SummaryWriter(str(folder), purge_step=start + 1)
        columns = (TextColumn(phase), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(phase, total=steps, completed=start)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._board:
            self._board.close()

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        self._bar.advance(self._task)

    def write(self, step: int, interval: Sequence[StepMetrics], **extra: float) -> None:
        """Writes the line, the JSON record and the TensorBoard points of an interval of steps.

        Args:
          step: the interval's last step.
          interval: the steps' metrics, on the host.
          extra: further numbers of the interval.
        """
        if self._board is None:
            return
        metrics = add_up(interval) | {name: np.asarray(value) for name, value in extra.items()}
        if metrics.keys() >= {"alignment", "kd"}:
            metrics["alignment_to_kd"] = metrics["alignment"].mean(axis=1) / np.maximum(metrics["kd"], 1e-30)
        if "loss/alignment" in metrics:
            metrics["alignment_ratio"] = metrics["loss/alignment"] / np.maximum(metrics["loss/kd"], 1e-30)
            self._warn_of_alignment(float(metrics["alignment_ratio"]))
        numbers = scalars(metrics)
        append_text(self._path, json.dumps({"phase": self.phase, "step": step, **numbers}) + "\n")
        for name, number in numbers.items():
            self._board.add_scalar(f"{self.phase}/{name}", number, step)
        wandb_log.write(self.phase, step, numbers)
        self.console.print(self._line(step, metrics))

    def _warn_of_alignment(self, ratio: float) -> None:
        if ratio > ALIGNMENT_RATIO and not self._warned:
            self._warned = True
            self.console.print(
                f"warning: β·L_align is {ratio:.0f} times L_KD; above {ALIGNMENT_RATIO:.0f} it hides L_KD; lower "
                "alignment.beta or set alignment.reduction to 'relative'"
            )

    def _line(self, step: int, metrics: Mapping[str, np.ndarray]) -> str:
        parts = [f"{self.phase} {step}/{self.steps}"]
        for name in sorted(metrics, key=lambda name: name != "loss"):
            value = metrics[name]
            loops = value.mean(axis=tuple(range(1, value.ndim))) if value.ndim > 1 else np.atleast_1d(value)
            parts.append(f"{name} " + " ".join(f"{number:.4g}" for number in loops))
        return "  ".join(parts)
