"""Bounds of a compiled program's time by a chip's peaks, for each named scope: products, memory, links.

    products    FLOPs at the peak of the matrix units; half of it for each side of at most half a unit
    memory      bytes of `hlo_memory` at the peak bandwidth of HBM
    links       bytes along one ring of the links, plus the latency of each hop of each collective

A step takes at least as long as the largest of the three, and their sum if nothing overlaps. None is a measurement.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from melt_jax.analysis.chips import HOP_SECONDS, Chip
from melt_jax.analysis.hlo import PASSES, Program, innermost

UNATTRIBUTED = "not attributed"


@dataclasses.dataclass
class Part:
    """The work of one scope on one device; see `roofline`.

    Attributes:
      flops: in bf16 passes of the matrix unit.
      full_rate_seconds: of the products, if all ran at the peak.
      product_seconds: of the products.
      memory_bytes: read and written.
      memory_seconds: at the peak bandwidth.
      collectives: number of executions.
      sent_bytes: by collectives.
      collective_seconds: bytes and latency.
    """

    flops: float = 0
    full_rate_seconds: float = 0
    product_seconds: float = 0
    memory_bytes: float = 0
    memory_seconds: float = 0
    collectives: float = 0
    sent_bytes: float = 0
    collective_seconds: float = 0

    @property
    def bound_seconds(self) -> float:
        """The largest of the three times."""
        return max(self.product_seconds, self.memory_seconds, self.collective_seconds)

    @property
    def sum_seconds(self) -> float:
        """The sum of the three times."""
        return self.product_seconds + self.memory_seconds + self.collective_seconds

    @property
    def bound(self) -> str:
        """The name of the largest of the three times."""
        times = {
            "products": self.product_seconds,
            "memory": self.memory_seconds,
            "links": self.collective_seconds,
        }
        return max(times, key=lambda name: times[name])

    def add(self, other: "Part") -> None:
        """Adds another part's work to this one."""
        for field in dataclasses.fields(Part):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """{scope: `Part`}, the slowest first, and the whole program as one `Part`."""

    parts: dict[str, Part]
    whole: Part

    def lines(self) -> list[str]:
        """A table to print: a scope per line, times in ms."""
        lines = [f"{'ms at peak, by scope':<26}{'products':>10}{'memory':>10}{'links':>10}{'GFLOP':>13}{'GB':>10}"
                 f"{'sent, GB':>10}{'times':>9}"]  # fmt: skip
        for name, part in (*self.parts.items(), ("all", self.whole)):
            times = (part.product_seconds, part.memory_seconds, part.collective_seconds)
            cells = "".join(f"{seconds * 1e3:>10,.2f}" for seconds in times)
            lines.append(f"  {name:<24}{cells}{part.flops / 1e9:>13,.1f}{part.memory_bytes / 1e9:>10,.3f}"
                         f"{part.sent_bytes / 1e9:>10,.3f}{part.collectives:>9,.0f}")  # fmt: skip
        whole = self.whole
        narrow = whole.product_seconds - whole.full_rate_seconds
        if narrow:
            lines.append(
                f"  of the products' time, {narrow * 1e3:,.2f} ms are due to sides of at most half a matrix unit"
            )
        lines.append(f"bound: {whole.bound}, {whole.bound_seconds * 1e3:,.2f} ms; all three in turn"
                     f" {whole.sum_seconds * 1e3:,.2f} ms")  # fmt: skip
        return lines

    def record(self) -> dict[str, Any]:
        """The numbers as plain JSON."""
        parts = {name: dataclasses.asdict(part) for name, part in self.parts.items()}
        bounds = {name: getattr(self.whole, name) for name in ("bound", "bound_seconds", "sum_seconds")}
        return dataclasses.asdict(self.whole) | bounds | {"scopes": parts}


def roofline(program: Program, chip: Chip, scopes: Iterable[str], owners: Iterable[str] = ()) -> Roofline:
    """The bounds of a program, by named scope.

    Args:
      program: from `analyse`.
      chip: whose peaks apply.
      scopes: names of scopes; the innermost one around an operation counts. A transfer without one counts for the
        scope that uses its result. Work in none of them is `UNATTRIBUTED`.
      owners: outer scopes, such as "teacher", that are told apart: their parts are "teacher attention" and so on.
    """
    scopes, owners = tuple(scopes), tuple(owners)
    parts: dict[str, Part] = collections.defaultdict(Part)

    def name(*op_names):
        scope = next(filter(None, (innermost(op_name, scopes) for op_name in op_names)), UNATTRIBUTED)
        owner = next(filter(None, (innermost(op_name, owners) for op_name in op_names)), "")
        return f"{owner} {scope}".strip()

    for product in program.products:
        flops = product.flops * PASSES.get(product.precision, 1)
        full = flops / chip.device_flops
        parts[name(product.op_name)].add(Part(flops, full, full / product.rate(chip.matrix_unit)))
    for transfer in program.transfers:
        size = transfer.read + transfer.written
        part = Part(memory_bytes=size, memory_seconds=size / chip.device_bandwidth)
        parts[name(transfer.op_name, transfer.used_by)].add(part)
    for collective in program.collectives:
        seconds = collective.sent_bytes / chip.ring_bandwidth + collective.count * collective.hops * HOP_SECONDS
        part = Part(collectives=collective.count, sent_bytes=collective.sent_bytes, collective_seconds=seconds)
        parts[name(collective.op_name)].add(part)
    whole = Part()
    for part in parts.values():
        whole.add(part)
    return Roofline(dict(sorted(parts.items(), key=lambda item: -item[1].sum_seconds)), whole)
