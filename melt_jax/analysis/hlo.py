"""Reads compiled programs: the FLOPs of their matrix products and the bytes of their collectives, per device.

XLA's `cost_analysis` counts the body of a while loop once, whatever its trip count, and every scan is such a loop.
`analyse` walks the text of a compiled program, `compiled.as_text()`, from its entry through fusions, calls,
asynchronous pairs, the larger branch of conditionals, and loops times their trip counts. It reads what the compilers
for TPU and CPU print.

    program = analyse(jax.jit(f).lower(*arguments).compile().as_text())
    print(program.summary(scopes=("gate", "attention", "mlp")))

A multiply-add is 2 FLOPs; only `dot` and `convolution` count (the TPU's compiler writes products as convolutions).
Products that the compiler turned into multiply and reduce have none, nor have custom calls, which are listed by name.
The CPU's compiler computes bfloat16 in float32: its collectives move twice the bytes.
"""

import collections
import dataclasses
import math
import numbers
import re

from melt_jax.analysis.hlo_loops import read_loop
from melt_jax.analysis.hlo_text import (
    array_bytes,
    array_elements,
    arrays,
    attribute,
    called,
    convolution_flops,
    dot_flops,
    group_size,
    operand_names,
    parse_program,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-broadcast",
               "collective-permute")  # fmt: skip
# Custom calls of the TPU's compiler that compute nothing: they mark places, join slices that were copied one by one
# (ConcatBitcast), and say how the indices of a gather are packed.
START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
MARKERS = (START, DONE, "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast",
           "GatherScatterIndicesBitpacked")  # fmt: skip
