"""The report of `melt_jax.compile`: memory, FLOPs, collectives and the roofline of one compiled program."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from melt_jax.analysis.chips import Chip
from melt_jax.analysis.hlo import Collective, Program, innermost
from melt_jax.analysis.hlo_text import Groups
from melt_jax.analysis.roofline import Roofline, roofline

SCOPES = ("embedding", "gate", "projections", "attention", "near_entries", "cached_blocks", "mlp", "final_norm", "head",
          "cache_write", "sampling", "distillation", "alignment", "cross_entropy", "gradient_sums", "gather_weights",
          "reduce", "optimizer")  # fmt: skip
OWNERS = ("teacher", "student")  # outer scopes whose parts the roofline tells apart
WHOLE_COPY = 0.9  # a step gathers each weight at least once; a lower share means that some were not attributed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
      arguments: inputs of the program.
      temporaries: the compiler's total without arguments and outputs.
      outputs: results that do not reuse the memory of arguments.
      analysed_temporaries: temporaries by `memory_analysis`, which may exceed those that exist at once.
    """

    arguments: int
    temporaries: int
    outputs: int
    analysed_temporaries: int

    @property
    def total(self) -> int:
        """Bytes that a device holds at once."""
        return self.arguments + self.temporaries + self.outputs


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """The weights that a program may gather.

    Attributes:
      groups: devices that gather a weight from each other; empty if every device has its weights whole.
      sizes: elements, on one device, of each weight and of one layer of it, once gathered.
      copy_bytes: of one copy of all models' weights in the compute dtype, on one device, once gathered.
    """

    groups: Groups
    sizes: frozenset[int]
    copy_bytes: float

    @property
    def group(self) -> int:
        """Devices that gather a weight from each other; 1 if weights are whole."""
        return max(map(len, self.groups), default=1)

    def gathered_bytes(self, collectives: Iterable[Collective]) -> tuple[float, float]:
        """The bytes of all-gathers (of weights, of unknown arrays).

        libtpu 0.0.47 and later drop the named scope of most all-gathers. Without it, an all-gather over `groups`
        gathers weights if its arrays have their sizes. Others over `groups`, parts of them, or groups that could not be
        read, are unknown.
        """
        weights = unknown = 0.0
        for collective in collectives:
            if collective.kind != "all-gather" or not self.groups or self._is_elsewhere(collective.groups):
                continue
            scoped = innermost(collective.op_name, SCOPES) == "gather_weights"
            if scoped or (collective.groups == self.groups and self.sizes.issuperset(collective.sizes)):
                weights += collective.bytes
            else:
                unknown += collective.bytes
        return weights, unknown

    def _is_elsewhere(self, groups: Groups | None) -> bool:
        return groups is not None and not all(any(part <= group for group in self.groups) for part in groups)


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory and work of one program. Bytes and FLOPs are per device unless stated otherwise.

    Attributes:
      title: the program and its machine.
      chip: the topology's chip, or None if `chips` has no figures for it.
      devices: in the mesh.
      compile_seconds: for compiling on this machine.
      memory: of one device.
      program: FLOPs and collectives.
      necessary_flops: FLOPs of all devices by `melt_jax.analysis.flops`.
      weights: those that the program may gather.
      steps: the phase's number of steps; 0 if the program is not a training step.
      weight_reads: bytes of weights that a device reads from its memory at least; 0 if not computed.
      tokens: that the program decodes for each sequence; 0 if it does not decode.
      token_bytes: that a device must move for one token of each sequence.
    """

    title: str
    chip: Chip | None
    devices: int
    compile_seconds: float
    memory: Memory
    program: Program
    necessary_flops: float
    weights: StoredWeights
    steps: int
    weight_reads: float = 0
    tokens: int = 0
    token_bytes: float = 0

    @property
    def fits(self) -> bool:
        """Whether the program fits the device's memory; true for an unknown chip."""
        return self.chip is None or self.memory.total <= self.chip.device_memory

    @property
    def flops_ratio(self) -> float:
        """FLOPs of all devices over the necessary ones."""
        return self.program.flops * self.devices / self.necessary_flops

    @property
    def gathered_ratio(self) -> float | None:
        """Bytes of gathered weights over one copy of all models' weights; None if unknown, or if none is gathered."""
        if not self.weights.groups:
            return None
        ratio = self.weights.gathered_bytes(self.program.collectives)[0] / self.weights.copy_bytes
        return ratio if ratio >= WHOLE_COPY else None

    def roofline(self, chip: Chip) -> Roofline:
        """The bounds of the program's time by a chip's peaks, for each named scope."""
        return roofline(self.program, chip, SCOPES, OWNERS)

    def read_seconds(self, chip: Chip) -> float:
        """Seconds in which the weights are read at the peak of a chip's memory."""
        return self.weight_reads / (chip.memory_bandwidth / chip.devices)

    @property
    def moved_token_bytes(self) -> float:
        """Bytes of memory that a device moves to decode one token of each sequence; 0 if the program does not."""
        return self.program.memory_bytes / self.tokens if self.tokens else 0

    def chip_hours(self, chip: Chip) -> tuple[float, float]:
        """The chip-hours of the whole phase at the largest of the roofline's three bounds, and at their sum."""
        whole, chips = self.roofline(chip).whole, self.devices / chip.devices
        least, most = (self.steps * seconds * chips / 3600 for seconds in (whole.bound_seconds, whole.sum_seconds))
        return least, most

    def text(self) -> str:
        """The report as lines to print."""
        memory = self.memory
        limit = ""
        if self.chip:
            limit = f" of {_giga(self.chip.device_memory)}: {'fits' if self.fits else 'DOES NOT FIT'}"
        lines = [
            self.title,
            f"compiled in {self.compile_seconds:.0f} s",
            f"memory per device, GB (1e9 bytes): arguments {_giga(memory.arguments)},"
            f" temporaries {_giga(memory.temporaries)}, outputs {_giga(memory.outputs)},"
            f" total {_giga(memory.total)}{limit}",
            f"(temporaries by memory_analysis: {_giga(memory.analysed_temporaries)})",
            self.program.summary(SCOPES),
            f"necessary {self.necessary_flops / 1e9:,.1f} GFLOP over all devices; compiled / necessary"
            f" {self.flops_ratio:.3f}",
        ]
        if self.flops_ratio < 1:
            lines.append("(below 1: products that XLA rewrote as multiply and reduce are not counted)")
        return "\n".join([*lines, *self._gather_lines(), *self._token_lines(), *self._peak_lines()])

    def record(self) -> dict[str, Any]:
        """The numbers of the tables as plain JSON; chip figures only if the chip is known."""
        kinds = self.program.collectives_by_kind().items()
        record = {
            "title": self.title, "devices": self.devices, "compile_seconds": self.compile_seconds,
            "arguments": self.memory.arguments, "temporaries": self.memory.temporaries,
            "outputs": self.memory.outputs, "total": self.memory.total, "fits": self.fits,
            "flops": self.program.flops, "flops_ratio": self.flops_ratio, "necessary_flops": self.necessary_flops,
            "gather_group": self.weights.group, "gathered_ratio": self.gathered_ratio,
            "unknown_gathers": self.weights.gathered_bytes(self.program.collectives)[1],
            "collective_bytes": self.program.collective_bytes,
            "overlapped_bytes": sum(x.bytes for x in self.program.collectives if x.overlapped),
            "copy_bytes": self.weights.copy_bytes, "steps": self.steps,
            "token_bytes": self.token_bytes, "moved_token_bytes": self.moved_token_bytes,
            "collectives": {f"{kind} {dtype} {group}": moved for (kind, group, dtype), moved in kinds},
        }  # fmt: skip
        if self.chip is None:
            return record
        return record | {
            "chip": self.chip.name, "chips": self.devices // self.chip.devices, "memory": self.chip.device_memory,
            "read_seconds": self.read_seconds(self.chip), "roofline": self.roofline(self.chip).record(),
        }  # fmt: skip

    def _gather_lines(self):
        if not self.weights.groups:
            return []
        gathered, unknown = self.weights.gathered_bytes(self.program.collectives)
        copy = f"one copy of all models, {_giga(self.weights.copy_bytes)} GB"
        if self.gathered_ratio is None:
            return [f"weights gathered: unknown; {_giga(gathered)} GB are attributed to weights, less than {copy};"
                    f" {_giga(unknown)} GB of all-gathers are not attributed"]  # fmt: skip
        rest = f"; {_giga(unknown)} GB of all-gathers are not attributed" if unknown else ""
        return [f"weights gathered: {self.gathered_ratio:.2f} of {copy}{rest}"]

    def _token_lines(self):
        if not self.tokens:
            return []
        moved, needed = self.moved_token_bytes, self.token_bytes
        return [f"memory traffic for a token of each sequence: {_giga(moved)} GB, {moved / needed:.3f} of the"
                f" {_giga(needed)} GB that must move"]  # fmt: skip

    def _peak_lines(self):
        if self.chip is None:
            return []
        whole = self.roofline(self.chip).whole
        lines = [f"at {self.chip.name}'s peak rates: products {whole.product_seconds:.3f} s, memory"
                 f" {whole.memory_seconds:.3f} s, links {whole.collective_seconds:.3f} s"]  # fmt: skip
        if self.weight_reads:
            lines.append(f"weights read from memory: {_giga(self.weight_reads)} GB,"
                         f" {self.read_seconds(self.chip):.3f} s at {self.chip.name}'s peak")  # fmt: skip
        if self.steps:
            least, most = self.chip_hours(self.chip)
            lines.append(f"{self.steps} steps of the phase: {least:,.1f} chip-hours at the slowest of these rates,"
                         f" {most:,.1f} if nothing overlaps")  # fmt: skip
        return [*lines, *self.roofline(self.chip).lines()]


def _giga(number: float) -> str:
    return f"{number / 1e9:,.2f}"
