"""Converts a model folder between published and Orbax form; weights stay bitwise identical unless --dtype is given.

    python -m melt_jax.convert --input=Ouro-1.4B-Thinking --output=checkpoints/ouro --to=orbax
    python -m melt_jax.convert --input=Ouro-1.4B-Thinking --output=checkpoints/melt --to=orbax --gate=elementwise
    python -m melt_jax.convert --input=checkpoints/melt --output=melt-published --to=published
    python -m melt_jax.convert --input=checkpoints/melt --output=ouro-again --to=published --gate=none
    python -m melt_jax.convert --input=ByteDance/Ouro-1.4B-Thinking --output=checkpoints/ouro --to=orbax
    python -m melt_jax.convert --input=runs/melt/alignment/model --output=MELT --to=published --push=org/MELT

A published folder holds config.json, one or several safetensors files and tokenizer files. The Orbax form has the same
config.json and tokenizer files, and stores the weights under `params/`. --gate=elementwise or scalar turns a LoopLM
into a MELT with new gates (normal with standard deviation 0.02, biases zero, drawn from --seed); --gate=none removes
a MELT's gates. The output folder appears when it is complete. --input may name the workdir of a run, for the model of
its last phase, or a model of the Hugging Face Hub (`melt_jax.checkpoints.hub`). --push uploads the output to the hub,
with a model card; to upload a folder that exists, add --keep_existing.

In a run of several processes, process 0 converts, and the others wait and fail if it fails.
"""

import ctypes
import dataclasses
import os
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp
from absl import flags

from melt_jax import command_line
from melt_jax.checkpoints import hub
from melt_jax.checkpoints.folder import KINDS, chosen_dtype, not_finite_errors, override
from melt_jax.checkpoints.model_card import LICENSE, model_card
from melt_jax.checkpoints.orbax import PARAMS, open_folder, weights_digest, write_params
from melt_jax.checkpoints.published import write_weights
from melt_jax.checkpoints.published_config import add_model_code, published_config, raise_errors, write_config
from melt_jax.config import CHOICES, GATES, InputError, first_loop_errors
from melt_jax.files import (
    PathLike,
    absolute,
    as_path,
    atomic_folder,
    copy_companions,
    folder_bytes,
    is_complete,
    read_json,
    read_on_disk,
    write_text,
)
from melt_jax.model.model import abstract_model, init_weights, module_leaves, parameter_count
from melt_jax.training.processes import initialize_distributed, run_on_process_0

CARD = "README.md"  # of a folder that was uploaded
GATE_STD = 0.02
FORMS = ("orbax", "published")


@dataclasses.dataclass(frozen=True)
class Changes:
    """Changes to the model; None: unchanged.

    Attributes:
      gate: "none" or a gate variant.
      first_loop: "copy" or "gated".
      dtype: name of the weights' dtype.
      seed: seed of new gates.
    """

    gate: str | None = None
    first_loop: str | None = None
    dtype: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Upload:
    """An upload of the output to the hub.

    Attributes:
      name: of the repository, "org/name"; it is created if it is missing.
      base_model: name of the LoopLM on the hub, for the model card; None: the run's teacher, if that is on the hub.
      license: of the weights, as the hub spells it.
      private: a new repository is private.
    """

    name: str
    base_model: str | None = None
    license: str = LICENSE
    private: bool = False


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "input", None, "Model to read: a folder in either form, a run's workdir, or a model of the hub.", required=True
    )
    flags.DEFINE_string("output", None, "Folder to write.", required=True)
    flags.DEFINE_enum("to", None, FORMS, "Form of the output.", required=True)
    flags.DEFINE_enum("gate", None, GATES, "Gate of the output's model. Default: the input's.")
    flags.DEFINE_enum(
        "first_loop", None, CHOICES["first_loop"], "First loop of the output's model. Default: the input's."
    )
    flags.DEFINE_enum("dtype", None, CHOICES["dtype"], "dtype of the output's weights. Default: the input's.")
    flags.DEFINE_string("dtype_of", None, "Instead of --dtype: a model folder whose dtype the weights get.")
    flags.DEFINE_integer("seed", 0, "Seed of new gates.")
    flags.DEFINE_bool("overwrite", False, "Replace the output if it is a folder of that form written by melt_jax.")
    flags.DEFINE_bool("keep_existing", False, "Convert nothing if the output exists and is the input's conversion.")
    flags.DEFINE_string("push", None, "Upload the output to this repository of the hub, org/name.")
    flags.DEFINE_string("base_model", None, "Model card: the LoopLM on the hub. Default: the run's teacher.")
    flags.DEFINE_string("license", LICENSE, "Model card: license of the weights, as the hub spells it.")
    flags.DEFINE_bool("private", False, "With --push: a new repository is private.")


