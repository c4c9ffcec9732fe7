"""The grid of the attention kernels: blocks of near entries, then blocks of cached slots, of one head of one sequence.

Letters in shapes: N near entries, S cached slots, E head width, R rows of queries.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

# Bytes of VMEM for a kernel: 4,096 float32 rows take more than 12 MiB, and the compiler's default is 16.
VMEM = 20 * 2**20


def run_over_blocks(
    kernel: Callable[..., None],
    scalars: tuple[Array, Array],
    whole: tuple[Array, ...],
    near: tuple[Array, ...],
    by_slot: tuple[Array, ...],
    sizes: tuple[int, int],
    *,
    totals: tuple[Array, ...] = (),
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    near_outputs: tuple[jax.ShapeDtypeStruct, ...] = (),
    scratch: Sequence[Any],
    name: str,
    products: int,
    interpret: bool,
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
    """Runs a kernel over the blocks of near entries and then over those of slots.

    Args:
      kernel: a function of references: the scalars; (whole, near, by_slot, totals), a tuple of tuples; (outputs,
        near_outputs, changed totals); the scratch.
      scalars: (the number of live blocks of slots [1], the indices of the entries' leading dimensions).
      whole: arrays that are in VMEM all the time; the first is [1, R].
      near: `NearReach` of the near entries [1, N] each, their keys and values [N, E]; one block is in VMEM at a time.
      by_slot: the segments of the slots [1, S] and the entries [..., S, E]; a block of them is in VMEM at a time, and
        no block is fetched after the last live one.
      sizes: of a block of near entries, which divides N, and of a block of slots.
      totals: arrays like the entries; the kernel changes their live blocks in place.
      outputs: shapes of results that are in VMEM all the time.
      near_outputs: shapes of results for the near entries, [N, E].
      scratch: further arrays in VMEM.
      name: of the kernel.
      products: the number of matrix products, each of 2 · R · E FLOPs per entry.
      interpret: whether to interpret the kernel, as on platforms other than TPUs.

    Returns:
      (outputs, near_outputs, totals).
    """
    near_kv, (cached, *entries), (piece, size) = near[3:], by_slot, sizes
    rows, (near_length, width), slots = whole[0].shape[1], near_kv[0].shape, cached.shape[1]
    near_blocks, blocks = near_length // piece, -(-slots // size)
    last_near = lambda index: jnp.minimum(index, near_blocks - 1)
    live = lambda index, count: jnp.minimum(jnp.maximum(index - near_blocks, 0), jnp.maximum(count[0] - 1, 0))
    block = lambda shape, index: pl.BlockSpec(shape, _outside_mesh(index))
    at_rest = lambda x: block(x.shape, lambda index, *scalars: (0, 0))
    of_near_reach = block((1, piece), lambda index, *scalars: (0, last_near(index)))
    of_near = lambda x: block((piece, width), lambda index, *scalars: (last_near(index), 0))
    of_slots = block((1, size), lambda index, count, *others: (0, live(index, count)))

    def of_entries(x):
        lead = range(x.ndim - 2)
        place = lambda index, count, places: (*(places[i] for i in lead), live(index, count), 0)
        return block((*[None] * len(lead), size, width), place)

    # The numbers of the first operand and of the first result that move by blocks of slots.
    first, kept = len(scalars) + len(whole) + len(near), len(outputs) + len(near_outputs)
    parts = (blocks, *(blocks * math.prod(x.shape[:-2]) for x in (*entries, *totals)))
    operands_by_block = (f"{first + i}:{count}" for i, count in enumerate(parts))
    results_by_block = (f"{kept + i}:{count}" for i, count in enumerate(parts[len(by_slot) :]))
    length = near_length + slots
    (results,) = pl.pallas_call(
        _outside_mesh(kernel),
        out_shape=((outputs, near_outputs, tuple(map(_shape, totals))),),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(near_blocks + blocks,),
            in_specs=(
                (
                    tuple(map(at_rest, whole)),
                    (*[of_near_reach] * 3, *map(of_near, near_kv)),
                    (of_slots, *map(of_entries, entries)),
                    tuple(map(of_entries, totals)),
                ),
            ),
            out_specs=(
                (tuple(map(at_rest, outputs)), tuple(map(of_near, near_outputs)), tuple(map(of_entries, totals))),
            ),
            scratch_shapes=scratch,
        ),
        input_output_aliases={first + len(by_slot) + i: kept + i for i in range(len(totals))},
        interpret=interpret,
        name=name,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
        # For all blocks; `melt_jax.analysis` scales the part of the slots to the mean number of live ones.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * rows * length * width,
            transcendentals=rows * length,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in near_kv)
            + len(entries) * slots * width * entries[0].dtype.itemsize,
        ),
        metadata={
            "blocks": str(blocks),
            "whole": f"{near_length} {length}",
            "operands_by_block": " ".join(operands_by_block),
            "results_by_block": " ".join(results_by_block),
            "sides": f"{width} {min(size, rows)}",  # a product sums over the width or its result has it
        },
    )(*scalars, (whole, near, by_slot, totals))
    return results


def _shape(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _outside_mesh(function):
    """Traces a function without a mesh, as code of one device; else the interpreter finds two meshes in a program."""

    @functools.wraps(function)
    def run(*args):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return function(*args)

    return run
