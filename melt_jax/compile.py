"""Compiles a program for a TPU topology, with no TPU attached, and reports its memory, FLOPs and traffic.

    python -m melt_jax.compile --config=configs/ouro_1_4b.py --topology=v5e:4x4 --phase=alignment \\
        --config.data.batch=4 --config.micro_batches=1

The program is exactly the one that `melt_jax.train` (transition, alignment; evaluate: scoring at the end of a phase) or
`melt_jax.generate` (prefill, decode; decode_looplm: with a LoopLM of the same sizes) runs. The model is that of the
config's teacher if its folder exists, else `config.model`.

Total memory comes from the compiler's memory-usage report, arguments and outputs from `memory_analysis`; temporaries
are the rest. FLOPs and collectives are read from the compiled text and multiplied by the trip counts of the enclosing
loops; the loop over blocks of the cache counts with its mean number of trips. Bytes of HBM are read from the text too
(`melt_jax.analysis.hlo_memory`), and a table bounds the time of each named scope by the chip's peaks
(`melt_jax.analysis.roofline`). The status is 1 if the program does not fit the chip. Needs libtpu: pip install
'jax[tpu]'.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from melt_jax import command_line
from melt_jax.analysis.chips import find_chip
from melt_jax.analysis.decoding import decoding_bytes
from melt_jax.analysis.flops import causal_entries, forward_flops, step_flops, weight_reads
from melt_jax.analysis.hlo import analyse, innermost
from melt_jax.analysis.report import SCOPES, Memory, Report, StoredWeights
from melt_jax.analysis.topology import OFFLINE, describe_devices
from melt_jax.checkpoints import hub
from melt_jax.checkpoints.published_config import read_config
from melt_jax.config import InputError, ModelConfig, TrainConfig, freeze
from melt_jax.data.batch import Batch
from melt_jax.inference import scoring
from melt_jax.inference.generation import STOP_SLOTS, DecodeState, GenerationOptions, decode_block, prefill_chunk
from melt_jax.inference.sampling import GREEDY, SamplingRequest
from melt_jax.model.cache import create_cache
from melt_jax.model.model import abstract_model, parameter_count
from melt_jax.sharding import (
    AXES,
    batch_sharding,
    check_attention,
    check_batch,
    check_kernel,
    for_inference,
    make_mesh,
    partition,
    weight_shardings,
)
from melt_jax.training.compiler_options import compiler_options
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.step import OBJECTIVES, init_state, make_train_step

TRAINING = ("warm_start", "transition", "alignment")
PHASES = (*TRAINING, "evaluate", "prefill", "decode", "decode_looplm")


class DoesNotFitError(InputError):
    """A program that the compiler refuses because it exceeds the chip's memory."""


class Program(NamedTuple):
    """A program to compile.

    Attributes:
      function: the jitted function.
      arguments: abstract arrays with shardings.
      necessary_flops: of all devices.
      trips: mean trips of loops with a traced bound, for `hlo.analyse`.
      gathered: configs of the models whose weights it gathers.
      description: of its inputs, for the report's title.
      read: bytes of weights that a device reads from its memory at least; 0 if not computed.
      static: static arguments of the function.
      tokens: that the program decodes for each sequence.
      token_bytes: that a device must move for one of them.
    """

    function: Any
    arguments: tuple[Any, ...]
    necessary_flops: float
    trips: Mapping[str, float] | Callable[[str], float | None]
    gathered: tuple[ModelConfig, ...]
    description: str
    read: float = 0
    static: Mapping[str, Any] = types.MappingProxyType({})
    tokens: int = 0
    token_bytes: float = 0

    def lower(self) -> Any:
        """The traced program, for the compiler; under its mesh."""
        return self.function.lower(*self.arguments, **self.static)


def make_program(config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh, phase: str) -> Program:
    """The program of a phase, as a command runs it; call it under the mesh. See `compile_phase`."""
    other = {"evaluate": _evaluation_program, "prefill": _prefill_program}
    other |= dict.fromkeys(("decode", "decode_looplm"), _decoding_program)
    return other.get(phase, _training_program)(config, _phase_model(config, model, phase), mesh, phase)


