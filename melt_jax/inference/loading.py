"""Opens a checkpoint's model for generation and evaluation."""

from melt_jax.checkpoints.orbax import open_model
from melt_jax.model.model import LoopedTransformer, reconfigure


def open_for_inference(
    folder: str,
    gate: str | None = None,
    dtype: str | None = None,
    loops: int | None = None,
    exit_threshold: float | None = None,
    window: int | None = None,
    sweeps: int | None = None,
) -> LoopedTransformer:
    """Opens a model; arguments other than None replace the checkpoint's values.

    Args:
      folder: model folder, in published or Orbax form.
      gate: a gate variant; "none": the LoopLM inside a MELT.
      dtype: of weights and KV entries.
      loops: T.
      exit_threshold: cumulative exit probability at which a loop's logits are used; 1: the last loop's.
      window, sweeps: of a MELT; see `ModelConfig`.

    Raises:
      InputError: a value is invalid, or the checkpoint cannot be opened.
    """
    changes = {"loops": loops, "exit_threshold": exit_threshold, "window": window, "sweeps": sweeps}
    model = open_model(folder, dtype=dtype, gate=gate)
    return reconfigure(model, **{name: value for name, value in changes.items() if value is not None})
