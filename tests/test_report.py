"""The report of a compiled program: fit, figures of the chip, and which all-gathers move weights."""

import dataclasses

import pytest

from melt_jax.analysis.chips import find_chip
from melt_jax.analysis.hlo import Collective, Product, Program, Transfer, analyse, innermost
from melt_jax.analysis.report import SCOPES, Memory, Report, StoredWeights

FSDP, TENSOR = (frozenset(map(frozenset, groups)) for groups in ([{0, 2}, {1, 3}], [{0, 1}, {2, 3}]))
WEIGHTS = StoredWeights(FSDP, frozenset({100, 300}), 800.0)


def gather(size=100, groups=FSDP, op_name="", kind="all-gather"):
    return Collective(kind, op_name, 2, "bf16", 1, 2.0 * size, groups, (size,))


def small_report(kind="TPU v5 lite", weights=WEIGHTS, collectives=()):
    program = Program((), tuple(collectives), {}, ())
    return Report("a step", find_chip(kind), 4, 1.0, Memory(5, 6, 7, 6), program, 1.0, weights, 300)


def test_exceeding_the_chip_does_not_fit():
    report = small_report()
    assert report.fits and report.memory.total == 18 and "fits" in report.text()
    large = dataclasses.replace(report, memory=Memory(0, int(find_chip("TPU v5 lite").device_memory) + 1, 0, 0))
    assert not large.fits and "DOES NOT FIT" in large.text()


def test_unknown_chip_has_no_figures():
    known, unknown = (small_report(kind) for kind in ("TPU v5 lite", "TPU v3"))
    assert "peak rates" in known.text() and "peak rates" not in unknown.text()
    missing = {"chip", "chips", "memory", "read_seconds", "roofline"}
    assert known.record().keys() - unknown.record().keys() == missing and unknown.record()["total"] == 18


def test_two_devices_share_the_bandwidth_of_a_chip():
    report, chip = small_report(), find_chip("TPU v5 lite")
    assert "weights read" not in report.text()
    reading = dataclasses.replace(report, weight_reads=2 * chip.memory_bandwidth)
    assert reading.read_seconds(chip) == reading.record()["read_seconds"] == 2
    assert "2.000 s at v5e's peak" in reading.text()
    half = dataclasses.replace(chip, devices=2)
    assert reading.read_seconds(half) == 4


def test_chip_hours_are_those_of_the_slowest_bound_and_of_the_sum():
    chip = find_chip("TPU v5 lite")
    product = Product("", "bf16", 1, 2 * chip.device_flops, (1024, 1024))
    transfer = Transfer("", "", "copy", 1, 3 * chip.device_bandwidth, 0)
    program = Program((product,), (), {}, (), (transfer,))
    report = dataclasses.replace(small_report(), program=program)
    assert report.chip_hours(chip) == (300 * 3 * 4 / 3600, 300 * 5 * 4 / 3600)
    assert "1.0 chip-hours at the slowest of these rates, 1.7 if nothing overlaps" in report.text()


def test_scopes_are_not_primitives_of_similar_names():
    assert innermost("jit(train_step)/jit(_take)/gather", SCOPES) is None
    assert innermost("jit(train_step)/gather_weights/reshard", SCOPES) == "gather_weights"


@pytest.mark.parametrize(
    ("collective", "weights", "unknown"),
    [
        (gather(), 200, 0),
        (gather(77, op_name="jit(step)/gather_weights/reshard"), 154, 0),
        (gather(77), 0, 154),
        (gather(groups=TENSOR), 0, 0),
        (gather(groups=None), 0, 200),
        (gather(groups=frozenset({frozenset({0, 2})})), 0, 200),
        (gather(kind="all-reduce"), 0, 0),
    ],
)
def test_gathers_without_a_scope_are_attributed(collective, weights, unknown):
    """Groups and sizes identify gathers of weights if the compiler drops the scope; the rest is unknown."""
    assert WEIGHTS.gathered_bytes([collective]) == (weights, unknown)
    whole = StoredWeights(frozenset(), frozenset(), 800.0)
    assert whole.gathered_bytes([collective]) == (0, 0) and whole.group == 1


def test_unattributed_gathers_are_reported():
    """A step gathers each weight at least once, so less than one copy means that the ratio is unknown."""
    complete = small_report(collectives=[gather()] * 4)
    assert complete.gathered_ratio == 1 and "weights gathered: 1.00 of" in complete.text()
    assert complete.record()["gathered_ratio"] == 1 and complete.record()["unknown_gathers"] == 0
    surplus = small_report(collectives=[gather()] * 4 + [gather(5_000_000)] * 2)
    assert surplus.gathered_ratio == 1 and "0.02 GB of all-gathers are not attributed" in surplus.text()
    lost = small_report(collectives=[gather(77)] * 4)
    assert lost.gathered_ratio is None and "weights gathered: unknown" in lost.text()
    assert lost.record()["gathered_ratio"] is None and lost.record()["unknown_gathers"] == 4 * 154
    whole = small_report(weights=StoredWeights(frozenset(), frozenset(), 0.0))
    assert whole.gathered_ratio is None and "weights gathered" not in whole.text()


PROGRAM = """HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (w: bf16[5,20], x: bf16[5,20]) -> (bf16[10,20], bf16[5,40]) {
  %w = bf16[5,10]{1,0} parameter(0)
  %x = bf16[5,10]{1,0} parameter(1)
  %gathered = bf16[10,10]{1,0} all-gather(%w), replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}
  %activations = bf16[5,20]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={1}
  ROOT %both = (bf16[10,10], bf16[5,20]) tuple(%gathered, %activations)
}
"""


def test_gathers_are_read_from_the_text():
    collectives = analyse(PROGRAM).collectives
    assert [collective.groups for collective in collectives] == [FSDP, TENSOR]
    assert WEIGHTS.gathered_bytes(collectives) == (200, 0)
