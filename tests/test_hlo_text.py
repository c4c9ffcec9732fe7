"""Parsing of handwritten program text: shapes, groups, convolutions, trip counts."""

import numpy as np
import pytest

from melt_jax.analysis.hlo import analyse
from melt_jax.analysis.hlo_loops import count_trips
from melt_jax.analysis.hlo_text import (
    Instruction,
    arrays,
    convolution_flops,
    group_size,
    replica_groups,
    tuple_elements,
)


def brute_force_multiplications(numbers, window, outputs, stride, pad, lhs_dilate, rhs_dilate):
    """The products of an element of the input and one of the window, counted one by one."""
    positions = {i * lhs_dilate for i in range(numbers)}
    return sum(o * stride + k * rhs_dilate - pad in positions for o in range(outputs) for k in range(window))


def test_convolution_counts_elements_only():
    """Padding and the gaps of a dilation need no FLOPs."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        numbers, window, outputs, stride, lhs_dilate, rhs_dilate = (int(n) for n in rng.integers(1, 7, 6))
        pad = int(rng.integers(-3, 7))
        line = f"window={{size={window} stride={stride} pad={pad}_{pad} "
        line += f"lhs_dilate={lhs_dilate} rhs_dilate={rhs_dilate}}}, dim_labels=b0f_0io->b0f"
        instruction = Instruction("c", f"f32[5,{outputs},11]{{2,1,0}}", "convolution", "%a, %b", f", {line}")
        multiplications = brute_force_multiplications(numbers, window, outputs, stride, pad, lhs_dilate, rhs_dilate)
        flops = convolution_flops(instruction, ("f32", (5, numbers, 7)), ("f32", (window, 7, 11)))
        assert flops == 2 * 5 * 7 * 11 * multiplications, line


LIMITS_IN_THE_STATE = """HloModule by_hand, is_scheduled=true, replica_count=1, num_partitions=2

%advance (limit: s32[], i: s32[]) -> (s32[], s32[]) {
  %limit = s32[] parameter(0)
  ROOT %both = (s32[], s32[]{:T(128)}) tuple(%limit, %next)
  %i = s32[] parameter(1)
  %three = s32[] constant(3)
  %next = s32[] add(%three, %i)
}

