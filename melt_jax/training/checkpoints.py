"""Checkpoints of a phase: Orbax saves them in the background; restoring one checks every file and leaf first."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from melt_jax.config import InputError
from melt_jax.digests import DIGESTS, digest_errors, write_digests
from melt_jax.files import Path, absolute, file_sizes, in_bucket
from melt_jax.training.attempts import spent
from melt_jax.training.processes import wait_for_process_0

ITEM = "default"  # Orbax's name of the only item of a checkpoint
NEEDED = ("_METADATA", "manifest.ocdbt")
DAMAGED = "damaged_checkpoints"  # beside the folder of checkpoints


class SaveError(InputError):
    """A checkpoint or another file of a run that cannot be written."""


class RestoreError(InputError):
    """A checkpoint that does not fit the run; the message lists every leaf that differs."""


class _Handler(ocp.StandardCheckpointHandler):
    """Writes the record of a checkpoint's files before Orbax gives the checkpoint its name."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        if "://" not in str(directory):  # a bucket has checksums of its own
            folder = pathlib.Path(directory)
            write_digests(folder, "a checkpoint of a run", file_sizes(folder))


@ocp.args.register_with_handler(_Handler, for_save=True)
class _Save(ocp.args.StandardSave):
    """Orbax finds a handler by the class of its arguments."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    """As `_Save`."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax would call JAX's preemption service too, with steps of the phase. The service remembers the last number
        # it was called with, and `training.preemption` numbers its own calls, so no other code may call it.
        return False


class Checkpoints:
    """The last training states of one phase, under a folder.

    Every process must create one and make the same calls; each writes and reads the shards of its own devices. A
    checkpoint restores bitwise on any mesh, whatever mesh wrote it. Damaged checkpoints are never restored: newer than
    the newest sound one, they are moved to `DAMAGED`, where they can be inspected or deleted.

    Args:
      folder: created if it is missing.
      every: steps between two checkpoints.
      keep: checkpoints to keep; one more exists while it is being saved.
      report: called in process 0 with a message for each damaged checkpoint.
    """

    def __init__(self, folder: Path, every: int, keep: int, report: Callable[[str], object] = print) -> None:
        if jax.process_index() == 0 and not in_bucket(folder):
            _set_damaged_aside(folder, report)
        wait_for_process_0()
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(every),
            preservation_policy=policies.LatestN(keep),
            enable_async_checkpointing=True,
            single_host_load_and_broadcast=True,  # process 0 lists the checkpoints and all processes use its list
        )
        self._manager = _Manager(absolute(folder), options=options, item_handlers=_Handler())

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None. Its save may not be complete; see `wait_until_finished`."""
        step = self._manager.latest_step()
        return None if step is None else int(step)  # with several processes Orbax gives an array's element

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after that step."""
        return self._manager.should_save(step)

    @spent("saving")
    def save(self, step: int, state: Any, force: bool = False) -> bool:
        """Saves the state after `step` steps in the background if one is due or `force` is set; returns whether it did.

        Steps must increase, starting after the restored one.
        """
        with self._saving():
            return self._manager.save(step, args=_Save(flatten(state)), force=force)

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, with the shapes, dtypes and shardings of `abstract`.

        Raises:
          RestoreError: lists every leaf that is missing, unknown, or of another shape or dtype.
        """
        wanted = flatten(abstract)
        stored = self._manager.item_metadata(step)
        stored = dict(stored.tree if hasattr(stored, "tree") else stored)
        errors = [f"{name}: missing" for name in wanted.keys() - stored.keys()]
        errors += [f"{name}: unknown" for name in stored.keys() - wanted.keys()]
        for name in wanted.keys() & stored.keys():
            expected, found = ((tuple(leaf.shape), np.dtype(leaf.dtype).name) for leaf in (wanted[name], stored[name]))
            if expected != found:
                errors.append(f"{name}: expected {expected}, found {found}")
        if errors:
            folder = self._manager.directory / str(step)
            raise RestoreError(f"checkpoint {folder} does not fit this run:\n" + "\n".join(sorted(errors)))
        restored = self._manager.restore(step, args=_Restore(wanted))
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns the errors of the background save, which Orbax raises at its next call, into one line."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have no common class
            reason = " ".join(str(error).split())[:300]
            raise SaveError(
                f"{self._manager.directory}: expected to save a checkpoint, found {type(error).__name__}: {reason};"
                " make the folder writable or free disk space, then rerun the command: it resumes from the last"
                " checkpoint"
            ) from error

    @spent("saving")
    def wait_until_finished(self) -> int | None:
        """Waits until all saves are complete and returns `latest`."""
        with self._saving():
            self._manager.wait_until_finished()
        return self.latest()

    @spent("saving")
    def close(self) -> None:
        """Waits until all saves are complete and releases the folder."""
        with self._saving():
            self._manager.wait_until_finished()
        self._manager.close()


def _set_damaged_aside(folder: Path, report: Callable[[str], object]) -> None:
    """Moves the checkpoints that are newer than the newest sound one."""
    steps = [path for path in folder.glob("*") if path.name.isdecimal()] if folder.is_dir() else []
    for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
        if not (errors := _errors(path / ITEM)):
            return
        target = folder.with_name(DAMAGED) / path.name
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{path.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        lines = "".join(f"\n  - {error}" for error in errors)
        report(f"warning: checkpoint {path} is damaged, is not used and was moved to {target}:{lines}")


def _errors(item: Path) -> list[str]:
    if (item / DIGESTS).exists():
        return digest_errors(item)
    # Without a record, only the files that Orbax needs are known.
    return [f"{item / name}: expected a file, found none" for name in NEEDED if not (item / name).is_file()]


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a pytree, in its order. Checkpoints store leaves under these paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
