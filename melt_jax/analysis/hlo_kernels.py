"""Reads what a Pallas kernel states about its work, from its custom call in the text of a compiled program.

The FLOPs are those of the kernel's `pl.CostEstimate`. A kernel that visits only some of its blocks, such as those of
`melt_jax.model.attention_kernel`, also has metadata: the number of blocks that the estimate covers, the operands and
results that it moves block by block, each with its number of blocks, the smaller sides of its products, and the part of
the FLOPs that it does whatever it visits, as a numerator and a denominator.
"""

import re
from typing import NamedTuple

from melt_jax.analysis.hlo_text import Instruction, attribute

ANY_SIDES = (2**31, 2**31)  # those of a product that runs at the full rate


class Kernel(NamedTuple):
    """A Pallas kernel.

    Attributes:
      flops: of the kernel if it visits all blocks.
      whole: the part of the FLOPs that does not depend on the visited blocks, 0 … 1.
      blocks: their number.
      operands: {index of an operand that is fetched block by block: the number of its blocks}.
      results: the same for results; only the visited blocks are written.
      sides: of its products; see `hlo.Product`.
    """

    flops: float
    whole: float
    blocks: int
    operands: dict[int, int]
    results: dict[int, int]
    sides: tuple[int, int]


def read_kernel(instruction: Instruction) -> Kernel | None:
    """The kernel of a custom call; None for another instruction, or if the kernel has no cost estimate."""
    flops = re.search(r"\bkernel_flops=(\d+)", instruction.attributes)
    if attribute(instruction, "custom_call_target") != "tpu_custom_call" or not flops:
        return None

    def numbers(key, default):
        found = re.search(rf'"{key}":"([\d: ]*)"', instruction.attributes)
        return [int(number) for number in re.findall(r"\d+", found[1])] if found else default

    (blocks,), (part, total) = numbers("blocks", [1]), numbers("whole", [0, 1])
    sides = numbers("sides", ANY_SIDES)
    operands, results = numbers("operands_by_block", []), numbers("results_by_block", [])
    pairs = lambda flat: dict(zip(flat[::2], flat[1::2]))
    return Kernel(float(flops[1]), part / total, blocks, pairs(operands), pairs(results), (sides[0], sides[1]))