def main(argv: list[str]) -> None:
    """Reads the flags and converts."""
    values = flags.FLAGS
    if values.overwrite and values.keep_existing:
        raise InputError("--overwrite, --keep_existing: expected one of them, found both")
    if not 0 <= values.seed < 2**32:
        raise InputError(f"--seed: expected at least 0 and below 2**32, found {values.seed}")
    if values.dtype and values.dtype_of:
        raise InputError("--dtype, --dtype_of: expected one of them, found both")
    existing = "overwrite" if values.overwrite else "keep" if values.keep_existing else "refuse"
    upload = Upload(values.push, values.base_model, values.license, values.private) if values.push else None
    initialize_distributed()
    dtype = values.dtype
    if values.dtype_of:
        dtype = open_folder(as_path(values.dtype_of, "--dtype_of")).dtype
    changes = Changes(values.gate, values.first_loop, dtype, values.seed)
    convert(values.input, values.output, values.to, changes, existing, upload)


def convert(
    source: PathLike,
    output: PathLike,
    form: Literal["orbax", "published"],
    changes: Changes = Changes(),
    existing: Literal["refuse", "overwrite", "keep"] = "refuse",
    upload: Upload | None = None,
) -> None:
    """Converts a model folder and prints a summary. Every process of a run must call it; process 0 does the work.

    Args:
      source: model to read: a folder in either form, a run's workdir, or a model of the hub.
      output: folder to write.
      form: of the output, "orbax" or "published".
      changes: to the model.
      existing: what to do if `output` exists: "refuse", "overwrite", or "keep" it if it has that form, the gate and
        the input's weights.
      upload: of the output, which must be in published form.

    Raises:
      InputError: the input is not a model folder, the changes contradict it, the output would replace the input or a
        folder that melt_jax did not write in that form, the kept output has another form, gate, dtype or other weights,
        or the hub cannot be reached or refuses. In other processes: process 0 failed.
      FileExistsError: the output exists.
    """
    output = as_path(output, "--output")
    run_on_process_0(_convert_and_upload, os.fspath(source), output, form, changes, existing, upload)


def _convert_and_upload(name, output, form, changes, existing, upload):
    if form not in FORMS:
        raise InputError(f"form: expected one of {', '.join(FORMS)}, found {form!r}")
    if upload is not None and form != "published":
        raise InputError(f"--push: expected --to=published, found {form}; the hub gets published folders")
    name = _model_of_run(name)
    if existing == "keep" and is_complete(output):
        _check_kept(name, output, form, changes)
    else:
        _convert(name, hub.local_folder(name, argument="--input"), output, form, changes, existing)
    if upload is not None:
        _upload(name, output, upload)


def _convert(name, source, output, form, changes, existing):
    start = time.perf_counter()
    if absolute(output) in (absolute(source), *absolute(source).parents):
        raise InputError(f"{output}: expected an output that neither is nor contains the input, found input {source}")

    # Read the input's metadata and decide on the output's.
    folder = open_folder(source)
    config = override(folder.config, gate=changes.gate, first_loop=changes.first_loop)
    dtype = chosen_dtype(folder, changes.dtype)
    if config.gate != "none":
        raise_errors(output, first_loop_errors(config.gate, config.first_loop))
    elif changes.first_loop is not None:
        raise InputError(f"first_loop: expected none for a LoopLM, found {changes.first_loop!r}; omit it")
    folder.check_digests()
    print(f"{name}: {folder.form}, gate {folder.config.gate}, {folder.dtype or 'several dtypes'}")

    # Write it completely or not at all.
    abstract = abstract_model(config, dtype)
    weights = _stream_weights(folder, _fresh_gates(folder, abstract, changes.seed, dtype), abstract, dtype)
    card = [CARD] if form == "published" else []
    with atomic_folder(output, existing == "overwrite", KINDS[form], [source], card) as temporary:
        if form == "orbax":
            write_params(temporary / PARAMS, dict(weights))
        else:
            write_weights(temporary / "model.safetensors", abstract, dtype, weights)
        carried = copy_companions(source, temporary)
        raw = published_config(config, dtype, folder.raw)
        if origin := hub.repository(name):
            raw["_name_or_path"] = origin.name  # copied to a student, whose model card names the LoopLM
        write_config(temporary, add_model_code(temporary, raw) if form == "published" else raw)

    print(f"{output}: {form}, gate {config.gate}, {dtype}, with {', '.join(carried) or 'no tokenizer files'}")
    seconds = time.perf_counter() - start
    print(f"{parameter_count(abstract):,} parameters, {folder_bytes(output):,} bytes, {seconds:.1f} s")


