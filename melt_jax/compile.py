"""Compiles a step for a TPU topology with no hardware present: does it fit, what does it compute, what does it move?

    python -m melt_jax.compile --config=configs/ouro_1_4b.py --topology=v5e:4x4 --phase=alignment \\
        --config.data.batch=4 --config.micro_batches=1

The program is the one that `melt_jax.train` (or prefill and decoding of `melt_jax.generate`) would run there. Memory is
the compiler's own: the total is that of its memory-usage report, which is what it compares with the chip's HBM;
arguments and outputs are those of `memory_analysis` (whose temporaries, printed beside, may be more than lie there at
once), and temporaries are the rest. FLOPs and
collectives are read from the compiled text, each times the trips of the loops around it; the loop over blocks of the
cache counts as often as it runs on average. Exit status 1: it does not fit the chip. Needs libtpu: pip install
'jax[tpu]'. The model is that of the config's teacher if its folder exists, else `config.model`.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import time

if __name__ == "__main__":  # before JAX starts: describe TPUs, use none
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from melt_jax import command_line
from melt_jax.analysis.chips import find_chip
from melt_jax.analysis.flops import forward_flops, step_flops
from melt_jax.analysis.hlo import analyse, innermost
from melt_jax.checkpoints.orbax import open_folder
from melt_jax.config import ConfigError, freeze
from melt_jax.data.batch import Batch
from melt_jax.inference.generation import GREEDY, DecodeState, SamplingRequest, decode_block, prefill_chunk
from melt_jax.model.cache import create_cache
from melt_jax.model.model import abstract_model, parameter_count
from melt_jax.sharding import batch_sharding, check_batch, for_inference, make_mesh, weight_shardings
from melt_jax.training.optimizer import make_optimizer
from melt_jax.training.step import init_state, make_train_step, phase_objective

SERVING = ("prefill", "decode")
PHASES = ("transition", "alignment", *SERVING)
SCOPES = ("gate", "attention", "within_chunk", "cached_blocks", "mlp", "distillation", "alignment", "gather_weights",
          "reduce", "optimizer")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """What one program needs and does; per device where nothing else is said, bytes and FLOPs.

    Attributes:
      title: what was compiled, for what.
      chip: `chips.Chip` of the topology, or None.
      devices: in the mesh.
      compile_seconds: to lower and compile, on this machine.
      arguments, temporaries, outputs: bytes; outputs that lie in the place of arguments are not counted again.
      analysed_temporaries: bytes of them by `memory_analysis`.
      program: `hlo.Program`.
      necessary_flops: of what the program does by `melt_jax.analysis.flops`, all devices together.
      gather_group: devices over which the step gathers a weight; 1: weights are whole, and none is gathered.
      copy_bytes: one copy of the student's and one of the teacher's weights in the compute dtype, over tensor.
      steps: of the phase; 0 for prefill and decoding.
    """

    title: str
    chip: object
    devices: int
    compile_seconds: float
    arguments: int
    temporaries: int
    outputs: int
    analysed_temporaries: int
    program: object
    necessary_flops: float
    gather_group: int
    copy_bytes: float
    steps: int

    @property
    def total(self):
        """Bytes that a device holds at once."""
        return self.arguments + self.temporaries + self.outputs

    @property
    def fits(self):
        """Whether that is within the device's memory."""
        return self.chip is None or self.total <= self.chip.device_memory

    @property
    def flops_ratio(self):
        """FLOPs of all devices over the necessary ones."""
        return self.program.flops * self.devices / self.necessary_flops

    @property
    def gathered_ratio(self):
        """Bytes of weights gathered in the step, over one copy of both models' weights; None where none is gathered."""
        if self.gather_group == 1:
            return None
        gathers = (c for c in self.program.collectives if c.kind == "all-gather")
        return sum(c.bytes for c in gathers if innermost(c.op_name, SCOPES) == "gather_weights") / self.copy_bytes

    @property
    def seconds(self):
        """(products at the chip's peak, collectives along one ring of its links at peak), as if neither overlapped the
        other; HBM traffic is not counted."""
        compute = self.program.bf16_flops / self.chip.device_flops
        return compute, sum(c.sent_bytes for c in self.program.collectives) / self.chip.ring_bandwidth

    @property
    def chip_hours(self):
        """Of the whole phase, at the sum of `seconds` a step."""
        return self.steps * sum(self.seconds) * self.devices / self.chip.devices / 3600

    def text(self):
        """The report as lines to print."""
        giga = lambda n: f"{n / 1e9:,.2f}"
        limit = f" of {giga(self.chip.device_memory)}: {'fits' if self.fits else 'DOES NOT FIT'}" if self.chip else ""
        lines = [
            self.title,
            f"compiled in {self.compile_seconds:.0f} s",
            f"memory of a device, GB (1e9 bytes): arguments {giga(self.arguments)},"
            f" temporaries {giga(self.temporaries)}, outputs {giga(self.outputs)}, total {giga(self.total)}{limit}",
            f"(temporaries by memory_analysis: {giga(self.analysed_temporaries)})",
            self.program.summary(SCOPES),
            f"necessary {self.necessary_flops / 1e9:,.1f} GFLOP over all devices; compiled / necessary"
            f" {self.flops_ratio:.3f}",
        ]
        if self.flops_ratio < 1:
            lines.append("(below 1: products that XLA wrote as multiply and reduce are not counted)")
        if self.gathered_ratio is not None:
            copy = f"one copy of both models, {giga(self.copy_bytes)} GB"
            lines.append(f"weights gathered: {self.gathered_ratio:.2f} of {copy}")
        if self.chip:
            compute, links = self.seconds
            lines.append(
                f"at {self.chip.name}'s peak rates: products {compute:.3f} s, collectives {links:.3f} s,"
                f" together {compute + links:.3f} s"
            )
        if self.chip and self.steps:
            lines.append(f"{self.steps} steps of the phase: {self.chip_hours:,.1f} chip-hours at those rates")
        return "\n".join(lines)

    def record(self):
        """What the tables show, as plain numbers; without those that need the figures of a chip not in `chips`."""
        kinds = self.program.collectives_by_kind().items()
        collectives = {f"{kind} {dtype} {group}": (count, size) for (kind, group, dtype), (count, size) in kinds}
        names = ("title", "devices", "compile_seconds", "arguments", "temporaries", "outputs", "total", "fits",
                 "flops_ratio", "necessary_flops", "gathered_ratio", "copy_bytes", "steps")  # fmt: skip
        record = {name: getattr(self, name) for name in names}
        record |= {"flops": self.program.flops, "collectives": collectives}
        if self.chip is None:
            return record
        compute, links = self.seconds
        return record | {
            "chip": self.chip.name, "chips": self.devices // self.chip.devices, "memory": self.chip.device_memory,
            "compute_seconds": compute, "collective_seconds": links, "chip_hours": self.chip_hours,
        }  # fmt: skip