PASSES = {"f32 highest": 6, "f32 high": 3}  # bf16 passes that a product of float32 takes on a TPU's matrix unit


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot` or `convolution`.

    Attributes:
      op_name: JAX's name of the operation, with its named scopes; "" where the compiler dropped it.
      precision: the operands' dtypes, "bf16", "f32", "bf16 × f32"; "f32 highest" or "f32 high" where float32 operands
        ask for more than the default.
      count: times it runs in one call of the program.
      flops: of all those times, on one device.
    """

    op_name: str
    precision: str
    count: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: a name of `COLLECTIVES`. A TPU writes reduce-scatter as a fusion of all-reduce and slice: it is that here.
      op_name: JAX's name of the operation.
      group: devices that take part in one of its groups.
      dtype: of what is moved; several joined by " × ".
      count: times it runs in one call of the program.
      bytes: of all those times, on one device, without padding: of the gathered result for all-gather, of the operand
        for the others (for all-reduce, all-to-all and collective-permute the result has the same size).
    """

    kind: str
    op_name: str
    group: int
    dtype: str
    count: float
    bytes: float

    @property
    def sent_bytes(self):
        """Bytes that a device sends where groups are rings: (n−1)/n of `bytes`, twice that for all-reduce."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}.get(
            self.kind, share
        )


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop: JAX's name, its trips, and their source: "text", "trips" (the caller), "unknown" (counted once)."""

    op_name: str
    trips: float
    source: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What one call of a compiled program does on one device; from `analyse`.

    Attributes:
      products: `Product`s, in the order of the text.
      collectives: `Collective`s.
      custom_calls: {target, and a Pallas kernel's name: times}; their FLOPs are not known.
      loops: `Loop`s of all branches, outer ones first.
    """

    products: tuple
    collectives: tuple
    custom_calls: dict
    loops: tuple

    @property
    def flops(self):
        """FLOPs of all products."""
        return sum(product.flops for product in self.products)

    @property
    def bf16_flops(self):
        """FLOPs in bf16 passes of a TPU's matrix unit: float32 takes 6 passes at precision highest, 3 at high."""
        return sum(product.flops * PASSES.get(product.precision, 1) for product in self.products)

    @property
    def collective_bytes(self):
        """Bytes of all collectives, by the convention of `Collective`."""
        return sum(collective.bytes for collective in self.collectives)

    @property
    def unknown_loops(self):
        """The loops whose trip count neither the text nor `trips` told; their bodies are counted once."""
        return tuple(loop for loop in self.loops if loop.source == "unknown")

    def flops_by_precision(self):
        """{precision: FLOPs}, most first."""
        return _totals((product.precision, product.flops) for product in self.products)

    def flops_by_scope(self, scopes):
        """{scope: FLOPs} by the innermost named scope out of `scopes`, most first; "other" where there is none."""
        return _totals((innermost(product.op_name, scopes) or "other", product.flops) for product in self.products)

    def collectives_by_kind(self):
        """{(kind, group, dtype): (times, bytes)}, most bytes first."""
        times, size = collections.Counter(), collections.Counter()
        for collective in self.collectives:
            key = collective.kind, collective.group, collective.dtype
            times[key] += collective.count
            size[key] += collective.bytes
        return {key: (times[key], total) for key, total in size.most_common()}

    def summary(self, scopes=()):
        """The whole as a table to print, in GFLOP and MB (1e9, 1e6); FLOPs also by `scopes` where some are given."""
        lines = [f"matrix products      {self.flops / 1e9:>14,.3f} GFLOP a device"]
        row = lambda name, flops: f"  {name:<19}{flops / 1e9:>14,.3f} {flops / max(self.flops, 1):>7.1%}"
        lines += [row(name, flops) for name, flops in self.flops_by_precision().items()]
        if scopes:
            lines.append("by scope")
            lines += [row(name, flops) for name, flops in self.flops_by_scope(scopes).items()]
        lines.append(f"collectives          {self.collective_bytes / 1e6:>14,.3f} MB a device")
        for (kind, group, dtype), (times, size) in self.collectives_by_kind().items():
            lines.append(f"  {kind:<19}{size / 1e6:>14,.3f} {times:>9,g} times, {dtype}, {group} devices")
        lines += [f"custom call, FLOPs unknown: {name}, {n:,g} times" for name, n in self.custom_calls.items()]
        lines += [f"loop counted once, trips unknown: {loop.op_name}" for loop in self.unknown_loops]
        return "\n".join(lines)


def analyse(text, trips=None):
    """What a compiled program does on one device in one call.

    Args:
      text: `compiled.as_text()`: optimized HLO.
      trips: trip counts of loops whose count the text does not tell, such as a `fori_loop` over a traced bound: a
        function from the loop's op_name to a number or None, or a mapping from names of named scopes around the loop;
        the innermost one counts. A number may be fractional: a mean.

    Returns:
      `Program`. A loop without a count is counted once and stands in `unknown_loops`.

    Raises:
      ValueError: the text is no HLO module, or `trips` gives something other than a number ≥ 0.
    """
    computations, entry, devices = parse_program(text)
    walk = _Walk(computations, devices, _trips_function(trips))
    walk.visit(entry, 1, {}, "")
    return Program(tuple(walk.products), tuple(walk.collectives), dict(walk.custom_calls), tuple(walk.loops))


def innermost(op_name, names):
    """The last of `names` that is a named scope of an op_name; None where none is.

    Transformations wrap scopes: `transpose(jvp(mlp))` is the scope `mlp`.
    """
    return next((word for word in reversed(re.findall(r"[\w.-]+", op_name)) if word in names), None)


def _trips_function(trips):
    if trips is None or callable(trips):
        return trips or (lambda op_name: None)
    return lambda op_name: trips.get(innermost(op_name, trips))


def _totals(pairs):
    totals = collections.Counter()
    for name, value in pairs:
        totals[name] += value
    return dict(totals.most_common())


class _Walk:
    """The walk through a program: what it has met, times the trips of the loops around it."""

    def __init__(self, computations, devices, trips):
        self.computations, self.devices, self.trips = computations, devices, trips
        self.products, self.collectives, self.loops = [], [], []
        self.custom_calls = collections.Counter()

    def visit(self, name, times, state, op_name, fusion=None, under_way=False):
        """Adds what a computation does.

        Args:
          name: of the computation.
          times: it runs.
          state: {index: integer}, elements of a loop's state that never change.
          op_name: of the caller, for instructions without one.
          fusion: the fusion `Instruction` that calls it.
          under_way: its collectives are counted elsewhere.
        """
        computation = self.computations[name]
        under_way = under_way or _continues_collective(name, computation)
        for instruction in computation.values():
            opcode = instruction.opcode.removesuffix("-start")
            own_name = attribute(instruction, "op_name") or op_name
            if opcode in ("dot", "convolution"):
                self._product(computation, instruction, times, own_name)
            elif opcode in COLLECTIVES and not under_way:
                self._collective(computation, instruction, times, own_name, fusion)
            elif opcode == "while":
                self._loop(computation, instruction, times, state, own_name)
            elif opcode == "conditional":
                self._conditional(instruction, times, own_name)
            elif opcode == "fusion":
                self.visit(called(instruction, "calls"), times, {}, own_name, instruction, under_way)
            elif opcode in ("call", "async"):
                callee = called(instruction, "to_apply" if opcode == "call" else "calls")
                self.visit(callee, times, {}, own_name, fusion, under_way)
            elif opcode == "custom-call" and (target := attribute(instruction, "custom_call_target")) not in MARKERS:
                *_, kernel, operation = ("", "", *own_name.split("/"))
                self.custom_calls[f"{target} {kernel}" if operation == "pallas_call" else target] += times

    def _product(self, computation, instruction, times, op_name):
        operands = [arrays(computation[operand].shape)[0] for operand in operand_names(instruction)[:2]]
        flops = (dot_flops if instruction.opcode == "dot" else convolution_flops)(instruction, *operands)
        precision = " × ".join(sorted({dtype for dtype, _ in operands}))
        asked = re.search(r"operand_precision=\{(high\w*)", instruction.attributes)
        if asked and precision == "f32":
            precision = f"f32 {asked[1]}"
        self.products.append(Product(op_name, precision, times, times * flops))

    def _collective(self, computation, instruction, times, op_name, fusion):
        kind = instruction.opcode.removesuffix("-start")
        operands = operand_names(instruction)[: 1 if kind == "collective-permute" else None]
        found = [array for operand in operands for array in arrays(computation[operand].shape)]
        group = group_size(instruction, self.devices)
        size = sum(map(array_bytes, found)) * (group if kind == "all-gather" else 1)
        elements = lambda instruction: sum(map(array_elements, arrays(instruction.shape)))
        if kind == "all-reduce" and fusion and elements(fusion) < elements(instruction):
            kind = "reduce-scatter"
        dtype = " × ".join(sorted({dtype for dtype, _ in found}))
        self.collectives.append(Collective(kind, op_name, group, dtype, times, times * size))

    def _conditional(self, instruction, times, op_name):
        names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        branches = re.findall(r"[\w.-]+", names[1]) if names else [
            called(instruction, "true_computation"), called(instruction, "false_computation")
        ]  # fmt: skip
        walks = []
        for branch in branches:
            walks.append(_Walk(self.computations, self.devices, self.trips))
            walks[-1].visit(branch, times, {}, op_name)
        cost = lambda walk: (sum(x.flops for x in walk.products), sum(x.bytes for x in walk.collectives))
        larger = max(walks, key=cost)
        self.products += larger.products
        self.collectives += larger.collectives
        self.custom_calls.update(larger.custom_calls)
        for walk in walks:
            self.loops += walk.loops

    def _loop(self, computation, instruction, times, state, op_name):
        trips, fixed = read_loop(self.computations, computation, instruction, state)
        source = "text"
        if trips is None:
            trips, source = self.trips(op_name), "trips"
            if trips is not None and not (isinstance(trips, numbers.Real) and 0 <= trips < math.inf):
                raise ValueError(f"trips of the loop {op_name!r}: expected a number of at least 0, found {trips!r}")
        if trips is None:
            trips, source = 1, "unknown"
        self.loops.append(Loop(op_name, trips, source))
        self.visit(called(instruction, "body"), times * trips, fixed, op_name)


def _continues_collective(name, computation):
    """Whether a fused computation's collectives were begun in another.

    A TPU overlaps a collective with products by fusing a copy of it into the fusions that begin it, that run meanwhile,
    and that end it.
    """
    marks = {attribute(call, "custom_call_target") for call in computation.values() if call.opcode == "custom-call"}
    return START not in marks and (DONE in marks or name.startswith("async_collective_fusion"))
