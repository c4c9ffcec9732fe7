"""How often the while loops of a compiled program run, read from its text.

The CPU's compiler writes trip counts down, the TPU's does not. There the count follows from what every scan is: a
counter with a known start and step that the condition compares with a known limit. Starts and limits may be constants,
or elements of the loop's state, which a loop around it may pass on unchanged.
"""

import re

from melt_jax.analysis.hlo_text import called, operand_names, tuple_elements


def read_loop(computations, computation, instruction, state):
    """Trips of a loop, and what stays as it is in its state.

    Args:
      computations: {name: `Computation`} of the program.
      computation: where the loop stands.
      instruction: the `while`.
      state: {index: integer}: elements of that computation's parameter whose values are known.

    Returns:
      (trips, or None where the text does not tell; {index: integer}, the `state` of the loop's body).
    """
    body = computations[called(instruction, "body")]
    start = _initial_state(computations, computation, instruction, state)
    fixed = {i: value for i, value in start.items() if _element(computations, body, body.root, i) == (i, 0)}
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    return int(known[1]) if known else _count(computations, instruction, body, start, fixed), fixed


def count_trips(start, step, direction, limit):
    """Trips of `while start (direction) limit: start += step`; None where it never ends or is no such loop."""
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
    """{index: integer} of a loop's state before its first trip, as far as the text tells."""
    initial = operand_names(instruction)[0]
    start = {}
    for index, shape in enumerate(tuple_elements(instruction.shape)):
        scalar = re.match(r"[su]\d+\[\]", shape)
        value = _element(computations, computation, computation[initial], index) if scalar else None
        if value is not None and (value[0] is None or value[0] in state):
            start[index] = state.get(value[0], 0) + value[1]
    return start


def _count(computations, instruction, body, start, fixed):
    """Trips of a loop that compares a counter with a constant; None where it does something else."""
    condition = computations[called(instruction, "condition")]
    test, arguments, where = condition.root, None, condition
    if test.opcode == "fusion":
        arguments = [_linear(computations, condition, operand) for operand in operand_names(test)]
        where = computations[called(test, "calls")]
        test = where.root
    if test.opcode != "compare":
        return None
    sides = [_linear(computations, where, operand, arguments) for operand in operand_names(test)]
    direction = re.search(r"direction=(\w+)", test.attributes)[1]
    if None in sides:
        return None
    (left, right), flipped = sides, {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
    if left[0] is None or left[0] in fixed:
        left, right, direction = right, left, flipped.get(direction, direction)
    step = _element(computations, body, body.root, left[0]) if left[0] in start else None
    if step is None or step[0] != left[0] or (right[0] is not None and right[0] not in fixed):
        return None
    limit = fixed.get(right[0], 0) + right[1]
    return count_trips(start[left[0]] + left[1], step[1], direction, limit)


def _element(computations, computation, source, index):
    """`_linear` of an element of a tuple-valued instruction."""
    operands = operand_names(source)
    if source.opcode == "parameter":
        return index, 0
    if source.opcode == "tuple":
        return _linear(computations, computation, operands[index])
    if source.opcode in ("copy", "opt-barrier"):
        return _element(computations, computation, computation[operands[0]], index)
    if source.opcode == "fusion":
        callee = computations[called(source, "calls")]
        inner = [_linear(computations, computation, operand) for operand in operands]
        if inner and callee.root.opcode == "tuple":
            return _linear(computations, callee, operand_names(callee.root)[index], inner)
    if source.opcode == "while":
        body = computations[called(source, "body")]
        if _element(computations, body, body.root, index) == (index, 0):
            return _element(computations, computation, computation[operands[0]], index)
    return None


def _linear(computations, computation, name, arguments=None):
    """An integer as (i, c): element i of the loop's state plus c, or (None, c): c alone. None: something else.

    `arguments` are those of a fusion's parameters; without them a parameter is the loop's state.
    """
    instruction = computation[name]
    operands = operand_names(instruction)
    match instruction.opcode:
        case "constant":
            return (None, int(instruction.operands)) if re.fullmatch(r"-?\d+", instruction.operands) else None
        case "parameter":
            return arguments[int(instruction.operands)] if arguments else None
        case "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
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
            callee = computations[called(instruction, "calls")]
            return _linear(computations, callee, callee.root.name, inner) if inner else None
    return None