def _phase_model(config: TrainConfig, model: ModelConfig, phase: str) -> ModelConfig:
    """The model that a phase trains or runs."""
    changes = config.student.changes | {"remat": config.remat} | config.computation
    student = dataclasses.replace(model, **changes)
    return _looplm(student) if phase == "decode_looplm" else student


def compile_phase(config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh, phase: str) -> Report:
    """Compiles the program of a phase and returns its `Report`.

    Args:
      config: the run's config.
      model: the LoopLM's config.
      mesh: from `sharding.make_mesh`, of the topology's devices.
      phase: one of `PHASES`. Evaluation scores as many sequences as a run scores at a time. Prefill and decoding
        run `config.data.batch` sequences over a cache of `config.data.length` slots, in each group of devices.

    Raises:
      ShardingError: the mesh does not divide batch or weights.
      DoesNotFitError: the compiler refuses the program for lack of memory.
    """
    kind = mesh.devices.flat[0].device_kind
    with jax.set_mesh(mesh):
        program = make_program(config, model, mesh, phase)
        begin = time.perf_counter()
        try:
            compiled, total = _compile(program.lower())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise DoesNotFitError(f"{phase} on {mesh.size} × {kind} DOES NOT FIT: {reason}") from error
        seconds = time.perf_counter() - begin
    parameters = parameter_count(abstract_model(_phase_model(config, model, phase)))
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return Report(
        f"{phase}: {parameters:,} parameters on {mesh.size} × {kind}, {shape}\n{program.description}",
        find_chip(kind),
        mesh.size,
        seconds,
        _memory(compiled.memory_analysis(), total),
        analyse(compiled.as_text(), program.trips),
        program.necessary_flops,
        _stored_weights(program.gathered, mesh, config.dtype),
        config.phase(phase).steps if phase in TRAINING else 0,
        program.read,
        program.tokens,
        program.token_bytes,
    )


def _compile(lowered):
    """(the compiled program, the total bytes of HBM in the compiler's report, or None without one)."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        for report in pathlib.Path(folder).glob("*memory-usage-report.txt"):
            if found := re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report.read_text()):
                return compiled, int(found[1])
    return compiled, None


def _memory(analysis, total: int | None) -> Memory:
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    return Memory(arguments, temporaries if total is None else total - arguments - outputs, outputs, temporaries)


def _stored_weights(models: Iterable[ModelConfig], mesh, dtype: str) -> StoredWeights:
    """The weights of models that are split over fsdp; without models, no weight is gathered."""
    models, tensor = tuple(models), mesh.shape["tensor"]
    copy_bytes = sum(parameter_count(abstract_model(model)) for model in models) * jnp.dtype(dtype).itemsize / tensor
    if not models or mesh.shape["fsdp"] == 1:
        return StoredWeights(frozenset(), frozenset(), copy_bytes)
    ids = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), AXES.index("fsdp"), -1)
    groups = frozenset(map(frozenset, ids.reshape(-1, mesh.shape["fsdp"]).tolist()))
    sizes = set()
    for model in models:
        for weight in jax.tree.leaves(abstract_model(model), is_leaf=lambda node: isinstance(node, nnx.Variable)):
            axes, shape = partition(weight.axes), weight.get_value().shape
            if "fsdp" in axes:
                gathered = math.prod(shape) // (tensor if "tensor" in axes else 1)
                sizes |= {gathered, gathered // (model.layers if weight.axes[0] == "layers" else 1)}
    return StoredWeights(groups, frozenset(sizes), copy_bytes)


def _training_program(config: TrainConfig, student: ModelConfig, mesh, phase: str) -> Program:
    data, teacher = config.data, _looplm(student)
    check_batch(mesh, data.batch, config.micro_batches)
    check_attention(mesh, config.attention)
    check_kernel(config, student)
    optimizer = make_optimizer(config.phase(phase), config.optimizer, abstract_model(student))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), _placed(abstract_model(student), mesh))
    state = jax.tree.map(lambda x: x if x.sharding else _whole(mesh, x.shape, x.dtype), state)  # counters
    tokens: Any = jax.ShapeDtypeStruct((data.batch, data.length), jnp.int32, sharding=batch_sharding(mesh))
    objective = OBJECTIVES[phase](config)
    options = compiler_options(config.compiler_options, mesh.devices.flat[0].device_kind)
    reads = config.micro_batches * weight_reads(student, phase, data.length, config.chunk_size)
    return Program(
        make_train_step(objective, optimizer, config.micro_batches, config.dtype, config.gather, options),
        (state, _placed(abstract_model(teacher, config.dtype), mesh), Batch(tokens, tokens, tokens)),
        step_flops(student, phase, data.batch, data.length, config.chunk_size).total,
        {"cached_blocks": _mean_blocks(range(0, data.length, config.chunk_size), config)},
        (student, teacher),
        f"{data.batch} sequences of {data.length:,} tokens in {config.micro_batches} part(s), chunks of"
        f" {config.chunk_size}, remat {config.remat!r}, gather {config.gather!r}",
        reads * jnp.dtype(config.dtype).itemsize / mesh.shape["tensor"],
    )


def _looplm(student: ModelConfig) -> ModelConfig:
    """The config of the student's teacher."""
    return dataclasses.replace(student, gate="none", first_loop="copy", window=0, sweeps=1, remat="none")