def compile_phase(config, model, mesh, phase):
    """The `Report` of one phase's program.

    Args:
      config: `TrainConfig`.
      model: `ModelConfig` of the LoopLM.
      mesh: of described devices, from `sharding.make_mesh`.
      phase: a name of `PHASES`. Prefill and decoding run `config.data.batch` sequences over a cache of
        `config.data.length` slots, on each of the mesh's groups of devices.

    Raises:
      ShardingError: batch or weights do not divide.
      jax.errors.JaxRuntimeError: the compiler refuses, RESOURCE_EXHAUSTED when memory does not suffice.
    """
    how = {"remat": config.remat, "attention_block": config.attention_block}
    student = dataclasses.replace(model, gate=config.student.gate, first_loop=config.student.first_loop, **how)
    serving = phase in SERVING
    make = _serving_program if serving else _training_program
    with jax.set_mesh(mesh):
        step, inputs, necessary, mean_blocks, copies = make(config, student, mesh, phase)
        begin = time.perf_counter()
        compiled, total = _compile(step.lower(*inputs))
        seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    kind = mesh.devices.flat[0].device_kind
    copy_bytes = sum(parameter_count(abstract_model(c)) for c in copies) * jnp.dtype(config.dtype).itemsize
    return Report(
        _title(config, student, mesh, phase),
        find_chip(kind),
        mesh.size,
        seconds,
        arguments,
        memory.temp_size_in_bytes if total is None else total - arguments - outputs,
        outputs,
        memory.temp_size_in_bytes,
        analyse(compiled.as_text(), mean_blocks),
        necessary,
        1 if serving else mesh.shape["fsdp"],
        copy_bytes / mesh.shape["tensor"],
        0 if serving else config.phase(phase).steps,
    )


def _title(config, student, mesh, phase):
    """What is compiled, for what; of the choices those that the program depends on."""
    data, kind = config.data, mesh.devices.flat[0].device_kind
    shape = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if phase in SERVING:
        chunks = f"chunks of {config.chunk_size}" if phase == "prefill" else "one token at a time"
        how = f"in each of {_groups(mesh)} group(s) of devices, a cache of {data.length:,} slots, {chunks}"
    else:
        how = f"of {data.length:,} tokens in {config.micro_batches} part(s), chunks of {config.chunk_size},"
        how += f" remat {config.remat!r}, gather {config.gather!r}"
    parameters = parameter_count(abstract_model(student))
    return f"{phase}: {parameters:,} parameters on {mesh.size} × {kind}, {shape}\n{data.batch} sequences {how}"


def _groups(mesh):
    """Groups of devices that have the weights whole among them."""
    return mesh.size // mesh.shape["tensor"]


