"""Counts the bytes that one instruction of a compiled program moves to and from memory (HBM).

A TPU's compiler prints the memory space of each array in its layout: `S(1)` is VMEM, which is not counted. Arrays
without one are in HBM, or in the memory of a CPU, whose caches are not considered. Padding to tiles counts, because it
is moved too. Every instruction reads each operand and writes each result once, with these exceptions:

    slice, gather                        only the selected elements are read
    dynamic-update-slice, scatter        only the updates are read and written; the rest stays in place
    fusion                               the same, if slices and updates are its only uses of an operand, perhaps after
                                         a conversion to another dtype or layout
    bitcast, tuple, while, …             nothing moves
    copy-start, slice-start, …           counted at the start, not at the end
    Pallas kernel                        only visited blocks count, if it moves an operand or result block by block

A product whose tiles are read several times moves more than this count, which is a lower bound.
"""

import math
import re
from typing import NamedTuple

from melt_jax.analysis.hlo_kernels import read_kernel
from melt_jax.analysis.hlo_text import (
    Computation,
    Instruction,
    array_bytes,
    operand_names,
    plain_attribute,
    tuple_elements,
)

_BUFFER = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_SELECTING = ("slice", "dynamic-slice", "gather")
_CONVERTING = ("convert", "copy", "transpose")  # inside a fusion they run for the elements that are used
_RENAMING = ("bitcast", "reshape", "get-tuple-element", "opt-barrier")
# Instructions that move nothing, or whose computations are counted on their own.
_FREE = (*_RENAMING, "parameter", "constant", "tuple", "while", "conditional", "call", "async", "after-all",
         "add-dependency", "domain", "partition-id", "replica-id")  # fmt: skip


class Traffic(NamedTuple):
    """Bytes that are read from memory and written to it."""

    read: float
    written: float

    @property
    def total(self) -> float:
        """Bytes in both directions."""
        return self.read + self.written


def traffic(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction, visited: float = math.inf
) -> Traffic:
    """The bytes that one execution of an instruction moves.

    Args:
      computations: {name: `Computation`} of the program.
      computation: the one that contains the instruction.
      instruction: any instruction but one inside a fusion. Custom calls that only mark something are the caller's to
        leave out.
      visited: the number of blocks that a Pallas kernel visits; by default all.
    """
    opcode, is_start = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return Traffic(0, 0)
    operands = [computation[name].shape for name in operand_names(instruction)]
    result = _started_result(instruction) if is_start else instruction.shape
    if opcode == "fusion":
        callee = computations[plain_attribute(instruction, "calls")]
        read = sum(_hbm_share(shape, _used(computations, callee, i)) for i, shape in enumerate(operands))
        outputs = zip(tuple_elements(result), _written(computations, callee, callee.root))
        return Traffic(read, sum(_hbm_share(shape, used) for shape, used in outputs))
    if opcode in _SELECTING:
        selected = buffer_bytes(result)
        return Traffic(_hbm_share(operands[0], selected) + sum(map(hbm_bytes, operands[1:])), hbm_bytes(result))
    if opcode in _IN_PLACE:
        update = operands[1 if opcode == "dynamic-update-slice" else -1]
        return Traffic(sum(map(hbm_bytes, operands[1:])), _hbm_share(result, buffer_bytes(update)))
    if kernel := read_kernel(instruction):
        moved = min(kernel.blocks, visited)
        share = lambda i, shape, blocks: hbm_bytes(shape) * (moved / blocks[i] if i in blocks else 1)
        read = sum(share(i, shape, kernel.operands) for i, shape in enumerate(operands))
        return Traffic(read, sum(share(i, x, kernel.results) for i, x in enumerate(tuple_elements(result))))
    return Traffic(sum(map(hbm_bytes, operands)), hbm_bytes(result))


def buffer_bytes(shape: str) -> float:
    """The bytes of all arrays of a shape in any memory, with padding."""
    return sum(_padded_bytes(*found) for found in _BUFFER.findall(shape))


def hbm_bytes(shape: str) -> float:
    """The bytes of those arrays of a shape that are in HBM, with padding."""
    return sum(_padded_bytes(*found) for found in _BUFFER.findall(shape) if not _memory_space(found[2]))