def _evaluation_program(config: TrainConfig, student: ModelConfig, mesh, phase: str) -> Program:
    del phase
    length, count = config.data.length, scoring.rows_at_a_time(config)
    check_batch(mesh, config.data.batch, config.micro_batches)
    check_attention(mesh, config.attention)
    check_kernel(config, student)
    models = student, _looplm(student)
    stored = (_placed(abstract_model(model), mesh) for model in models)
    weights = [jax.eval_shape(lambda model: scoring.scoring_weights(model, config), model) for model in stored]
    tokens: Any = jax.ShapeDtypeStruct((count, length), jnp.int32, sharding=batch_sharding(mesh))
    entries, sweeps = causal_entries(length), student.sweeps_of(min(config.chunk_size, length))
    flops = [forward_flops(model, entries, sweeps=n).total for model, n in zip(models, (sweeps, 1), strict=True)]
    return Program(
        jax.jit(lambda *inputs: scoring.comparison_sums(*inputs, min(config.chunk_size, length))),
        (*weights, Batch(tokens, tokens, tokens, tokens)),
        count * length * sum(flops),
        {"cached_blocks": _mean_blocks(range(0, length, config.chunk_size), config)},
        models if config.gather == "layer" else (),
        f"{count} sequences of {length:,} tokens, chunks of {config.chunk_size}, gather {config.gather!r}",
    )


def _prefill_program(config: TrainConfig, student: ModelConfig, mesh, phase: str) -> Program:
    del phase
    count, length, chunk = config.data.batch, config.data.length, config.chunk_size
    model, cache = _serving_model(config, student, mesh)
    hidden = _whole(mesh, (student.loops, count, student.width), jnp.dtype(config.dtype))
    arguments = model, cache, hidden, _whole(mesh, (count, chunk)), _whole(mesh, ()), _whole(mesh, (count,))
    flops = forward_flops(student, causal_entries(length), logits=0, sweeps=student.sweeps_of(chunk)).total
    return Program(
        prefill_chunk,
        arguments,
        _groups(mesh) * count * chunk * flops,
        {"cached_blocks": _mean_blocks(range(0, length, chunk), config)},
        (),
        f"{_serving_description(config, mesh)}, chunks of {chunk}",
    )


