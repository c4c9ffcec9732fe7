"""The text of compiled programs (optimized HLO): instructions, shapes, attributes, and what one instruction costs."""

import math
import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """A line `%name = shape opcode(operands), attributes`, without comments and without most of its backend_config."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


class Computation(dict):
    """{name: `Instruction`} in the order of the text; `root` is the instruction whose value it returns."""

    root: Instruction


_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_PARENTHESIS = re.compile(r"[()]")


def parse_program(text):
    """({name: `Computation`}, the entry's name, the devices the program is compiled for).

    Raises:
      ValueError: the text has no entry.
    """
    computations, entry, current = {}, None, None
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
    if opcode != "while":  # a TPU's are long and nothing in them is read
        attributes = attributes.partition(", backend_config=")[0]
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


def operand_names(instruction):
    """The names of an instruction's operands."""
    return re.findall(r"%([\w.-]+)", instruction.operands)


def attribute(instruction, name):
    """A quoted attribute, such as op_name or custom_call_target; "" where there is none."""
    found = re.search(rf'\b{name}="((?:[^"\\]|\\.)*)"', instruction.attributes)
    return found[1] if found else ""


def called(instruction, name):
    """The computation that an instruction names: calls, to_apply, body, condition, …

    Raises:
      ValueError: it names none.
    """
    found = re.search(rf"\b{name}=%?([\w.-]+)", instruction.attributes)
    if not found:
        raise ValueError(f"expected {name}= in %{instruction.name}, found {instruction.attributes[:200]!r}")
    return found[1]


def arrays(shape):
    """The arrays of a shape, tuples flattened: [(dtype, dimensions)]."""
    return [
        (dtype, tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(shape)
    ]


def tuple_elements(shape):
    """The shapes of a tuple's elements, as text; the shape itself where it is no tuple."""
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


def array_elements(array):
    """Numbers in an array."""
    return math.prod(array[1])


def array_bytes(array):
    """Bytes of an array without padding; 0 for tokens and other types without a size."""
    bits = 8 if array[0] == "pred" else int((re.search(r"\d+", array[0]) or "0")[0])
    return array_elements(array) * bits / 8


def group_size(instruction, devices):
    """Devices in one group of a collective: in its first replica group, or its first chain of a permutation.

    Replica groups are printed as lists, {{0,1},{2,3}}, as [groups, size]<=[…], or as axes of a mesh, mesh['a'=2,'b'=4]
    {'b'}; without any, all devices are one group.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return _chain_length(re.findall(r"(\d+),(\d+)", pairs[1]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if axes := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])  # 'axis', or a part of one: 'axis':(before)size
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(listed[1].split(",")) if listed else devices


def _chain_length(pairs):
    """Devices that the first pair of a permutation is linked with, itself included."""
    group = set(pairs[0]) if pairs else {None}
    while grown := {device for pair in pairs if group & set(pair) for device in pair} - group:
        group |= grown
    return len(group)


def dot_flops(instruction, lhs, rhs):
    """2 × the result's numbers × the contracted size of a `dot` of arrays (dtype, dimensions)."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    size = math.prod(lhs[1][int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
    return 2 * size * array_elements(arrays(instruction.shape)[0])


def convolution_flops(instruction, lhs, rhs):
    """2 × the multiplications of a `convolution` whose operand is no padding and no hole of a dilation.

    A TPU writes batch dimensions of a product as spatial ones: a window over all of them, dilated and padded so that
    every output meets one number. Only meetings with numbers count, which makes 2·M·N·K of them.
    """
    lhs_labels, rhs_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    output = arrays(instruction.shape)[0][1]
    size = lambda labels, dims, label: dims[labels.index(label)]
    flops = 2 * size(out_labels, output, "b") * size(out_labels, output, "f") * size(rhs_labels, rhs[1], "i")
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    if groups:  # the batch is divided among output features: an output sees its own part alone
        flops = flops * size(lhs_labels, lhs[1], "b") // int(groups[1]) // size(out_labels, output, "b")
    window = re.search(r"window=\{(.*?)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(label for label in out_labels if label.isdigit())
    along = lambda key, default: window[key].split("x") if key in window else [default] * len(spatial)
    fields = zip(along("stride", "1"), along("pad", "0_0"), along("lhs_dilate", "1"), along("rhs_dilate", "1"))
    for label, (stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, fields):
        flops *= _meetings(
            size(lhs_labels, lhs[1], label),
            size(rhs_labels, rhs[1], label),
            size(out_labels, output, label),
            int(stride),
            int(pad.split("_")[0]),
            int(lhs_dilate),
            int(rhs_dilate),
        )
    return flops


def _meetings(numbers, window, outputs, stride, pad, lhs_dilate, rhs_dilate):
    """Pairs of output o and window k along one dimension that meet a number: o·stride + k·rhs_dilate − pad is one of
    0, lhs_dilate, …, (numbers − 1)·lhs_dilate."""
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
