"""Compiles the training steps in the tables of launch/README.md and prints the tables as markdown.

    python launch/compile_table.py                       steps on several TPU topologies: two tables with the same rows
    python launch/compile_table.py --levers              one step with several choices
    python launch/compile_table.py --windows             steps with windows, chunk lengths and sequences at a time
    python launch/compile_table.py --decoding            decoding steps: the bytes that they move and those that must
    python launch/compile_table.py --only='v6e|2.6B'     only rows whose names match a regular expression
    python launch/compile_table.py --records=FILE        stores each result in FILE; a rerun compiles only missing rows

Run it in the repository's folder. It needs libtpu (pip install 'jax[tpu]') but no TPU. A row takes a minute or two on
two cores.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

SMALL, LARGE = "configs/ouro_1_4b.py", "configs/ouro_2_6b.py"
TOPOLOGIES = (  # config, topology, phase, sequences, tensor, micro-batches
    (SMALL, "v5e:4x4", "alignment", 4, 4, 1),
    (SMALL, "v5e:4x4", "transition", 4, 4, 1),
    (SMALL, "v6e:4x4", "alignment", 8, 2, 1),
    (SMALL, "v6e:4x4", "transition", 8, 2, 1),
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
WINDOWS = (  # window, chunk, topology, phase, sequences, tensor, micro-batches
    (128, 128, "v5e:4x4", "alignment", 4, 4, 1),
    (50, 500, "v5e:4x4", "alignment", 4, 4, 1),
    (50, 51, "v5e:4x4", "alignment", 4, 4, 1),
    (128, 128, "v5e:4x4", "transition", 4, 8, 2),
    (128, 128, "v6e:4x4", "alignment", 8, 2, 1),
    (128, 128, "v6e:4x4", "alignment", 8, 4, 2),
    (128, 128, "v6e:4x4", "alignment", 8, 4, 1),
    (128, 128, "v6e:4x4", "alignment", 16, 4, 1),
    (50, 500, "v6e:4x4", "transition", 8, 4, 2),
    (128, 128, "v6e:4x4", "transition", 8, 2, 1),
    (128, 128, "v6e:4x4", "transition", 8, 4, 2),
    (128, 128, "v5p:2x2x2", "alignment", 8, 1, 1),
    (128, 128, "v5p:2x2x2", "transition", 8, 1, 1),
)
DECODING = (  # topology, phase, sequences, slots of the cache
    ("v5e:2x2", "decode", 8, 4096),
    ("v5e:2x2", "decode_looplm", 2, 4096),  # 8 do not fit
    ("v6e:2x2", "decode", 8, 4096),
    ("v6e:2x2", "decode_looplm", 8, 4096),
    ("v5p:2x2x1", "decode", 8, 4096),
    ("v5p:2x2x1", "decode_looplm", 8, 4096),
)
RECIPE_BATCH = 32  # sequences per step of the recipe; chip-hours are scaled to it

WHERE = ("model", "topology", "phase", "sequences", "tensor", "micro-batches")
SHAPE = ("window", "chunk", *WHERE[1:])
SERVED = ("topology", "phase", "sequences", "slots")
TOTAL, RATIO, SECONDS = "GB a device", "FLOPs / necessary", "seconds at peak: products + memory + links"
MEMORY = (TOTAL, "temporaries, GB")
WORK = (RATIO, "weights gathered, copies", "collectives, GB", SECONDS)
HOURS, COMPILED = "chip-hours", "compiled in, s"
COLUMNS = {  # of each table: the columns of names, the other columns
    "topologies": (WHERE, (*MEMORY, HOURS, COMPILED)),
    "levers": (("choice",), (*MEMORY, *WORK, COMPILED)),
    "decoding": (
        SERVED,
        (TOTAL, "moved, GB", "must move, GB", "moved / must move", "ms at peak", "tokens / s", COMPILED),
    ),
    "windows": (SHAPE, ("at once", TOTAL, RATIO, SECONDS, "reading weights, s", HOURS, COMPILED)),
}

Names = tuple[str, ...]
Record = dict[str, Any] | None  # None: the step exceeds the chip's memory


class StepFailedError(Exception):
    """The compilation of a step failed for another reason than lack of memory."""


def compile_step(config: str, topology: str, phase: str, **overrides: Any) -> Record:
    """Compiles a step.

    Returns:
      The record of `melt_jax.compile` plus "batch", "tensor" and "micro_batches", or None if the step exceeds the
      memory.

    Raises:
      StepFailedError: the command failed for another reason; the message contains its output.
    """
    command = [sys.executable, "-m", "melt_jax.compile", "--json", f"--config={config}", f"--topology={topology}"]
    command += [f"--phase={phase}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            split = {"batch": "data.batch", "tensor": "mesh.tensor", "micro_batches": "micro_batches"}
            return json.loads(line) | {name: overrides[key] for name, key in split.items()}
    if "DOES NOT FIT" in done.stderr:
        return None
    output = f"{done.stdout}{done.stderr}"[-4000:]
    raise StepFailedError(f"{' '.join(command)}\nexited with status {done.returncode}:\n{output}")


class Records:
    """Records by the arguments of their steps, stored in a file of JSON lines if one is given."""

    def __init__(self, path: str | pathlib.Path | None):
        self._path = pathlib.Path(path) if path else None
        self._records: dict[str, Record] = {}
        if self._path and self._path.exists():
            self._records = dict(json.loads(line) for line in self._path.read_text().splitlines())

    def has(self, step: dict[str, Any]) -> bool:
        """Whether the record of a step is stored."""
        return json.dumps(step) in self._records

    def compile(self, step: dict[str, Any]) -> Record:
        """Returns the stored record of a step, or compiles it and stores its record."""
        key = json.dumps(step)
        if key not in self._records:
            self._records[key] = compile_step(**step)
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps([key, self._records[key]]) + "\n")
        return self._records[key]


def cells(record: dict[str, Any]) -> dict[str, str]:
    """Returns {column: cell} of a record."""
    giga = lambda key: f"{record[key] / 1e9:.1f}"
    total = f"{giga('total')} of {giga('memory')}"
    moved = sum(size for _, size in record["collectives"].values()) / 1e9
    bounds, per_step = record["roofline"], record["steps"] * record["chips"] / 3600 * RECIPE_BATCH / record["batch"]
    seconds = (bounds[f"{name}_seconds"] for name in ("product", "memory", "collective"))
    groups = record["devices"] // record["tensor"]
    return {
        "at once": f"{record['batch'] // record['micro_batches'] // groups}",
        TOTAL: total if record["fits"] else f"**{total}**",
        "temporaries, GB": giga("temporaries"),
        HOURS: f"{per_step * bounds['bound_seconds']:.0f} to {per_step * bounds['sum_seconds']:.0f}",
        COMPILED: f"{record['compile_seconds']:.0f}",
        RATIO: f"{record['flops_ratio']:.2f}",
        "weights gathered, copies": _gathered(record),
        "collectives, GB": f"{moved:.0f}",
        SECONDS: " + ".join(f"{time:.2f}" for time in seconds),
        "reading weights, s": f"{record['read_seconds']:.2f}",
    } | (_decoding_cells(record) if record.get("token_bytes") else {})


def _decoding_cells(record):
    moved, needed = record["moved_token_bytes"], record["token_bytes"]
    seconds = record["roofline"]["memory_seconds"] * moved / record["roofline"]["memory_bytes"]
    return {
        "moved, GB": f"{moved / 1e9:.2f}",
        "must move, GB": f"{needed / 1e9:.2f}",
        "moved / must move": f"{moved / needed:.3f}",
        "ms at peak": f"{seconds * 1e3:.1f}",
        "tokens / s": f"{record['batch'] / seconds:,.0f}",
    }


def _gathered(record):
    if record["gather_group"] == 1:
        return "none"
    if record["gathered_ratio"] is None:
        return "unknown"
    least = "≥ " if record["unknown_gathers"] > 0.01 * record["copy_bytes"] else ""
    return f"{least}{record['gathered_ratio']:.2f}"


def head(names: Names, columns: Names) -> str:
    """Returns the first two lines of a table."""
    return line((*names, *columns)) + "\n" + "|---" * (len(names) + len(columns)) + "|"


def row(names: Names, columns: Names, record: Record) -> str:
    """Returns a line of a table: the row's names, then columns of its record."""
    found = {columns[0]: "does not fit"} if record is None else cells(record)
    return line((*names, *(found.get(column, "") for column in columns)))


