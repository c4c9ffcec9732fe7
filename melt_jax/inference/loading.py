"""Opens a checkpoint's model for generation and evaluation; the flags that replace values of its config."""

import dataclasses

import jax
from absl import flags

from melt_jax.checkpoints.folder import override
from melt_jax.checkpoints.orbax import open_folder, open_model
from melt_jax.config import CHOICES, GATES
from melt_jax.files import PathLike
from melt_jax.model.model import LoopedTransformer, abstract_model, reconfigure
from melt_jax.sharding import for_inference, weight_shardings


@dataclasses.dataclass(frozen=True)
class ModelChanges:
    """Values that replace a checkpoint's; None: the checkpoint's. `ModelConfig` states their ranges.

    Attributes:
      loops: T.
      exit_threshold: cumulative exit probability at which a loop's logits are used; 1: the last loop's.
      guidance: w of LoopCD guidance; 0: none.
      window: W of a MELT.
      sweeps: of a MELT.
      gate: a gate variant; "none": the LoopLM inside a MELT.
      dtype: of weights and KV entries.
    """

    loops: int | None = None
    exit_threshold: float | None = None
    guidance: float | None = None
    window: int | None = None
    sweeps: int | None = None
    gate: str | None = None
    dtype: str | None = None


UNCHANGED = ModelChanges()


def define_model_flags() -> None:
    """Defines a flag for each field of `ModelChanges` but `loops`."""
    flags.DEFINE_float(
        "exit_threshold",
        None,
        "Cumulative exit probability at which a loop's logits are used; 1: the last loop's. Default: the checkpoint's.",
    )
    flags.DEFINE_float(
        "guidance",
        None,
        "w of LoopCD guidance (arXiv 2610.02185): tokens are selected from z_T + w (z_T − z_1), where z_t are the "
        "logits of loop t; 0: none, the default.",
    )
    flags.DEFINE_integer("window", None, "W of a MELT. Default: the checkpoint's.")
    flags.DEFINE_integer("sweeps", None, "Sweeps of a MELT's chunks. Default: the checkpoint's.")
    flags.DEFINE_enum("gate", None, GATES, "Replaces the checkpoint's gate; none: the LoopLM inside a MELT.")
    flags.DEFINE_enum("dtype", None, CHOICES["dtype"], "dtype of weights and KV entries. Default: as stored.")


def read_model_flags(loops: int | None = None) -> ModelChanges:
    """The flags of `define_model_flags`, with T."""
    names = [field.name for field in dataclasses.fields(ModelChanges) if field.name != "loops"]
    return ModelChanges(loops, **{name: flags.FLAGS[name].value for name in names})


def open_for_inference(
    folder: PathLike, changes: ModelChanges, mesh: jax.sharding.Mesh | None = None
) -> LoopedTransformer:
    """Opens a model folder, in published or Orbax form, and changes the model.

    Args:
      folder: the model folder.
      changes: see `ModelChanges`.
      mesh: the weights are split over its tensor axis and whole along the others; None: on the default device.

    Raises:
      InputError: a value is invalid, or the checkpoint cannot be opened or split.
    """
    values = {name: value for name, value in dataclasses.asdict(changes).items() if value is not None}
    dtype, gate = values.pop("dtype", None), values.pop("gate", None)
    if mesh is None:
        return reconfigure(open_model(folder, dtype=dtype, gate=gate), **values)
    shardings = weight_shardings(abstract_model(override(open_folder(folder).config, gate=gate)), mesh)
    with jax.set_mesh(mesh):
        model = reconfigure(open_model(folder, dtype=dtype, gate=gate, shardings=shardings), **values)
        return for_inference(model, model.dtype)
