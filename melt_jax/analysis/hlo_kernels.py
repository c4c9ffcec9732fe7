"""Reads what a Pallas kernel states about its work, from its custom call in the text of a compiled program.

FLOPs are those of the kernel's `pl.CostEstimate`. A kernel that visits only some of its blocks, such as
`melt_jax.model.attention_kernel`, also has metadata: for how many blocks the estimate holds, the operands of which a
block is fetched at a time, and the smaller sides of its products.
"""

import re
from typing import NamedTuple

from melt_jax.analysis.hlo_text import Instruction, attribute

ANY_SIDES = (2**31, 2**31)  # those of a product that runs at the full rate


class Kernel(NamedTuple):
    """A Pallas kernel.

    Attributes:
      flops: of all its blocks.
      blocks: their number.
      by_block: the indices of the operands that are fetched block by block.
      sides: of its products; see `hlo.Product`.
    """

    flops: float
    blocks: int
    by_block: frozenset[int]
    sides: tuple[int, int]


def read_kernel(instruction: Instruction) -> Kernel | None:
    """The kernel of a custom call; None for another instruction, or if the kernel has no cost estimate."""
    flops = re.search(r"\bkernel_flops=(\d+)", instruction.attributes)
    if attribute(instruction, "custom_call_target") != "tpu_custom_call" or not flops:
        return None

    def numbers(key, default):
        found = re.search(rf'"{key}":"([\d ]*)"', instruction.attributes)
        return tuple(map(int, found[1].split())) if found else default

    (blocks,) = numbers("blocks", (1,))
    sides = numbers("sides", ANY_SIDES)
    return Kernel(float(flops[1]), blocks, frozenset(numbers("operands_by_block", ())), (sides[0], sides[1]))
