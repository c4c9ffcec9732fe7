"""Parses the text of compiled programs (optimized HLO): instructions, shapes, attributes, and the cost of each one."""

import math
import re
from typing import NamedTuple

import numpy as np

Array = tuple[str, tuple[int, ...]]  # (dtype, dimensions)
Groups = frozenset[frozenset[int]]  # devices that communicate with each other, by their index in the mesh


class Instruction(NamedTuple):
    """A line `%name = shape opcode(operands), attributes`, without comments and most of its backend_config.

    The attributes of a Pallas kernel include the FLOPs of its backend_config, as `kernel_flops=123`.
    """

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


class Computation(dict):
    """{name: `Instruction`} in the order of the text; `root` is the instruction that it returns."""

    root: Instruction


_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{\n(.*?)\n\}", re.DOTALL)  # the only text that has line breaks
_KERNEL_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_PARENTHESIS = re.compile(r"[()]")


def parse_program(text: str) -> tuple[dict[str, Computation], str, int]:
    """({name: `Computation`}, the name of the entry, the number of devices).

    Raises:
      ValueError: the text has no entry.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    text = _KERNEL_METADATA.sub(lambda found: f"kernel_metadata={{{found[1].replace(chr(10), ' ')}}}", text)
    for line in text.splitlines():
        if current is not None and line.startswith("  "):
            _add_instruction(current, line.strip())
        elif line.startswith("}"):
            current = None
        elif header := _HEADER.match(line):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
    if entry is None:
        raise ValueError(f"expected the text of an HLO module with an ENTRY computation, found {text[:80]!r}")
    first = text[: text.index("\n")]
    counts = (re.search(rf"{kind}=(\d+)", first) for kind in ("num_partitions", "replica_count"))
    return computations, entry, math.prod(int(count[1]) for count in counts if count)


def _add_instruction(computation, line):
    is_root = line.startswith("ROOT ")
    if "/*" in line:
        line = re.sub(r"/\*.*?\*/", "", line)
    name, found, rest = line.removeprefix("ROOT ").partition(" = ")
    if not found:
        return
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    opcode = rest[end:opening].strip()
    attributes = rest[closing:]
    if opcode != "while":  # backend_config is long on TPUs, and only a while's is read
        attributes, _, settings = attributes.partition(", backend_config=")
        if opcode == "custom-call" and (flops := _KERNEL_FLOPS.search(settings)):
            attributes += f", kernel_flops={flops[1]}"
    name = name.removeprefix("%")
    computation[name] = Instruction(name, rest[:end], opcode, rest[opening + 1 : closing - 1], attributes)
    if is_root:
        computation.root = computation[name]


def _closing(text, opening):
    """The position after the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"expected a closing parenthesis, found none in {text[:200]!r}")


def operand_names(instruction: Instruction) -> list[str]:
    """The names of an instruction's operands."""
    return re.findall(r"%([\w.-]+)", instruction.operands)


def attribute(instruction: Instruction, name: str) -> str:
    """A quoted attribute, such as op_name or custom_call_target; "" if it is missing."""
    found = re.search(rf'\b{name}="((?:[^"\\]|\\.)*)"', instruction.attributes)
    return found[1] if found else ""


def plain_attribute(instruction: Instruction, name: str) -> str:
    """An unquoted attribute, such as direction, or the computation of calls, to_apply, body or condition.

    Raises:
      ValueError: the instruction has no such attribute.
    """
    found = re.search(rf"\b{name}=%?([\w.-]+)", instruction.attributes)
    if not found:
        raise ValueError(f"expected {name}= in %{instruction.name}, found {instruction.attributes[:200]!r}")
    return found[1]


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, tuples flattened: [(dtype, dimensions)]."""
    return [
        (dtype, tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(shape)
    ]


def tuple_elements(shape: str) -> list[str]:
    """The shapes of a tuple's elements as text; [shape] if it is not a tuple."""
    if not shape.startswith("("):
        return [shape]
    elements, depth = [""], 0
    for piece in re.split(r"([(){}\[\],])", shape[1:-1]):
        depth += (piece in "({[") - (piece in ")}]") if piece else 0
        if piece == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += piece
    return [element.strip() for element in elements]


def array_elements(array: Array) -> int:
    """The number of elements of an array."""
    return math.prod(array[1])


def array_bytes(array: Array) -> float:
    """The bytes of an array without padding; 0 for tokens and other types without a size."""
    bits = 8 if array[0] == "pred" else int((re.search(r"\d+", array[0]) or "0")[0])
    return array_elements(array) * bits / 8


