"""Searches the settings with which the bounds of a training step come closest to the time of its products.

    python launch/roofline_search.py --chip=v5p --records=FILE                    a table of all candidates of a chip
    python launch/roofline_search.py --chip=v5e --records=FILE --only='chunk 500' only candidates that match
    python launch/roofline_search.py --chip=v6e --records=FILE --limit=3          compiles at most three more

Candidates are compared by a ratio: the sum of the roofline's three times (products, memory, links; launch/README.md)
over the products' time at the peak of the matrix units. The goal is at most 1.5 on v5p and v5e, 1.8 on v6e. A candidate
takes minutes; FILE keeps each result, so an interrupted search resumes. It needs libtpu (pip install 'jax[tpu]') but no
TPU.
"""

import argparse
import itertools
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # the repository is not installed as a package

from launch.compile_table import SMALL, Records, StepFailedError, line

TOPOLOGIES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x2", "v6e": "v6e:4x4", "tpu7x": "tpu7x:2x2x1"}
DEVICES = {"v5e": 16, "v5p": 8, "v6e": 16, "tpu7x": 8}
GOALS = {"v5e": 1.5, "v5p": 1.5, "v6e": 1.8, "tpu7x": None}
TENSOR, AT_ONCE, CHUNKS = (1, 2, 4, 8), (1, 2, 3, 4), (500, 1000, 2000)
ATTENTION = (("pallas", 512), ("blocks", 512), ("blocks", 128))  # (`attention`, `attention_block`)
UNROLL, REMAT, GATHER = (True, False), ("products", "layer"), ("step", "layer")
OPTIONS = ("default", "overlap_vmem")
COLUMNS = ("GB a device", "products, s", "memory, s", "links, s", "bound", "sum, s", "sum / products at peak")


def candidates(chip: str, phase: str) -> list[tuple[str, dict[str, Any]]]:
    """[(name, arguments of `compile_step`)]: every combination, those most likely to fit and to be fast first."""
    found = []
    for options, gather, remat, chunk, (attention, block), unroll, at_once, tensor in itertools.product(
        OPTIONS, GATHER, REMAT, CHUNKS, ATTENTION, UNROLL, AT_ONCE, TENSOR
    ):
        groups = DEVICES[chip] // tensor
        name = f"tensor {tensor}, {at_once} at once, chunk {chunk}, {attention} of {block}, remat {remat}"
        name += f", gather {gather}, {'unrolled, ' if unroll else ''}{options}"
        step = {
            "config": SMALL, "topology": TOPOLOGIES[chip], "phase": phase, "data.batch": groups * at_once,
            "mesh.tensor": tensor, "micro_batches": 1, "chunk_size": chunk,
            "attention": attention, "attention_block": block, "unroll": unroll, "remat": remat, "gather": gather,
            "compiler_options": options,
        }  # fmt: skip
        found.append((name, step))
    return found


def ratio(record: dict[str, Any]) -> float:
    """The sum of the three bounds over the products' time at the peak of the matrix units."""
    return record["roofline"]["sum_seconds"] / record["roofline"]["full_rate_seconds"]


def cells(record: dict[str, Any] | None) -> tuple[str, ...]:
    """The cells of a candidate under `COLUMNS`; a step that exceeds the memory has one cell."""
    if record is None or not record["fits"]:
        return ("does not fit", *[""] * (len(COLUMNS) - 1))
    found = record["roofline"]
    times = (found[f"{name}_seconds"] for name in ("product", "memory", "collective"))
    return (
        f"{record['total'] / 1e9:.1f} of {record['memory'] / 1e9:.1f}",
        *(f"{seconds:.2f}" for seconds in times),
        found["bound"],
        f"{found['sum_seconds']:.2f}",
        f"{ratio(record):.2f}",
    )


def main() -> None:
    """Prints a line for each candidate, and the best one; the status is 1 if it misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, required=True)
    parser.add_argument("--phase", default="alignment", choices=("alignment", "transition"))
    parser.add_argument("--records", metavar="FILE", help="file of records; candidates with a record are not compiled")
    parser.add_argument("--only", default="", metavar="REGEX", help="only candidates whose names match")
    parser.add_argument("--limit", type=int, metavar="N", help="compile at most N candidates")
    args = parser.parse_args()
    chosen = [found for found in candidates(args.chip, args.phase) if re.search(args.only, found[0])]
    if not chosen:
        parser.error(f"--only: no candidate matches {args.only!r}")
    records, left = Records(args.records), args.limit
    print(line(("candidate", *COLUMNS)), "|---" * (1 + len(COLUMNS)) + "|", sep="\n", flush=True)
    best = None
    for name, step in chosen:
        if not records.has(step):
            if left == 0:
                continue
            left = left and left - 1
        record = records.compile(step)
        print(line((name, *cells(record))), flush=True)
        if record and record["fits"] and (best is None or ratio(record) < ratio(best[1])):
            best = name, record
    goal = GOALS[args.chip]
    if best is None:
        sys.exit("no candidate was compiled and fits")
    print(f"\nleast sum: {best[0]}: {ratio(best[1]):.2f}" + (f", goal {goal}" if goal else ""))
    sys.exit(1 if goal and ratio(best[1]) > goal else 0)


if __name__ == "__main__":
    try:
        main()
    except StepFailedError as error:
        sys.exit(str(error))
