"""Compiles the steps of the README's tables, one after the other, and prints them as markdown.

    python launch/compile_table.py                       Ouro to MELT on several TPU topologies: two tables, same rows
    python launch/compile_table.py --levers              one step, what each choice does to it
    python launch/compile_table.py --only='v6e|2.6B'     of either, the rows whose names match a regular expression

Run it in the repository's folder. Needs libtpu (pip install 'jax[tpu]'), no TPU. A minute or two for each row on two
cores.
"""

import argparse
import json
import re
import subprocess
import sys

SMALL, LARGE = "configs/ouro_1_4b.py", "configs/ouro_2_6b.py"
TOPOLOGIES = (  # config, topology, phase, sequences, tensor, micro-batches
    (SMALL, "v5e:4x4", "alignment", 4, 4, 1),
    (SMALL, "v5e:4x4", "transition", 4, 8, 2),
    (SMALL, "v6e:4x4", "alignment", 8, 4, 2),
    (SMALL, "v6e:4x4", "transition", 8, 4, 2),
    (SMALL, "v5p:2x2x2", "alignment", 8, 1, 1),
    (SMALL, "v5p:2x2x2", "transition", 8, 1, 1),
    (SMALL, "tpu7x:2x2x1", "alignment", 8, 1, 1),
    (SMALL, "tpu7x:2x2x1", "transition", 8, 2, 2),
    (LARGE, "v5p:2x2x1", "alignment", 4, 4, 4),
    (LARGE, "v5p:2x2x1", "transition", 4, 4, 4),
)
BASE = {"topology": "v5e:4x4", "phase": "alignment", "data.batch": 4, "mesh.tensor": 4, "micro_batches": 1}
LEVERS = {
    "as in the table above": {},
    "remat 'layer'": {"remat": "layer"},
    "remat 'none'": {"remat": "none"},
    "gather 'layer'": {"gather": "layer"},
    "gather and remat 'layer'": {"gather": "layer", "remat": "layer"},
    "chunks of 512": {"chunk_size": 512},
    "scores of 2 048 slots at a time": {"attention_block": 2048},
    "scores of all slots at once": {"attention_block": 10_000},
    "tensor 8": {"mesh.tensor": 8},
    "tensor 16": {"mesh.tensor": 16},
    "remat 'layer', tensor 2, 8 sequences": {"remat": "layer", "mesh.tensor": 2, "data.batch": 8},
}
RECIPE_BATCH = 32  # sequences of the recipe's step, however many are compiled for here

WHERE = ("model", "topology", "phase", "sequences", "tensor", "micro-batches")
MEMORY = ("GB a device", "temporaries, GB")
WORK = ("FLOPs / necessary", "weights gathered, copies", "collectives, GB", "seconds at peak: products + collectives")
HOURS, COMPILED = "chip-hours", "compiled in, s"


class Failed(Exception):
    """A step was not compiled, for another reason than its memory; the message is what was said about it."""


def compile_step(config, topology, phase, **overrides):
    """The record of `melt_jax.compile`, its batch as "batch"; None where the step has no place on the chip.

    Raises:
      Failed: anything else went wrong.
    """
    command = [sys.executable, "-m", "melt_jax.compile", "--json", f"--config={config}", f"--topology={topology}"]
    command += [f"--phase={phase}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return json.loads(line) | {"batch": overrides["data.batch"]}
    if "DOES NOT FIT" in done.stdout or "RESOURCE_EXHAUSTED" in done.stderr:
        return None
    said = f"{done.stdout}{done.stderr}"[-4000:]
    raise Failed(f"{' '.join(command)}\nleft with status {done.returncode}:\n{said}")


def cells(record):
    """{column: what stands there} of a record."""
    giga = lambda key: f"{record[key] / 1e9:.1f}"
    total = f"{giga('total')} of {giga('memory')}"
    moved = sum(size for _, size in record["collectives"].values()) / 1e9
    gathered = record["gathered_ratio"]
    products, collectives = record["compute_seconds"], record["collective_seconds"]
    return {
        "GB a device": total if record["fits"] else f"**{total}**",
        "temporaries, GB": giga("temporaries"),
        HOURS: f"{record['chip_hours'] * RECIPE_BATCH / record['batch']:.0f}",
        COMPILED: f"{record['compile_seconds']:.0f}",
        "FLOPs / necessary": f"{record['flops_ratio']:.2f}",
        "weights gathered, copies": "none" if gathered is None else f"{gathered:.2f}",
        "collectives, GB": f"{moved:.0f}",
        "seconds at peak: products + collectives": f"{products:.2f} + {collectives:.2f}",
    }


def head(names, columns):
    """The first two lines of a table."""
    return line((*names, *columns)) + "\n" + "|---" * (len(names) + len(columns)) + "|"


def row(names, columns, record):
    """A line of a table: the names of the row, then these columns of a record; None: it does not fit."""
    found = {columns[0]: "does not fit"} if record is None else cells(record)
    return line((*names, *(found.get(column, "") for column in columns)))


def line(words):
    """Cells as markdown."""
    return "| " + " | ".join(words) + " |"


def steps(levers, only):
    """[(the names of a row, arguments of `compile_step`)] of a table, those whose names match."""
    if levers:
        found = [((name,), {"config": SMALL} | BASE | changes) for name, changes in LEVERS.items()]
    else:
        found = [
            (
                ("1.4B" if config == SMALL else "2.6B", topology, phase, str(batch), str(tensor), str(parts)),
                {"config": config, "topology": topology, "phase": phase, "data.batch": batch, "mesh.tensor": tensor,
                 "micro_batches": parts},
            )
            for config, topology, phase, batch, tensor, parts in TOPOLOGIES
        ]  # fmt: skip
    return [(names, step) for names, step in found if re.search(only, " ".join(names))]


def main():
    """Prints a table row by row; that of topologies in two halves, its columns being many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", action="store_true", help="the table of choices")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose names, joined by spaces, match")
    args = parser.parse_args()
    names = ("choice",) if args.levers else WHERE
    columns = (*MEMORY, *WORK, COMPILED) if args.levers else (*MEMORY, HOURS, COMPILED)
    chosen = steps(args.levers, args.only)
    if not chosen:
        parser.error(f"--only: no row matches {args.only!r}")
    print(head(names, columns), flush=True)
    rows = []
    try:
        for named, step in chosen:
            rows.append((named, compile_step(**step)))
            print(row(named, columns, rows[-1][1]), flush=True)
    finally:  # what is compiled is shown, whatever stopped the rest
        if rows and not args.levers:
            print("\n" + head(WHERE[:3], WORK))
            print(*(row(named[:3], WORK, record) for named, record in rows), sep="\n", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(str(error))