def _fresh_gates(folder, abstract, seed, dtype):
    """{path: weight} of the gates that the input lacks. Drawing needs the most memory, so it precedes all reading."""
    new = {path for path, _ in module_leaves(abstract) if path not in folder.shapes}
    gates = jax.device_get(init_weights(abstract.config, jax.random.key(seed), new, GATE_STD, jnp.dtype(dtype)))
    _release_freed_memory()
    return gates


def _release_freed_memory():
    """Returns freed memory to the operating system if the C library is glibc, which otherwise keeps most of it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _stream_weights(folder, gates, abstract, dtype):
    """Yields (path, weight) of every weight of the output, reading each on demand; shows progress on a terminal."""
    done, total = 0, parameter_count(abstract)
    # Embedding and head first: reading a tensor needs twice its size besides the weights, and these are the largest.
    for path, leaf in sorted(module_leaves(abstract), key=lambda entry: entry[0].startswith("layers.")):
        weight = gates[path] if path in gates else folder.read(path, dtype)
        raise_errors(folder.folder, not_finite_errors(folder, {path: weight}))
        yield path, weight
        done += leaf.size
        if sys.stdout.isatty():
            print(f"\r{done / total:4.0%} {path:40s}", end="\n" if done == total else "", flush=True)


def _upload(source, output, upload):
    """Uploads a published folder with a model card. A README.md that the folder has is the card."""
    card = output / CARD
    if not card.exists():
        write_text(card, model_card(output, upload.name, source, upload.base_model, upload.license))
    try:
        with read_on_disk(output, ("*",)) as on_disk:
            commit = hub.upload(on_disk, upload.name, upload.private)
    except InputError as error:
        raise InputError(f"{error}. {output} is complete: to upload it, add --keep_existing") from error
    print(f"uploaded {output} as {upload.name}: {commit}")


def _model_of_run(name):
    """The model folder of the last phase, if the text names the workdir of a run; else the text."""
    if hub.repository(name) is None and (config := as_path(name, "--input") / "config.json").is_file():
        if phases := read_json(config).get("phases"):
            return os.fspath(config.parent / phases[-1] / "model")
    return name


def _check_kept(name, output, form, changes):
    """Checks that an output that is kept has the form, gate and dtype that it would get, and comes from the input.

    The weights of a model of the hub are known by its name, those of new gates not at all.
    """
    kept, hint = open_folder(output), "remove it, or use another output"
    if kept.form != form:
        raise InputError(f"{output}: expected a model folder in {form} form, found {kept.form} form; {hint}")
    origin = hub.repository(name)
    source = open_folder(name) if origin is None and is_complete(as_path(name)) else kept  # it may have been removed
    gate, dtype = changes.gate or source.config.gate, changes.dtype or source.dtype
    if gate != kept.config.gate:
        raise InputError(f"{output}: expected gate {gate}, found {kept.config.gate}; {hint}")
    if dtype != kept.dtype:
        raise InputError(f"{output}: expected {dtype} weights, found {kept.dtype}; {hint}")
    found = kept.raw.get("_name_or_path")
    if origin and found and found != origin.name:
        raise InputError(f"{output}: expected weights of {origin.name}, found those of {found}; {hint}")
    if source is not kept and source.config.gate == gate and weights_digest(name, dtype) != weights_digest(output):
        raise InputError(f"{output}: expected the weights of {name}, found others; {hint}")
    print(f"{output}: exists and is kept, {kept.form}, gate {kept.config.gate}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
