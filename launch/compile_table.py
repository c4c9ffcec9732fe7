"""Compiles the steps of the README's tables, one after the other, and prints them as markdown.

    python launch/compile_table.py             Ouro to MELT on several TPU topologies
    python launch/compile_table.py --levers    one step, what each choice does to its memory, FLOPs and traffic

Needs libtpu (pip install 'jax[tpu]'), no TPU. A minute or two for each row on two cores.
"""

import argparse
import json
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
    "tensor 8, 2 micro-batches": {"mesh.tensor": 8, "micro_batches": 2},
    "tensor 16, 4 micro-batches": {"mesh.tensor": 16, "micro_batches": 4},
    "remat 'layer', tensor 2, 8 sequences": {"remat": "layer", "mesh.tensor": 2, "data.batch": 8},
}


def compile_step(config, topology, phase, **overrides):
    """The record of `melt_jax.compile`; None, with what it said on stderr, where it does not compile."""
    command = [sys.executable, "-m", "melt_jax.compile", "--json", f"--config={config}", f"--topology={topology}"]
    command += [f"--phase={phase}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        print(done.stdout, done.stderr[-2000:], file=sys.stderr)
    return json.loads(lines[-1]) if lines else None


def row(names, record):
    """A line of a table."""
    if record is None:
        return "| " + " | ".join((*names, "does not fit", *[""] * 6)) + " |"
    giga = lambda key: f"{record[key] / 1e9:.1f}"
    moved = sum(size for _, size in record["collectives"].values()) / 1e9
    cells = (
        *names,
        f"{giga('total')} of {giga('memory')}" if record["fits"] else f"**{giga('total')} of {giga('memory')}**",
        giga("temporaries"),
        f"{record['flops_ratio']:.2f}",
        f"{record['gathered_ratio']:.2f}",
        f"{moved:.0f}",
        f"{record['compute_seconds']:.2f} + {record['collective_seconds']:.2f}",
        f"{record['compile_seconds']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def main():
    """Prints a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levers", action="store_true", help="the table of choices")
    columns = ("GB a device", "temporaries, GB", "FLOPs / necessary", "weights gathered, copies", "collectives, GB",
               "seconds at peak: products + collectives", "compiled in, s")  # fmt: skip
    levers = parser.parse_args().levers
    names = ("model", "topology", "phase", "sequences", "tensor", "micro-batches", "chip-hours")
    heads = ("choice",) if levers else names
    print("| " + " | ".join((*heads, *columns)) + " |\n" + "|---" * (len(heads) + len(columns)) + "|", flush=True)
    if levers:
        for name, changes in LEVERS.items():
            print(row((name,), compile_step(SMALL, **BASE | changes)), flush=True)
        return
    for config, topology, phase, batch, tensor, parts in TOPOLOGIES:
        choice = {"data.batch": batch, "mesh.tensor": tensor, "micro_batches": parts}
        record = compile_step(config, topology, phase, **choice)
        # The recipe's step is 32 sequences, however many are compiled for here.
        hours = f"{record['chip_hours'] * 32 / batch:.0f}" if record else ""
        name = "1.4B" if config == SMALL else "2.6B"
        print(row((name, topology, phase, str(batch), str(tensor), str(parts), hours), record), flush=True)


if __name__ == "__main__":
    main()