def _decoding_program(config: TrainConfig, student: ModelConfig, mesh, phase: str) -> Program:
    del phase
    count, length = config.data.batch, config.data.length
    model, cache = _serving_model(config, student, mesh)
    numbers = _whole(mesh, (count,))
    state = DecodeState(numbers, numbers, numbers, _whole(mesh, (count,), jnp.bool_))
    sampling = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, GREEDY))
    sampling = jax.tree.map(lambda x: _whole(mesh, x.shape, x.dtype), sampling)
    request = SamplingRequest(sampling, numbers, _whole(mesh, (STOP_SLOTS,)), _whole(mesh, ()))
    blocks, tokens = _mean_blocks(range(length), config), GenerationOptions(1).block
    needed = decoding_bytes(student, count, (length - 1) / 2, jnp.dtype(config.dtype).itemsize)

    def trips(op_name):
        if innermost(op_name, SCOPES) == "cached_blocks":
            return blocks
        return tokens if op_name.count("while") == 1 else None  # the outermost loop, over a block of tokens

    return Program(
        decode_block,
        (model, cache, state, request),
        _groups(mesh) * count * tokens * forward_flops(student, causal_entries(length), logits=1).total,
        trips,
        (),
        f"{_serving_description(config, mesh)}, {tokens} tokens in a call, one at a time",
        static={"block": tokens},
        tokens=tokens,
        token_bytes=needed.total / mesh.shape["tensor"],
    )


def _serving_model(config: TrainConfig, student: ModelConfig, mesh):
    """The abstract (model, cache) of `melt_jax.generate`."""
    stored = _placed(abstract_model(student, config.dtype), mesh)
    model = jax.eval_shape(lambda model: for_inference(model, config.dtype), stored)
    data, dtype = config.data, jnp.dtype(config.dtype)
    return model, jax.eval_shape(lambda: create_cache(student, data.batch, data.length, dtype))


def _serving_description(config: TrainConfig, mesh) -> str:
    data = config.data
    return f"{data.batch} sequences in each of {_groups(mesh)} group(s) of devices, a cache of {data.length:,} slots"


def _groups(mesh) -> int:
    """The number of groups of devices that hold all weights."""
    return mesh.size // mesh.shape["tensor"]


def _mean_blocks(starts: range, config: TrainConfig) -> float:
    """The mean number of cache blocks that attention visits, over chunks that start at these slots."""
    return sum(math.ceil(start / config.attention_block) for start in starts) / len(starts)


def _whole(mesh, shape, dtype=jnp.int32) -> Any:
    """An abstract array that every device holds whole."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))


def _placed(model, mesh):
    """The abstract model with shardings."""
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, model, weight_shardings(model, mesh))


def looplm_config(config: TrainConfig) -> ModelConfig:
    """The LoopLM's `ModelConfig`: the teacher's, if it is a folder or a model of the hub, else `config.model`.

    Raises:
      InputError: the teacher starts with hf:// and cannot be read.
    """
    if not config.teacher:
        return config.model
    try:
        folder = hub.local_folder(config.teacher, hub.CONFIG)
    except InputError as error:
        if config.teacher.startswith(hub.PREFIX):
            raise
        print(f"{error}; compiling the model of the config", file=sys.stderr)
        return config.model
    return read_config(folder) if folder.is_dir() else config.model


def define_flags() -> None:
    """Defines the command's flags."""
    command_line.define_config_flag()
    flags.DEFINE_string("topology", None, "TPU topology: v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, …", required=True)
    flags.DEFINE_enum("phase", "alignment", PHASES, "The program to compile.")
    flags.DEFINE_bool("json", False, "Print the report's numbers as JSON instead of text.")


def main(argv: list[str]) -> None:
    """Reads the flags, compiles and prints the report; the status is 1 if the program does not fit."""
    del argv
    os.environ.update(OFFLINE)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no memory-usage report
    config, options = freeze(command_line.read_config()), flags.FLAGS
    if not options.topology:
        raise InputError("--topology: expected a topology such as v5e:4x4, found an empty name")
    mesh = make_mesh(config.mesh, describe_devices(options.topology))
    report = compile_phase(config, looplm_config(config), mesh, options.phase)
    print(json.dumps(report.record()) if options.json else report.text())
    sys.exit(0 if report.fits else 1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