def _hbm_share(shape, used):
    """The bytes that are moved if `used` bytes of a shape are; None: all of it."""
    whole = hbm_bytes(shape)
    return whole if used is None else min(whole, used)


def _memory_space(layout):
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _padded_bytes(dtype, sizes, layout):
    """The bytes of an array: its dimensions in the order of its layout, the last ones rounded up to its tile."""
    dimensions = [int(size.removeprefix("<=")) for size in sizes.split(",") if size]
    order, _, tiles = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", tiles)
    if tile and dimensions:
        tile = [int(size) for size in tile[1].split(",")]
        minor = [int(axis) for axis in order.split(",")][: len(tile)]
        for axis, size in zip(minor, reversed(tile)):
            dimensions[axis] = math.ceil(dimensions[axis] / size) * size
    return array_bytes((dtype, tuple(dimensions)))


def _started_result(instruction):
    """The shape of what an asynchronous instruction writes, out of (operands, result, …) or (result, operand, …)."""
    elements = tuple_elements(instruction.shape)
    if instruction.opcode == "copy-start":
        return elements[0]
    is_pair = instruction.opcode in ("all-gather-start", "collective-permute-start") or elements[0].startswith("(")
    return elements[1] if is_pair else instruction.shape


def _users(computation, name):
    return [user for user in computation.values() if name in operand_names(user)]


def _used(computations, computation, index, result=None):
    """The bytes of a fusion's parameter that the fusion reads; None: all of them. `result`: see `_used_of`."""
    parameter = next(x for x in computation.values() if x.opcode == "parameter" and int(x.operands) == index)
    return _used_of(computations, computation, parameter, result)


def _used_of(computations, computation, source, result=None):
    """The bytes of a value that a computation reads; None: all of them.

    `result`: the bytes of the computation's own result that are used, if it is a fusion in another one; None: all.
    """
    total = 0.0
    for user in _users(computation, source.name):
        positions = [i for i, name in enumerate(operand_names(user)) if name == source.name]
        used = None
        if user.opcode in (*_RENAMING, *_CONVERTING, "fusion"):  # as much as is used of what they return
            used = result if user is computation.root else _used_of(computations, computation, user, result)
        if user.opcode in _CONVERTING and used is not None:
            used *= buffer_bytes(source.shape) / buffer_bytes(user.shape)
            if _is_in_tuple(computation, user):
                return None
        elif user.opcode == "fusion":
            callee = computations[plain_attribute(user, "calls")]
            each = [_used(computations, callee, i, used) for i in positions]
            used = None if None in each else sum(each)
        elif user.opcode in _SELECTING and positions == [0]:
            used = buffer_bytes(user.shape)
        elif user.opcode == "tuple" or (user.opcode in _IN_PLACE and positions == [0]):
            used = 0.0
        if used is None:
            return None
        total += used
    return total


def _is_in_tuple(computation, instruction):
    """Whether an instruction is an element of a tuple, perhaps under another name."""
    users = _users(computation, instruction.name)
    return any(
        user.opcode == "tuple" or (user.opcode in _RENAMING and _is_in_tuple(computation, user)) for user in users
    )


def _written(computations, computation, root):
    """For each array that a fusion returns: the bytes that it writes; None: all of them."""
    if root.opcode == "tuple":
        parts = (computation[name] for name in operand_names(root))
        return [_written(computations, computation, part)[0] for part in parts]
    if root.opcode in _RENAMING:
        return _written(computations, computation, computation[operand_names(root)[0]])
    if root.opcode == "parameter":
        return [0.0]
    if root.opcode == "fusion":
        callee = computations[plain_attribute(root, "calls")]
        return _written(computations, callee, callee.root)
    if root.opcode in _IN_PLACE and _alias(computation, computation[operand_names(root)[0]]) is not None:
        update = operand_names(root)[1 if root.opcode == "dynamic-update-slice" else -1]
        return [buffer_bytes(computation[update].shape)]
    return [None] * len(tuple_elements(root.shape))


def _alias(computation, instruction):
    """The index of the parameter that an instruction only renames, or None."""
    while instruction.opcode in _RENAMING:
        instruction = computation[operand_names(instruction)[0]]
    return int(instruction.operands) if instruction.opcode == "parameter" else None
