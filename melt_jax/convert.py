"""Converts model checkpoints between the published form and Orbax's, there and back to the same bits.

    python -m melt_jax.convert --input=Ouro-1.4B-Thinking --output=checkpoints/ouro --to=orbax
    python -m melt_jax.convert --input=Ouro-1.4B-Thinking --output=checkpoints/melt --to=orbax --gate=elementwise
    python -m melt_jax.convert --input=checkpoints/melt --output=melt-published --to=published
    python -m melt_jax.convert --input=checkpoints/melt --output=ouro-again --to=published --gate=none

A published folder has config.json, one or several safetensors files and tokenizer files; the Orbax form has the same
config.json and tokenizer files, and the weights under `params/`. With --gate=elementwise or scalar a LoopLM gets fresh
gates (normal with standard deviation 0.02, biases zero, drawn from --seed) and becomes a MELT; with --gate=none a MELT
loses them. The output appears when it is complete, and not before.
"""

import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from melt_jax.checkpoints.orbax import PARAMS, open_folder, write_params
from melt_jax.checkpoints.published import chosen_dtype, override, write_weights
from melt_jax.checkpoints.published_config import fail, published_config, write_config
from melt_jax.config import CHOICES, GATES, first_loop_errors
from melt_jax.files import atomic_folder, copy_companions, folder_bytes
from melt_jax.model.model import abstract_model, init_weights, module_leaves, parameter_count

GATE_STD = 0.02

FLAGS = flags.FLAGS
flags.DEFINE_string("input", None, "folder of the checkpoint to read, in either form", required=True)
flags.DEFINE_string("output", None, "folder to write", required=True)
flags.DEFINE_enum("to", None, ["orbax", "published"], "form of the output", required=True)
flags.DEFINE_enum("gate", None, GATES, "gate of the output's model; as the input's when not given")
flags.DEFINE_enum(
    "first_loop", None, CHOICES["first_loop"], "first loop of the output's model; as the input's when not given"
)
flags.DEFINE_integer("seed", 0, "draws fresh gates")
flags.DEFINE_enum("dtype", None, CHOICES["dtype"], "dtype of the output's weights; as the input's when not given")
flags.DEFINE_bool("overwrite", False, "replace the output folder if it exists")


def main(argv):
    """Converts, or says what stands in the way."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
    try:
        convert()
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"melt_jax.convert: {error}")


def convert():
    """The conversion that the flags ask for.

    Raises:
      ValueError: an input that is no checkpoint, or flags that contradict it. FileExistsError: the output exists.
    """
    start = time.perf_counter()

    # What stands there, checked; what is to be.
    source = open_folder(FLAGS.input)
    config = override(source.config, FLAGS.gate, FLAGS.first_loop)
    dtype = chosen_dtype(source, FLAGS.dtype)
    abstract = abstract_model(config, dtype)
    if config.gate != "none":
        fail(FLAGS.output, first_loop_errors(config.gate, config.first_loop))
    elif FLAGS.first_loop is not None:
        fail(
            "--first_loop", ["the output is a LoopLM, which has no cache recurrence: give --gate too, or leave it out"]
        )
    print(f"{FLAGS.input}: {source.form}, gate {source.config.gate}, {source.dtype or 'several dtypes'}")

    # Fresh gates, if the input has none, drawn before anything is read, for that takes several times their size. Then
    # the input's weights, one at a time.
    new = {path for path, _ in module_leaves(abstract) if path not in source.shapes}
    gates = jax.device_get(init_weights(config, jax.random.key(FLAGS.seed), new, GATE_STD, jnp.dtype(dtype)))
    weights = stream_weights(source, gates, abstract, dtype)

    # Written whole or not at all.
    with atomic_folder(FLAGS.output, FLAGS.overwrite) as folder:
        if FLAGS.to == "orbax":
            write_params(folder / PARAMS, dict(weights))
        else:
            write_weights(folder / "model.safetensors", abstract, dtype, weights)
        carried = copy_companions(FLAGS.input, folder)
        write_config(folder, published_config(config, dtype, source.raw))

    print(f"{FLAGS.output}: {FLAGS.to}, gate {config.gate}, {dtype}, with {', '.join(carried) or 'no tokenizer files'}")
    seconds = time.perf_counter() - start
    print(f"{parameter_count(abstract):,} parameters, {folder_bytes(FLAGS.output):,} bytes, {seconds:.1f} s")


def stream_weights(source, gates, abstract, dtype):
    """(path, weight) of every weight of the output, each read in its turn; a line of progress on the terminal."""
    done, total = 0, parameter_count(abstract)
    # Embedding and head first: reading a tensor takes twice its size beside the weights, and these are the largest.
    for path, leaf in sorted(module_leaves(abstract), key=lambda entry: entry[0].startswith("layers.")):
        yield path, gates[path] if path in gates else source.read(path, dtype)
        done += leaf.size
        if sys.stdout.isatty():
            print(f"\r{done / total:4.0%} {path:40s}", end="\n" if done == total else "", flush=True)


if __name__ == "__main__":
    app.run(main)