%inner_body (state: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {
  %state = (s32[]{:T(128)}, s32[], f32[4,4]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state), index=0
  %n.1 = s32[] get-tuple-element(%state), index=1
  %x.1 = f32[4,4] get-tuple-element(%state), index=2
  %advanced = (s32[], s32[]) fusion(%n.1, %i.1), kind=kLoop, calls=%advance
  %next.1 = s32[] get-tuple-element(%advanced), index=1
  %dot = f32[4,4]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out.1 = (s32[], s32[], f32[4,4]) tuple(%next.1, %n.1, %dot)
}

%inner_test (state.2: (s32[], s32[], f32[4,4])) -> pred[] {
  %state.2 = (s32[], s32[], f32[4,4]) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %n.2 = s32[] get-tuple-element(%state.2), index=1
  ROOT %less = pred[] compare(%n.2, %i.2), direction=GT
}

%outer_body (state.3: (s32[], s32[], f32[4,4])) -> (s32[], s32[], f32[4,4]) {
  %state.3 = (s32[], s32[], f32[4,4]) parameter(0)
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %i.3 = s32[] get-tuple-element(%state.3), index=0
  %n.3 = s32[] get-tuple-element(%state.3), index=1
  %x.3 = f32[4,4] get-tuple-element(%state.3), index=2
  %begin = (s32[], s32[], f32[4,4]) tuple(%zero, %n.3, %x.3)
  %inner = (s32[], s32[], f32[4,4]) while(%begin), condition=%inner_test, body=%inner_body
  %n.4 = s32[] get-tuple-element(%inner), index=1
  %next.3 = s32[] add(%i.3, %one)
  %x.4 = f32[4,4] get-tuple-element(%inner), index=2
  ROOT %out.3 = (s32[], s32[], f32[4,4]) tuple(%next.3, %n.4, %x.4)
}

%outer_test (state.4: (s32[], s32[], f32[4,4])) -> pred[] {
  %state.4 = (s32[], s32[], f32[4,4]) parameter(0)
  %i.4 = s32[] get-tuple-element(%state.4), index=0
  %two = s32[] constant(2)
  ROOT %less.2 = pred[] compare(%i.4, %two), direction=LT
}

ENTRY %main (x: f32[4,4]) -> (s32[], s32[], /*a comment*/f32[4,4]) {
  %x = f32[4,4]{1,0} parameter(0)
  %zero.1 = s32[] constant(0)
  %ten = s32[] constant(10)
  %begin.1 = (s32[], s32[], /*index=2*/f32[4,4]) tuple(%zero.1, %ten, /*index=2*/%x)
  ROOT %outer = (s32[], s32[], f32[4,4]) while(%begin.1), condition=%outer_test, body=%outer_body
}, execution_thread="main"
"""


def test_loop_limit_is_found_in_outer_state():
    """The inner loop counts 0, 3, 6, 9; its limit, 10, is an element of the state that neither loop changes."""
    program = analyse(LIMITS_IN_THE_STATE)
    assert [loop.trips for loop in program.loops] == [2, 4]
    assert program.flops == 2 * 4 * 2 * 4**3
    changing = LIMITS_IN_THE_STATE.replace("tuple(%next.3, %n.4, %x.4)", "tuple(%next.3, %next.3, %x.4)")
    assert [loop.source for loop in analyse(changing).loops] == ["text", "unknown"]


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups={{0,4,8,12},{1,5,9,13}}, use_global_device_ids=true", 4),
        ("replica_groups=[2,8]<=[16]", 8),
        ("replica_groups=[4,4]<=[4,4]T(1,0), dimensions={2}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", 4),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([2,4]T(1,0)) {'a','c'}, dimensions={0}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("replica_groups={}", 16),
        ("source_target_pairs={{0,1},{1,2},{2,0},{3,4},{4,5},{5,3}}", 3),
        ("source_target_pairs={{2,4},{0,2},{1,3}}, metadata={op_name={{7,8}}}", 3),
    ],
)
def test_group_sizes_are_parsed(attributes, size):
    assert group_size(Instruction("c", "f32[]", "all-reduce", "", f", {attributes}"), 16) == size


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("dimensions={0}", [[0, 1, 2, 3]]),
        ("replica_groups=another_format", None),
        ("source_target_pairs={{0,1},{1,0}}", None),
    ],
)
def test_group_devices_are_parsed(attributes, groups):
    expected = groups and frozenset(map(frozenset, groups))
    assert replica_groups(Instruction("c", "f32[]", "all-gather", "", f", {attributes}"), 4) == expected


def test_tpu_shapes_are_parsed():
    shape = "(bf16[2,128]{1,0:T(8,128)(2,1)S(1)}, (f32[], u32[]{:S(2)}), pred[4]{0:T(512)})"
    assert arrays(shape) == [("bf16", (2, 128)), ("f32", ()), ("u32", ()), ("pred", (4,))]
    assert tuple_elements(shape) == [
        "bf16[2,128]{1,0:T(8,128)(2,1)S(1)}",
        "(f32[], u32[]{:S(2)})",
        "pred[4]{0:T(512)}",
    ]


@pytest.mark.parametrize(
    ("start", "step", "direction", "limit", "trips"),
    [
        (0, 1, "LT", 5, 5), (0, 2, "LT", 5, 3), (0, 1, "LE", 5, 6), (9, -3, "GT", 0, 3), (9, -3, "GE", 0, 4),
        (0, 3, "NE", 9, 3), (0, 2, "NE", 9, None), (5, 1, "LT", 5, 0), (0, 0, "LT", 5, None), (0, 1, "EQ", 5, None),
    ],
)  # fmt: skip
def test_trip_counts_follow_from_the_limits(start, step, direction, limit, trips):
    assert count_trips(start, step, direction, limit) == trips


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY computation, found 'module @jit_f"):
        analyse("module @jit_f {\n}\n")