def replica_groups(instruction: Instruction, devices: int) -> Groups | None:
    """The groups of devices of a collective; None for a permutation or an unknown format.

    HLO prints groups as lists, {{0,1},{2,3}}; as a reshaped and transposed range, [groups, size]<=[…]T(…); or as axes
    of a mesh, mesh['a'=2,'b'=4] {'b'}. Without any, all devices are one group.
    """
    text = instruction.attributes
    if "source_target_pairs=" in text:
        return None
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+)", text):
        return _group_sets(_iota(iota[2]).reshape(_integers(iota[1])))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\S+)\))? *\{(.*?)\}", text):
        return _group_sets(_mesh_groups(mesh[1], mesh[2], mesh[3]))
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", text):
        return frozenset(frozenset(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if "replica_groups={}" in text or "replica_groups=" not in text:
        return frozenset({frozenset(range(devices))})
    return None


def group_size(instruction: Instruction, devices: int) -> int:
    """The number of devices in a group of a collective, or in the first chain of a permutation."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes):
        return _chain_length(re.findall(r"(\d+),(\d+)", pairs[1]))
    groups = replica_groups(instruction, devices)
    return max(map(len, groups)) if groups else devices


def _group_sets(groups):
    return frozenset(frozenset(group) for group in groups.tolist())


def _integers(text):
    return [int(number) for number in text.split(",")]


def _iota(text):
    """Reads "[2,4]T(1,0)": the range of 8 devices, reshaped and transposed."""
    sizes, _, order = text.partition("T")
    sizes = _integers(re.findall(r"\[(.*?)\]", sizes)[0])
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_integers(order.strip("(),"))) if order else ids


def _mesh_groups(axes, device_ids, grouped):
    """Reads axes "'a'=2,'b'=4" of a mesh and the axes that are grouped: "'b'", or part of one, "'b':(before)size"."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = (_iota(device_ids) if device_ids else np.arange(math.prod(sizes.values()))).reshape(-1)
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)}
    shape, inner = [], []  # of the mesh with partial axes split in three; the grouped dimensions
    for name, size in sizes.items():
        before, part = (int(number) for number in (parts.get(name, ("", ""))[i] or 0 for i in (0, 1)))
        split = [before, part, size // (before * part)] if part else [size]
        if name in parts:
            inner.append(len(shape) + (1 if part else 0))
        shape += split
    ids = np.moveaxis(ids.reshape(shape), inner, range(-len(inner), 0))
    return ids.reshape(-1, math.prod(ids.shape[len(shape) - len(inner) :]))


def _chain_length(pairs):
    """Counts the devices that are linked with the first pair of a permutation, including itself."""
    group = set(pairs[0]) if pairs else {None}
    while grown := {device for pair in pairs if group & set(pair) for device in pair} - group:
        group |= grown
    return len(group)


def dot_flops(instruction: Instruction, lhs: Array, rhs: Array) -> int:
    """The FLOPs of a `dot`: 2 × elements of the result × contracted size."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    size = math.prod(lhs[1][int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
    return 2 * size * array_elements(arrays(instruction.shape)[0])


def result_sides(instruction: Instruction, lhs: Array, rhs: Array) -> tuple[int, int]:
    """(rows, columns) of the result of a `dot` or `convolution`, without batch dimensions."""
    if instruction.opcode == "dot":
        sides = []
        for side, array in (("lhs", lhs), ("rhs", rhs)):
            named = re.findall(rf"{side}_(?:contracting|batch)_dims=\{{([\d,]*)\}}", instruction.attributes)
            axes = {int(axis) for found in named for axis in found.split(",") if axis}
            sides.append(math.prod(size for axis, size in enumerate(array[1]) if axis not in axes))
        return sides[0], sides[1]
    _, rhs_labels, out_labels = convolution_labels(instruction)
    output = dict(zip(out_labels, arrays(instruction.shape)[0][1]))
    kernel = dict(zip(rhs_labels, rhs[1]))
    # A spatial dimension with a window of 1 holds rows; one with a larger window is a batch or is summed over.
    rows = math.prod(size for label, size in output.items() if label.isdigit() and kernel[label] == 1)
    return output["b"] * rows, output["f"]


def convolution_labels(instruction: Instruction) -> tuple[str, str, str]:
    """The labels of the dimensions of a `convolution`: of its left operand, its right operand and its result."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"expected dim_labels= in %{instruction.name}, found {instruction.attributes[:200]!r}")
    return labels[1], labels[2], labels[3]


def convolution_flops(instruction: Instruction, lhs: Array, rhs: Array) -> int:
    """The FLOPs of a `convolution`: 2 × its multiplications, except those with padding and dilation holes.

    The TPU's compiler writes the batch dimensions of a matrix product as spatial dimensions: a window over all of them,
    dilated and padded so that each output sees one element. Counting elements alone gives 2·M·N·K.
    """
    lhs_labels, rhs_labels, out_labels = convolution_labels(instruction)
    output = arrays(instruction.shape)[0][1]
    size = lambda labels, dims, label: dims[labels.index(label)]
    flops = 2 * size(out_labels, output, "b") * size(out_labels, output, "f") * size(rhs_labels, rhs[1], "i")
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    if groups:  # output features divide the batch: each sees only its own part
        flops = flops * size(lhs_labels, lhs[1], "b") // int(groups[1]) // size(out_labels, output, "b")
    window = re.search(r"window=\{(.*?)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(label for label in out_labels if label.isdigit())
    along = lambda key, default: window[key].split("x") if key in window else [default] * len(spatial)
    fields = zip(along("stride", "1"), along("pad", "0_0"), along("lhs_dilate", "1"), along("rhs_dilate", "1"))
    for label, (stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, fields):
        flops *= _multiplications(
            size(lhs_labels, lhs[1], label),
            size(rhs_labels, rhs[1], label),
            size(out_labels, output, label),
            int(stride),
            int(pad.split("_")[0]),
            int(lhs_dilate),
            int(rhs_dilate),
        )
    return flops


def _multiplications(numbers, window, outputs, stride, pad, lhs_dilate, rhs_dilate):
    """Counts the pairs (output o, window k) of one dimension that read an element, not padding or a hole.

    That is, o·stride + k·rhs_dilate − pad is one of 0, lhs_dilate, …, (numbers − 1)·lhs_dilate.
    """
    common = math.gcd(stride, lhs_dilate)
    period = lhs_dilate // common
    inverse = pow(stride // common, -1, period) if period > 1 else 0
    total = 0
    for k in range(window):
        offset = k * rhs_dilate - pad
        if offset % common:
            continue
        first = -offset // common * inverse % period  # the least o ≥ 0 with o·stride + offset ≡ 0 modulo lhs_dilate
        low = max(0, -(offset // stride))  # ceil(−offset / stride)
        high = min(outputs - 1, ((numbers - 1) * lhs_dilate - offset) // stride)
        low += (first - low) % period
        total += max(0, (high - low) // period + 1)
    return total