def _compile(lowered):
    """(the compiled program, bytes of HBM that it takes with its arguments by the compiler's report, or None)."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        for report in pathlib.Path(folder).glob("*memory-usage-report.txt"):
            if found := re.search(r"Memory Space: default .*\nTotal bytes: (\d+)", report.read_text()):
                return compiled, int(found[1])
    return compiled, None


def _training_program(config, student, mesh, phase):
    """(step, its abstract arguments, necessary FLOPs, mean trips of dynamic loops, models whose weights it takes)."""
    data, teacher = config.data, dataclasses.replace(student, gate="none", first_loop="copy")
    check_batch(mesh, data.batch, config.micro_batches)
    optimizer = make_optimizer(config.phase(phase), config.optimizer, abstract_model(student))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), _placed(abstract_model(student), mesh))
    row = jax.ShapeDtypeStruct((data.batch, data.length), jnp.int32, sharding=batch_sharding(mesh))
    objective = phase_objective(phase, config.phase(phase), config.chunk_size)
    step = make_train_step(objective, optimizer, config.micro_batches, config.dtype, config.gather)
    arguments = state, _placed(abstract_model(teacher, config.dtype), mesh), Batch(row, row, row)
    necessary = step_flops(student, phase, data.batch, data.length, config.chunk_size).total
    starts = range(0, data.length, config.chunk_size)
    return step, arguments, necessary, {"cached_blocks": _mean_blocks(starts, config)}, (student, teacher)


def _serving_program(config, student, mesh, phase):
    data, count = config.data, config.data.batch
    on_all = jax.NamedSharding(mesh, jax.P())
    whole = lambda shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=on_all)
    stored = _placed(abstract_model(student, config.dtype), mesh)
    model = jax.eval_shape(lambda model: for_inference(model, config.dtype), stored)
    cache = jax.eval_shape(lambda: create_cache(student, count, data.length, jnp.dtype(config.dtype)))
    if phase == "prefill":
        hidden = whole((student.loops, count, student.width), jnp.dtype(config.dtype))
        arguments = model, cache, hidden, whole((count, config.chunk_size)), whole(()), whole((count,))
        starts = range(0, data.length, config.chunk_size)
        tokens, rows = count * config.chunk_size, (data.length + 1) / 2
        necessary = _groups(mesh) * tokens * forward_flops(student, rows, logits=0).total
        return prefill_chunk, arguments, necessary, {"cached_blocks": _mean_blocks(starts, config)}, (student,)
    state = DecodeState(whole((count,)), whole((count,)), whole((count,)), whole((count,), jnp.bool_))
    sampling = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, GREEDY))
    sampling = jax.tree.map(lambda x: whole(x.shape, x.dtype), sampling)
    request = SamplingRequest(sampling, whole((count,)), whole((8,)), whole(()))
    necessary = _groups(mesh) * count * forward_flops(student, (data.length + 1) / 2, logits=1).total
    blocks = _mean_blocks(range(data.length), config)
    # One token: what loops remain beside that over blocks runs once.
    trips = lambda op_name: blocks if innermost(op_name, SCOPES) == "cached_blocks" else 1
    return decode_block, (model, cache, state, request), necessary, trips, (student,)


def _mean_blocks(starts, config):
    """Blocks of the cache that attention visits, the mean over chunks that start at these slots."""
    return sum(math.ceil(start / config.attention_block) for start in starts) / len(starts)


def _placed(model, mesh):
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, model, weight_shardings(model, mesh))


def describe_devices(topology):
    """The devices of a topology such as "v5e:4x4", described by libtpu.

    Raises:
      ConfigError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for a TPU needs its compiler, libtpu: pip install 'jax[tpu]'")
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # libtpu raises whatever it likes
        expected = "--topology: expected one such as v5e:4x4 or v5p:2x2x2"
        raise ConfigError(f"{expected}, found {topology!r}: {error}") from error


def looplm_config(config):
    """The `ModelConfig` of the LoopLM: of the teacher's folder if it exists, else `config.model`."""
    return open_folder(config.teacher).config if pathlib.Path(config.teacher).is_dir() else config.model


def define_flags() -> None:
    """Defines the flags of this command."""
    command_line.define_config_flag()
    flags.DEFINE_string("topology", None, "TPU topology: v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, …", required=True)
    flags.DEFINE_enum("phase", "alignment", PHASES, "The program to compile.")
    flags.DEFINE_bool("json", False, "Print a table's numbers as JSON instead of the report.")


def main(argv: list[str]) -> None:
    """Compiles as the flags say and prints the report; the status is 1 if the program does not fit."""
    config, options = freeze(command_line.read_config()), flags.FLAGS
    mesh = make_mesh(config.mesh, describe_devices(options.topology))
    try:
        report = compile_phase(config, looplm_config(config), mesh, options.phase)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{options.phase} on {options.topology} DOES NOT FIT: {str(error).splitlines()[0]}")
        sys.exit(1)
    print(json.dumps(report.record()) if options.json else report.text())
    sys.exit(0 if report.fits else 1)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
