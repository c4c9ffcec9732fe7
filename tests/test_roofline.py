"""The roofline: seconds of each scope at a chip's peaks, and the bound of the whole program."""

import pytest

from melt_jax.analysis.chips import HOP_SECONDS, find_chip
from melt_jax.analysis.hlo import Collective, Product, Program, Transfer, analyse
from melt_jax.analysis.roofline import UNATTRIBUTED, roofline

V5E, V6E, TPU7X = (find_chip(kind) for kind in ("TPU v5 lite", "TPU v6 lite", "TPU7x"))
SCOPES = ("attention", "mlp")


def product(op_name="jit(step)/mlp/dot", flops=197e12, precision="bf16", sides=(2048, 512)):
    return Product(op_name, precision, 1, flops, sides)


def transfer(op_name="jit(step)/mlp/dot", used_by="", read=819e9, written=0.0):
    return Transfer(op_name, used_by, "fusion", 1, read, written)


def gather(op_name="jit(step)/mlp/reshard", count=10.0, size=2e9, kind="all-gather", group=4):
    return Collective(kind, op_name, group, "bf16", count, size, None, (1,))


def bounds(chip=V5E, products=(), transfers=(), collectives=(), owners=()):
    program = Program(tuple(products), tuple(collectives), {}, (), tuple(transfers))
    return roofline(program, chip, SCOPES, owners)


def test_each_peak_takes_a_second():
    found = bounds(products=[product()], transfers=[transfer()]).whole
    assert (found.product_seconds, found.memory_seconds, found.collective_seconds) == (1, 1, 0)
    assert found.bound_seconds == 1 and found.sum_seconds == 2


def test_collectives_pay_bytes_and_hops():
    """A ring of four sends 3/4 of the gathered bytes; two hops, or four for an all-reduce, follow each other."""
    seconds = 2e9 * 3 / 4 / V5E.ring_bandwidth
    found = bounds(collectives=[gather()])
    assert found.whole.collective_seconds == pytest.approx(seconds + 10 * 2 * HOP_SECONDS)
    assert found.whole.bound == "links" and found.parts["mlp"].collectives == 10
    reduced = bounds(collectives=[gather(kind="all-reduce")]).whole
    assert reduced.collective_seconds == pytest.approx(2 * seconds + 10 * 4 * HOP_SECONDS)


@pytest.mark.parametrize(("sides", "rate"), [((2048, 512), 1), ((128, 512), 2), ((500, 128), 2), ((128, 128), 4)])
def test_narrow_products_run_at_half_rate(sides, rate):
    """On units of 256 × 256, not on those of 128 × 128."""
    narrow = [product(sides=sides, flops=V6E.flops)]
    assert bounds(V6E, narrow).whole.product_seconds == rate
    assert bounds(V6E, narrow).whole.full_rate_seconds == 1
    assert bounds(V5E, narrow).whole.product_seconds == V6E.flops / V5E.flops
    assert ("half a matrix unit" in "\n".join(bounds(V6E, narrow).lines())) == (rate > 1)


def test_devices_of_a_chip_share_its_peaks():
    found = bounds(TPU7X, [product(flops=TPU7X.flops)], [transfer(read=TPU7X.memory_bandwidth)]).whole
    assert (found.product_seconds, found.memory_seconds) == (2, 2)


def test_work_belongs_to_scopes_or_to_none():
    """A copy without a scope belongs to the scope that uses it; owners tell the teacher's work apart."""
    transfers = [
        transfer("jit(step)/while", "jit(step)/attention/dot"),
        transfer("jit(step)/teacher/attention/dot"),
        transfer("", ""),
        transfer("jit(step)/mlp/attention/add", written=819e9),
    ]
    parts = bounds(transfers=transfers, owners=("teacher",)).parts
    assert {name: part.memory_seconds for name, part in parts.items()} == {
        "attention": 3, "teacher attention": 1, UNATTRIBUTED: 1,
    }  # fmt: skip
    assert next(iter(parts)) == "attention"


def test_float32_products_take_several_passes():
    assert bounds(products=[product(precision="f32 highest")]).whole.product_seconds == 6


def test_record_has_scopes_and_the_bound():
    record = bounds(products=[product(flops=2 * 197e12)], transfers=[transfer()]).record()
    assert record["bound"] == "products" and record["bound_seconds"] == 2 and record["sum_seconds"] == 3
    assert record["scopes"]["mlp"]["memory_bytes"] == 819e9


SIDES = """HloModule step, is_scheduled=true

ENTRY %main (a: bf16[4,500,128], b: bf16[4,128,300]) -> f32[4,500,300] {
  %a = bf16[4,500,128]{2,1,0} parameter(0)
  %b = bf16[4,128,300]{2,1,0} parameter(1)
  ROOT %c = f32[4,500,300]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
}
"""  # noqa: E501


def test_sides_of_a_product_exclude_the_batch():
    (found,) = analyse(SIDES).products
    assert found.sides == (128, 300) and found.rate(256) == 0.5 and found.rate(128) == 1
