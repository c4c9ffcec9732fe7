"""Counts the FLOPs of matrix products and the bytes of memory and of collectives in compiled programs, per device.

XLA's `cost_analysis` counts the body of a while loop once, whatever its trip count, and every scan is such a loop.
`analyse` walks the text of a compiled program, `compiled.as_text()`, from its entry through fusions, calls,
asynchronous pairs and the larger branch of conditionals, and multiplies loops by their trip counts. It reads the output
of the TPU and CPU compilers.

    program = analyse(jax.jit(f).lower(*arguments).compile().as_text())
    print(program.summary(scopes=("gate", "attention", "mlp")))

A multiply-add is 2 FLOPs. `dot` and `convolution` count (the TPU's compiler writes matrix products as convolutions),
and so do Pallas kernels, by their own cost estimates (`hlo_kernels`). Products that the compiler rewrote as multiply
and reduce do not count, nor do other custom calls, which are listed by name. `hlo_memory` defines the bytes of memory.
The CPU's compiler computes bfloat16 in float32, so its collectives move twice the bytes.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from melt_jax.analysis.hlo_kernels import read_kernel
from melt_jax.analysis.hlo_loops import read_loop
from melt_jax.analysis.hlo_memory import traffic
from melt_jax.analysis.hlo_text import (
    Computation,
    Groups,
    Instruction,
    array_bytes,
    array_elements,
    arrays,
    attribute,
    convolution_flops,
    dot_flops,
    group_size,
    operand_names,
    parse_program,
    plain_attribute,
    replica_groups,
    result_sides,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-broadcast",
               "collective-permute")  # fmt: skip
# Custom calls of the TPU's compiler that compute nothing: they mark positions, join slices that were copied one by one
# (ConcatBitcast), or describe how the indices of a gather are packed.
START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
MARKERS = (START, DONE, "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast",
           "GatherScatterIndicesBitpacked")  # fmt: skip
PASSES = {"f32 highest": 6, "f32 high": 3}  # bf16 passes of a float32 product on a TPU's matrix unit

Trips = Callable[[str], float | None]


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot` or `convolution`, or the products of a Pallas kernel.

    Attributes:
      op_name: JAX's name of the operation, with its named scopes; "" if the compiler dropped it.
      precision: the operands' dtypes, "bf16", "f32", "bf16 × f32"; "f32 highest" or "f32 high" if float32 operands
        request more than the default.
      count: executions in one call of the program.
      flops: of all executions, on one device.
      sides: (the size that is summed over, the smaller of the result's rows and columns).
    """

    op_name: str
    precision: str
    count: float
    flops: float
    sides: tuple[int, int]

    def rate(self, unit: int) -> float:
        """The share of the peak that a matrix unit of `unit` × `unit` reaches.

        A half for each side of at most half the unit, such as heads of 128 on units of 256: either a part of the unit
        holds nothing, or fewer rows pass than it takes to load the next square.
        """
        return 0.5 ** sum(side <= unit // 2 for side in self.sides)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """An instruction that reads or writes memory; see `hlo_memory`.

    Attributes:
      op_name: JAX's name of the operation; "" if the compiler dropped it.
      used_by: the op_name of the first instruction that uses the result, such as the product for which a weight is
        copied to VMEM; "" if there is none.
      opcode: of the instruction.
      count: executions in one call of the program.
      read: bytes read by all executions, on one device.
      written: bytes written by all executions.
    """

    op_name: str
    used_by: str
    opcode: str
    count: float
    read: float
    written: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: one of `COLLECTIVES`. The TPU's fusion of all-reduce and slice is called reduce-scatter.
      op_name: JAX's name of the operation.
      group: number of devices in one of its groups.
      dtype: of the arrays it moves; several are joined by " × ".
      count: executions in one call of the program.
      bytes: of all executions, on one device, without padding: of the gathered result for all-gather, of the operand
        for the others (for all-reduce, all-to-all and collective-permute the result has the same size).
      groups: the devices of each group; None for a permutation or an unknown format.
      sizes: elements of each array, counted as `bytes` is.
      overlapped: whether other work may run between its start and its end.
    """

    kind: str
    op_name: str
    group: int
    dtype: str
    count: float
    bytes: float
    groups: Groups | None
    sizes: tuple[int, ...]
    overlapped: bool = False

    @property
    def hops(self) -> int:
        """Hops between neighbours, one after the other, if groups are rings that send in both directions."""
        return (self.group // 2) * {"all-reduce": 2}.get(self.kind, 1) if self.kind != "collective-permute" else 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends if groups are rings: (n−1)/n of `bytes`, twice that for all-reduce."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}.get(
            self.kind, share
        )


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop: JAX's name, trips, and their source: "text", "trips" (the caller) or "unknown" (counted once)."""

    op_name: str
    trips: float
    source: str


@dataclasses.dataclass(frozen=True)
class Program:
    """The work of one call of a compiled program on one device; from `analyse`.

    Attributes:
      products: matrix products, in the order of the text.
      collectives: in the same order.
      custom_calls: those of unknown FLOPs, {target, followed by a Pallas kernel's name: executions}.
      loops: of all branches, outer loops first.
      transfers: in the order of the text.
    """

    products: tuple[Product, ...]
    collectives: tuple[Collective, ...]
    custom_calls: dict[str, float]
    loops: tuple[Loop, ...]
    transfers: tuple[Transfer, ...] = ()

    @property
    def flops(self) -> float:
        """FLOPs of all products."""
        return sum(product.flops for product in self.products)

    @property
    def bf16_flops(self) -> float:
        """FLOPs in bf16 passes of a TPU's matrix unit: float32 takes 6 passes at precision highest, 3 at high."""
        return sum(product.flops * PASSES.get(product.precision, 1) for product in self.products)

    @property
    def memory_bytes(self) -> float:
        """Bytes that are read from memory and written to it."""
        return sum(transfer.read + transfer.written for transfer in self.transfers)

    @property
    def collective_bytes(self) -> float:
        """Bytes of all collectives, by the convention of `Collective`."""
        return sum(collective.bytes for collective in self.collectives)

    @property
    def unknown_loops(self) -> tuple[Loop, ...]:
        """Loops whose trip count neither the text nor `trips` gives; their bodies are counted once."""
        return tuple(loop for loop in self.loops if loop.source == "unknown")

    def flops_by_precision(self) -> dict[str, float]:
        """{precision: FLOPs}, largest first."""
        return _totals((product.precision, product.flops) for product in self.products)

    def flops_by_scope(self, scopes: Iterable[str]) -> dict[str, float]:
        """{innermost of `scopes`: FLOPs}, largest first; "other" for products in none of them."""
        return _totals((innermost(product.op_name, scopes) or "other", product.flops) for product in self.products)

    def collectives_by_kind(self) -> dict[tuple[str, int, str], tuple[float, float]]:
        """{(kind, group, dtype): (executions, bytes)}, largest first."""
        key = lambda collective: (collective.kind, collective.group, collective.dtype)
        times = _totals((key(collective), collective.count) for collective in self.collectives)
        size = _totals((key(collective), collective.bytes) for collective in self.collectives)
        return {key: (times[key], total) for key, total in size.items()}

    def summary(self, scopes: Iterable[str] = ()) -> str:
        """A table to print, in GFLOP and MB (1e9, 1e6), with FLOPs by scope if `scopes` are given."""
        lines = [f"matrix products      {self.flops / 1e9:>14,.3f} GFLOP per device"]
        row = lambda name, flops: f"  {name:<19}{flops / 1e9:>14,.3f} {flops / max(self.flops, 1):>7.1%}"
        lines += [row(name, flops) for name, flops in self.flops_by_precision().items()]
        if scopes:
            lines.append("by scope")
            lines += [row(name, flops) for name, flops in self.flops_by_scope(scopes).items()]
        overlapped = sum(collective.bytes for collective in self.collectives if collective.overlapped)
        lines.append(f"collectives          {self.collective_bytes / 1e6:>14,.3f} MB per device,"
                     f" {overlapped / 1e6:,.3f} of them beside other work")  # fmt: skip
        for (kind, group, dtype), (times, size) in self.collectives_by_kind().items():
            lines.append(f"  {kind:<19}{size / 1e6:>14,.3f} {times:>9,g} times, {dtype}, {group} devices")
        lines += [f"custom call, FLOPs unknown: {name}, {n:,g} times" for name, n in self.custom_calls.items()]
        lines += [f"loop counted once, trips unknown: {loop.op_name}" for loop in self.unknown_loops]
        return "\n".join(lines)


def analyse(text: str, trips: Trips | Mapping[str, float] | None = None) -> Program:
    """Counts the work of one call of a compiled program on one device.

    Args:
      text: `compiled.as_text()`, optimized HLO.
      trips: trip counts of loops that have none in the text, such as a `fori_loop` over a traced bound: a function from
        the loop's op_name to a number or None, or a mapping from named scopes, of which the innermost around the loop
        applies. A mean may be fractional. For a Pallas kernel that runs in blocks, the number of blocks that it
        visits; without one, all count.

    Returns:
      `Program`. A loop without a trip count is counted once and is listed in `unknown_loops`.

    Raises:
      ValueError: the text is not an HLO module, or `trips` returns a number below 0 or infinity.
    """
    computations, entry, devices = parse_program(text)
    walk = _Walk(computations, devices, _trips_function(trips))
    walk.visit(entry, 1, {}, "")
    return Program(
        tuple(walk.products),
        tuple(walk.collectives),
        dict(walk.custom_calls),
        tuple(walk.loops),
        tuple(walk.transfers),
    )


def innermost(op_name: str, names: Iterable[str]) -> str | None:
    """The innermost named scope of an op_name that is in `names`, or None.

    Transformations wrap scopes: `transpose(jvp(mlp))` is the scope `mlp`.
    """
    return next((word for word in reversed(re.findall(r"[\w.-]+", op_name)) if word in names), None)


def _trips_function(trips):
    if trips is None or callable(trips):
        return trips or (lambda op_name: None)
    return lambda op_name: trips.get(innermost(op_name, trips))


def _totals(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    totals: dict[Any, float] = collections.defaultdict(float)
    for name, value in pairs:
        totals[name] += value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


class _Walk:
    """Walks through a program and adds up its work, multiplied by the trip counts of the enclosing loops."""

    def __init__(self, computations: dict[str, Computation], devices: int, trips: Trips):
        self.computations, self.devices, self.trips = computations, devices, trips
        self.products: list[Product] = []
        self.collectives: list[Collective] = []
        self.transfers: list[Transfer] = []
        self.loops: list[Loop] = []
        self.custom_calls = collections.Counter()

    def visit(self, name, times, state, op_name, fusion=None, under_way=False):
        """Adds the work of a computation.

        Args:
          name: the computation's name.
          times: its executions.
          state: {index: integer}, elements of a loop's state that never change.
          op_name: the caller's, for instructions without one.
          fusion: the fusion `Instruction` that calls it.
          under_way: whether its collectives are counted elsewhere.
        """
        computation = self.computations[name]
        under_way = under_way or _continues_collective(name, computation)
        for instruction in computation.values():
            opcode = instruction.opcode.removesuffix("-start")
            own_name = attribute(instruction, "op_name") or op_name
            kernel = read_kernel(instruction)
            visited = self._visited_blocks(kernel, own_name)
            if fusion is None:
                self._transfer(computation, instruction, times, own_name, visited)
            if opcode in ("dot", "convolution"):
                self._product(computation, instruction, times, own_name)
            elif opcode in COLLECTIVES and not under_way:
                self._collective(computation, instruction, times, own_name, fusion)
            elif opcode == "while":
                self._loop(computation, instruction, times, state, own_name)
            elif opcode == "conditional":
                self._conditional(instruction, times, own_name)
            elif opcode == "fusion":
                self.visit(plain_attribute(instruction, "calls"), times, {}, own_name, instruction, under_way)
            elif opcode in ("call", "async"):
                callee = plain_attribute(instruction, "to_apply" if opcode == "call" else "calls")
                self.visit(callee, times, {}, own_name, fusion, under_way)
            elif kernel:
                self._kernel(computation, instruction, times, own_name, kernel, visited)
            elif opcode == "custom-call" and (target := attribute(instruction, "custom_call_target")) not in MARKERS:
                *_, kernel, operation = ("", "", *own_name.split("/"))
                self.custom_calls[f"{target} {kernel}" if operation == "pallas_call" else target] += times

    def _product(self, computation, instruction, times, op_name):
        lhs, rhs = (arrays(computation[operand].shape)[0] for operand in operand_names(instruction)[:2])
        flops = (dot_flops if instruction.opcode == "dot" else convolution_flops)(instruction, lhs, rhs)
        precision = " × ".join(sorted({lhs[0], rhs[0]}))
        asked = re.search(r"operand_precision=\{(high\w*)", instruction.attributes)
        if asked and precision == "f32":
            precision = f"f32 {asked[1]}"
        summed = flops // (2 * max(array_elements(arrays(instruction.shape)[0]), 1))
        sides = (summed, min(result_sides(instruction, lhs, rhs)))
        self.products.append(Product(op_name, precision, times, times * flops, sides))

    def _visited_blocks(self, kernel, op_name):
        """The number of blocks that a kernel visits; infinity, which stands for all, if `trips` has none."""
        trips = self.trips(op_name) if kernel and kernel.blocks > 1 else None
        return math.inf if trips is None else trips

    def _kernel(self, computation, instruction, times, op_name, kernel, visited):
        dtypes = {arrays(computation[name].shape)[0][0] for name in operand_names(instruction)}
        precision = "bf16" if "bf16" in dtypes else "f32 highest"
        share = kernel.whole + (1 - kernel.whole) * min(visited / kernel.blocks, 1)
        self.products.append(Product(op_name, precision, times, times * kernel.flops * share, kernel.sides))

    def _transfer(self, computation, instruction, times, op_name, visited):
        if attribute(instruction, "custom_call_target") in MARKERS:
            return
        moved = traffic(self.computations, computation, instruction, visited)
        if moved.total:
            read, written = (times * size for size in moved)
            used_by = _name_of_use(computation, instruction)
            self.transfers.append(Transfer(op_name, used_by, instruction.opcode, times, read, written))

    def _collective(self, computation, instruction, times, op_name, fusion):
        kind = instruction.opcode.removesuffix("-start")
        operands = operand_names(instruction)[: 1 if kind == "collective-permute" else None]
        found = [array for operand in operands for array in arrays(computation[operand].shape)]
        group = group_size(instruction, self.devices)
        copies = group if kind == "all-gather" else 1
        size = sum(map(array_bytes, found)) * copies
        if kind == "all-reduce" and fusion and _elements(fusion) < _elements(instruction):
            kind = "reduce-scatter"
        dtype = " × ".join(sorted({dtype for dtype, _ in found}))
        groups = replica_groups(instruction, self.devices)
        sizes = tuple(copies * array_elements(array) for array in found)
        overlapped = instruction.opcode.endswith("-start") or START in _marks(computation)
        found = Collective(kind, op_name, group, dtype, times, times * size, groups, sizes, overlapped)
        self.collectives.append(found)

    def _conditional(self, instruction, times, op_name):
        names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        branches = re.findall(r"[\w.-]+", names[1]) if names else [
            plain_attribute(instruction, "true_computation"), plain_attribute(instruction, "false_computation")
        ]  # fmt: skip
        walks = []
        for branch in branches:
            walks.append(_Walk(self.computations, self.devices, self.trips))
            walks[-1].visit(branch, times, {}, op_name)
        cost = lambda walk: (
            sum(x.flops for x in walk.products),
            sum(x.bytes for x in walk.collectives),
            sum(x.read + x.written for x in walk.transfers),
        )
        larger = max(walks, key=cost)
        self.products += larger.products
        self.collectives += larger.collectives
        self.transfers += larger.transfers
        self.custom_calls.update(larger.custom_calls)
        for walk in walks:
            self.loops += walk.loops

    def _loop(self, computation, instruction, times, state, op_name):
        trips, fixed = read_loop(self.computations, computation, instruction, state)
        source = "text"
        if trips is None:
            trips, source = self.trips(op_name), "trips"
            if trips is not None and not 0 <= trips < math.inf:
                raise ValueError(f"trips of the loop {op_name!r}: expected a number of at least 0, found {trips!r}")
        if trips is None:
            trips, source = 1, "unknown"
        self.loops.append(Loop(op_name, trips, source))
        self.visit(plain_attribute(instruction, "body"), times * trips, fixed, op_name)


def _name_of_use(computation, instruction):
    """The op_name of the first named instruction that uses a result, found through copies and other nameless ones."""
    waiting, seen = [instruction.name], set()
    while waiting:
        name = waiting.pop(0)
        for user in computation.values():
            if user.name not in seen and name in operand_names(user):
                if found := attribute(user, "op_name"):
                    return found
                seen.add(user.name)
                waiting.append(user.name)
    return ""


def _elements(instruction: Instruction) -> int:
    return sum(map(array_elements, arrays(instruction.shape)))


def _marks(computation):
    """The targets of a computation's custom calls."""
    return {attribute(call, "custom_call_target") for call in computation.values() if call.opcode == "custom-call"}


def _continues_collective(name, computation):
    """Whether the collectives of a fused computation were started in another.

    A TPU overlaps a collective with products by fusing a copy of it into the fusion that starts it, those that run
    meanwhile, and the one that ends it.
    """
    marks = _marks(computation)
    return START not in marks and (DONE in marks or name.startswith("async_collective_fusion"))