def line(words: Names) -> str:
    """Returns cells as a line of a markdown table."""
    return "| " + " | ".join(words) + " |"


def steps(table: str, only: str) -> list[tuple[Names, dict[str, Any]]]:
    """Returns [(names of the row, arguments of `compile_step`)] of the rows of a table whose names match `only`."""
    if table == "levers":
        found = [((name,), {"config": SMALL} | BASE | changes) for name, changes in LEVERS.items()]
    elif table == "decoding":
        found = [
            (tuple(map(str, row)), {"config": SMALL} | _step(*row[:3], 1, 1) | {"data.length": row[3]})
            for row in DECODING
        ]
    elif table == "windows":
        found = [
            (
                tuple(map(str, row)),
                {"config": SMALL} | _step(*row[2:]) | {"student.window": row[0], "chunk_size": row[1]},
            )
            for row in WINDOWS
        ]
    else:
        found = [
            (("1.4B" if row[0] == SMALL else "2.6B", *map(str, row[1:])), {"config": row[0]} | _step(*row[1:]))
            for row in TOPOLOGIES
        ]
    return [(names, step) for names, step in found if re.search(only, " ".join(names))]


def _step(topology, phase, batch, tensor, parts):
    return {"topology": topology, "phase": phase, "data.batch": batch, "mesh.tensor": tensor, "micro_batches": parts}


def main() -> None:
    """Prints a table row by row. The table of topologies has many columns and is printed in two halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--levers", action="store_true", help="print the table of choices")
    other.add_argument("--windows", action="store_true", help="print the table of windows")
    other.add_argument("--decoding", action="store_true", help="print the table of decoding")
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows whose names, joined by spaces, match")
    parser.add_argument("--records", metavar="FILE", help="file of records; rows with a record are not compiled again")
    args = parser.parse_args()
    table = next((name for name in ("levers", "windows", "decoding") if getattr(args, name)), "topologies")
    names, columns = COLUMNS[table]
    chosen, records = steps(table, args.only), Records(args.records)
    if not chosen:
        parser.error(f"--only: no row matches {args.only!r}")
    print(head(names, columns), flush=True)
    rows = []
    try:
        for named, step in chosen:
            rows.append((named, records.compile(step)))
            print(row(named, columns, rows[-1][1]), flush=True)
    finally:  # if a step fails, the rows so far still get their second half
        if rows and table == "topologies":
            print("\n" + head(WHERE[:3], WORK))
            print(*(row(named[:3], WORK, record) for named, record in rows), sep="\n", flush=True)


if __name__ == "__main__":
    try:
        main()
    except StepFailedError as error:
        sys.exit(str(error))
