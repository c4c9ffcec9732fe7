"""Checkpoints of a phase: Orbax saves them in the background; restoring one checks every leaf first."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from melt_jax.config import InputError
from melt_jax.files import Path, absolute
from melt_jax.training.attempts import spent


class RestoreError(InputError):
    """A checkpoint that does not fit the run; the message lists every leaf that differs."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Orbax would call JAX's preemption service too, with steps of the phase. The service remembers the last number
        # it was called with, and `training.preemption` numbers its own calls, so no other code may call it.
        return False


class Checkpoints:
    """The last training states of one phase, under a folder.

    Every process must create one and make the same calls; each writes and reads the shards of its own devices. A
    checkpoint restores bitwise on any mesh, whatever mesh wrote it.

    Args:
      folder: created if it is missing.
      every: steps between two checkpoints.
      keep: checkpoints to keep; one more exists while it is being saved.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(every),
            preservation_policy=policies.LatestN(keep),
            enable_async_checkpointing=True,
            single_host_load_and_broadcast=True,  # process 0 lists the checkpoints and all processes use its list
        )
        self._manager = _Manager(absolute(folder), options=options, item_handlers=ocp.StandardCheckpointHandler())

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None. Its save may not be complete; see `wait_until_finished`."""
        return self._manager.latest_step()

    @spent("saving")
    def save(self, step: int, state: Any, force: bool = False) -> bool:
        """Saves the state after `step` steps in the background if one is due or `force` is set; returns whether it did.

        Steps must increase, starting after the restored one.
        """
        return self._manager.save(step, args=ocp.args.StandardSave(flatten(state)), force=force)

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
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])

    @spent("saving")
    def wait_until_finished(self) -> int | None:
        """Waits until all saves are complete and returns `latest`."""
        self._manager.wait_until_finished()
        return self.latest()

    @spent("saving")
    def close(self) -> None:
        """Waits until all saves are complete and releases the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a pytree, in its order. Checkpoints store leaves under these paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
