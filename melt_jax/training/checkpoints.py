"""Checkpoints of a phase: saved in the background by Orbax, restored only when every leaf is accounted for."""

import jax
import numpy as np
import orbax.checkpoint as ocp


class RestoreError(ValueError):
    """A checkpoint that does not fit the run; the message lists every leaf that differs."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step):
        # Orbax would ask JAX's preemption service too, with steps of the phase. The service keeps the last number that
        # it was asked with, and the run counts its questions (`training.preemption`): it must be the only one.
        return False


class Checkpoints:
    """The training states of one phase under a folder, the last `keep` of them.

    Every process makes one and calls it alike; each writes and reads the pieces that its devices hold. What one mesh
    wrote is restored on any other, to the bit.
    """

    def __init__(self, folder, every, keep):
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(every),
            preservation_policy=policies.LatestN(keep),
            enable_async_checkpointing=True,
            single_host_load_and_broadcast=True,  # which checkpoints there are: process 0 looks, all go by it
        )
        self._manager = _Manager(folder.resolve(), options=options, item_handlers=ocp.StandardCheckpointHandler())

    def latest(self):
        """The step of the newest checkpoint, or None; it may still be being written, see `wait_until_finished`."""
        return self._manager.latest_step()

    def save(self, step, state, force=False):
        """Saves the state after so many steps, if the interval or `force` says so, in the background; whether it did.

        A step is saved once: steps go up, from the one restored.
        """
        return self._manager.save(step, args=ocp.args.StandardSave(flatten(state)), force=force)

    def restore(self, step, abstract):
        """The state of a step, with the shapes, dtypes and shardings of `abstract`.

        Raises:
          RestoreError: lists every leaf that is missing, unknown, or of another shape or dtype.
        """
        wanted = flatten(abstract)
        stored = self._manager.item_metadata(step)
        stored = dict(stored.tree if hasattr(stored, "tree") else stored)
        found = [f"{name}: missing" for name in wanted.keys() - stored.keys()]
        found += [f"{name}: unknown" for name in stored.keys() - wanted.keys()]
        for name in wanted.keys() & stored.keys():
            expected, actual = ((tuple(leaf.shape), np.dtype(leaf.dtype).name) for leaf in (wanted[name], stored[name]))
            if expected != actual:
                found.append(f"{name}: expected {expected}, found {actual}")
        if found:
            place = self._manager.directory / str(step)
            raise RestoreError(f"checkpoint {place} does not fit this run:\n" + "\n".join(sorted(found)))
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        names = list(wanted)
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in names])

    def wait_until_finished(self):
        """Waits for saves under way; then `latest`, which is whole."""
        self._manager.wait_until_finished()
        return self.latest()

    def close(self):
        """Waits for saves under way, and ends."""
        self._manager.wait_until_finished()
        self._manager.close()


def flatten(tree):
    """{path: leaf} of a pytree, in its order; the names under which leaves are stored."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
