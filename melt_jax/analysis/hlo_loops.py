"""Reads the trip counts of while loops from the text of a compiled program.

The CPU's compiler prints trip counts; the TPU's does not. There the count is derived: every scan has a counter with a
known start and step, and its condition compares the counter with a known limit. Start and limit are constants or
elements of the loop's state, which an outer loop may pass on unchanged.
"""

import re

from melt_jax.analysis.hlo_text import Computation, Instruction, operand_names, plain_attribute, tuple_elements

Linear = tuple[int | None, int]  # (i, c): element i of a loop's state plus c; (None, c): c


def read_loop(
    computations: dict[str, Computation], computation: Computation, instruction: Instruction, state: dict[int, int]
) -> tuple[int | None, dict[int, int]]:
    """Reads the trip count of a loop and the constant elements of its state.

    Args:
      computations: {name: `Computation`} of the program.
      computation: the one that contains the loop.
      instruction: the `while`.
      state: {index: integer}: elements of that computation's parameter whose values are known.

    Returns:
      (trips, or None if the text does not determine them; {index: integer}, the `state` of the loop's body).
    """
    body = computations[plain_attribute(instruction, "body")]
    start = _initial_state(computations, computation, instruction, state)
    fixed = {i: value for i, value in start.items() if _element(computations, body, body.root, i) == (i, 0)}
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    return int(known[1]) if known else _count(computations, instruction, body, start, fixed), fixed


def count_trips(start: int, step: int, direction: str, limit: int) -> int | None:
    """Counts the trips of `while start (direction) limit: start += step`; None if it never ends or is unknown."""
    if direction in ("GT", "GE"):
        start, step, limit = -start, -step, -limit
    if direction == "NE":
        trips, rest = divmod(limit - start, step) if step else (0, 1)
        return trips if rest == 0 and trips >= 0 else None
    if direction not in ("LT", "LE", "GT", "GE"):
        return None
    distance = limit - start + (direction in ("LE", "GE"))
    return 0 if distance <= 0 else None if step <= 0 else -(-distance // step)


def _initial_state(computations, computation, instruction, state):
    """{index: integer}, the elements of a loop's state that are known before its first trip."""
    initial = operand_names(instruction)[0]
    start = {}
    for index, shape in enumerate(tuple_elements(instruction.shape)):
        scalar = re.match(r"[su]\d+\[\]", shape)
        value = _element(computations, computation, computation[initial], index) if scalar else None
        if value is not None and (value[0] is None or value[0] in state):
            start[index] = state.get(value[0], 0) + value[1]
    return start


def _count(computations, instruction, body, start, fixed):
    """Counts the trips of a loop that compares a counter with a constant; None for any other loop."""
    condition = computations[plain_attribute(instruction, "condition")]
    test, arguments, where = condition.root, None, condition
    if test.opcode == "fusion":
        arguments = [_linear(computations, condition, operand) for operand in operand_names(test)]
        where = computations[plain_attribute(test, "calls")]
        test = where.root
    if test.opcode != "compare":
        return None
    sides = [_linear(computations, where, operand, arguments) for operand in operand_names(test)]
    direction = plain_attribute(test, "direction")
    flipped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    left, right = sides
    if left is None or right is None:
        return None
    if left[0] is None or left[0] in fixed:
        left, right, direction = right, left, flipped.get(direction, direction)
    counter, offset = left
    if counter is None or counter not in start or (right[0] is not None and right[0] not in fixed):
        return None
    step = _element(computations, body, body.root, counter)
    if step is None or step[0] != counter:
        return None
    limit = right[1] + (0 if right[0] is None else fixed[right[0]])
    return count_trips(start[counter] + offset, step[1], direction, limit)


def _element(computations, computation, source, index) -> Linear | None:
    """`_linear` of an element of a tuple-valued instruction."""
    operands = operand_names(source)
    if source.opcode == "parameter":
        return index, 0
    if source.opcode == "tuple":
        return _linear(computations, computation, operands[index])
    if source.opcode in ("copy", "opt-barrier"):
        return _element(computations, computation, computation[operands[0]], index)
    if source.opcode == "fusion":
        callee = computations[plain_attribute(source, "calls")]
        inner = [_linear(computations, computation, operand) for operand in operands]
        if inner and callee.root.opcode == "tuple":
            return _linear(computations, callee, operand_names(callee.root)[index], inner)
    if source.opcode == "while":
        body = computations[plain_attribute(source, "body")]
        if _element(computations, body, body.root, index) == (index, 0):
            return _element(computations, computation, computation[operands[0]], index)
    return None


def _linear(computations, computation, name, arguments=None) -> Linear | None:
    """An integer as (i, c): element i of the loop's state plus c; or (None, c): c. None: anything else.

    `arguments` are the values of a fusion's parameters; without them a parameter is the loop's state.
    """
    instruction = computation[name]
    operands = operand_names(instruction)
    match instruction.opcode:
        case "constant":
            return (None, int(instruction.operands)) if re.fullmatch(r"-?\d+", instruction.operands) else None
        case "parameter":
            return arguments[int(instruction.operands)] if arguments else None
        case "get-tuple-element":
            index = int(plain_attribute(instruction, "index"))
            return None if arguments else _element(computations, computation, computation[operands[0]], index)
        case "copy" | "bitcast" | "convert" | "reshape":
            return _linear(computations, computation, operands[0], arguments)
        case "add" | "subtract":
            left, right = (_linear(computations, computation, operand, arguments) for operand in operands)
            sign = 1 if instruction.opcode == "add" else -1
            if left is None or right is None or (right[0] is not None and (sign < 0 or left[0] is not None)):
                return None
            return (right[0] if left[0] is None else left[0]), left[1] + sign * right[1]
        case "fusion":
            inner = [_linear(computations, computation, operand, arguments) for operand in operands]
            callee = computations[plain_attribute(instruction, "calls")]
            return _linear(computations, callee, callee.root.name, inner) if inner else None
    return None
