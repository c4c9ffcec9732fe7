"""Compares the cost of a decoded token at growing contexts, of a LoopLM and of its MELT, and draws it.

    python launch/context_cost.py --topology=v5p:2x2x1 --output=context.png
    python launch/context_cost.py --cpu --output=context.png  measured here, with small random models
    python launch/context_cost.py --records=FILE ...          stores results in FILE; a rerun adds only missing ones

With a topology: the bytes of memory that the compiled decoding step of Ouro-1.4B's sizes moves for one token of each
sequence. Each model is compiled once, with a cache of 32,768 slots, and its loop over blocks of the cache counts with
the number of blocks that a context has. It needs libtpu (pip install 'jax[tpu]') but no TPU.

With --cpu: processor seconds per token of models with width 256 and 4 layers in float32, the least of several blocks
of tokens. A CPU reads all slots of its cache, so the cache has as many slots as the context.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # the repository is not installed as a package

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from melt_jax import ModelConfig
from melt_jax import compile as command
from melt_jax.analysis import figures
from melt_jax.analysis.chips import CHIPS, Chip
from melt_jax.analysis.hlo import analyse, innermost
from melt_jax.analysis.report import SCOPES
from melt_jax.analysis.topology import OFFLINE, describe_devices
from melt_jax.command_line import load_config
from melt_jax.config import freeze
from melt_jax.inference import generation
from melt_jax.inference.generation import GenerationOptions, decode_block, prepare_prefill
from melt_jax.model.cache import bytes_per_token
from melt_jax.model.model import abstract_model, init_model, parameter_count, unstack
from melt_jax.sharding import make_mesh

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MODELS = {"LoopLM": ("decode_looplm", "none"), "MELT": ("decode", "elementwise")}
SMALL = ModelConfig(vocab=1024, width=256, layers=4, heads=4, kv_heads=4, head_width=64, feed_forward=704)
CHIP_OF = {chip.name: chip for chip in CHIPS}
TOKENS, REPEATS = 4, 3  # tokens of a block, blocks


def compiled_bytes(topology: str, model: str, contexts: tuple[int, ...], sequences: int = 1) -> dict[int, float]:
    """{context: bytes that one device moves for a token of each sequence}, of one compiled program."""
    settings = {"data.length": max(contexts), "data.batch": sequences, "mesh.tensor": 1, "micro_batches": 1}
    overrides = [("teacher", "none-such"), *((key, str(value)) for key, value in settings.items())]
    config = freeze(load_config("configs/ouro_1_4b.py", overrides))
    mesh = make_mesh(config.mesh, describe_devices(topology))
    with jax.set_mesh(mesh):
        program = command.make_program(config, config.model, mesh, MODELS[model][0])
        text = program.lower().compile().as_text()

    def moved(context):
        def trips(op_name):
            if innermost(op_name, SCOPES) == "cached_blocks":
                return -(-context // config.attention_block)
            return program.tokens if op_name.count("while") == 1 else None

        return analyse(text, trips).memory_bytes / program.tokens

    return {context: moved(context) for context in contexts}


def cpu_seconds(model: str, context: int) -> float:
    """Processor seconds per token on this CPU, with a full cache of `context` tokens."""
    weights = unstack(init_model(dataclasses.replace(SMALL, gate=MODELS[model][1]), jax.random.key(0)))
    new = TOKENS * (REPEATS + 1)
    inputs = prepare_prefill(weights, [[1] * (context - new)], new, context)
    state = generation._initial_state(inputs.lengths)
    request = generation._request(GenerationOptions(new + 1), range(1))
    cache = inputs.cache._replace(segments=jnp.ones_like(inputs.cache.segments))
    run = decode_block.lower(weights, cache, state, request, block=TOKENS).compile()
    seconds = []
    for _ in range(REPEATS + 1):  # the first one warms up
        begin = time.process_time()
        cache, state, *_ = jax.block_until_ready(run(weights, cache, state, request))
        seconds.append((time.process_time() - begin) / TOKENS)
    return min(seconds[1:])


def tokens_per_second(chip: Chip, model: str, context: int, moved: float, fixed: float) -> tuple[int, float]:
    """(sequences that fit a device, the tokens per second that they decode together at the peak of its memory).

    Args:
      chip: of the topology.
      model: a key of `MODELS`.
      context: tokens of each sequence.
      moved: bytes moved for a token of one sequence.
      fixed: those of them that further sequences do not add: the weights.
    """
    config = ModelConfig(gate=MODELS[model][1])
    free = chip.device_memory - 2 * parameter_count(abstract_model(config))
    count = int(free // (context * bytes_per_token(config)))
    return count, count * chip.device_bandwidth / (fixed + count * (moved - fixed)) if count else 0.0


def print_table(costs: dict[str, list[float]], unit: str, scale: float, chip: Chip | None) -> None:
    """Prints the costs, and with a chip the speed of as many sequences as fit."""
    speed = " fit, LoopLM | tokens / s, LoopLM | fit, MELT | tokens / s, MELT |" if chip else ""
    print(f"| context | LoopLM, {unit} | MELT, {unit} | MELT / LoopLM |{speed}")
    print("|---" * (8 if chip else 4) + "|")
    # Every block of the cache costs the same, so the first two contexts give the cost of none.
    fixed = {model: values[0] - (values[1] - values[0]) for model, values in costs.items()}
    for i, context in enumerate(CONTEXTS):
        looplm, melt = (costs[model][i] for model in MODELS)
        line = f"| {context:,} | {looplm / scale:.2f} | {melt / scale:.2f} | {melt / looplm:.3f} |"
        for model in MODELS:
            if chip is None:
                continue
            count, speed = tokens_per_second(chip, model, context, costs[model][i], fixed[model])
            line += f" {count} | {speed:,.0f} |"
        print(line)


def records(path: str | None) -> dict[str, float]:
    """The results in a file of JSON lines."""
    file = pathlib.Path(path) if path else None
    return dict(json.loads(line) for line in file.read_text().splitlines()) if file and file.exists() else {}


def draw(costs: dict[str, list[float]], contexts: tuple[int, ...], label: str) -> Figure:
    """Draws the cost per token of each model over the context."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in costs.items():
        axes.plot(contexts, values, marker="o", label=name)
    axes.set(xscale="log", xlabel="context, tokens", ylabel=label)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0)
    axes.legend()
    return figure


def main() -> None:
    """Prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x1", help="TPU topology of the compiled programs")
    parser.add_argument("--cpu", action="store_true", help="measure small models on this CPU instead")
    parser.add_argument("--output", help="file of the figure")
    parser.add_argument("--records", metavar="FILE", help="file of results; those in it are not computed again")
    args = parser.parse_args()
    if args.output:
        figures.check_name(args.output)
    os.environ.update(OFFLINE)
    jax.config.update("jax_platforms", "cpu")
    known = records(args.records)
    target = "cpu" if args.cpu else args.topology
    key = lambda model, context: f"{target} {model} {context}"
    for model in MODELS:
        missing = tuple(context for context in CONTEXTS if key(model, context) not in known)
        if args.cpu:
            found = {context: cpu_seconds(model, context) for context in missing}
        else:
            found = compiled_bytes(args.topology, model, CONTEXTS) if missing else {}
        known |= {key(model, context): value for context, value in found.items()}
        if args.records:
            pathlib.Path(args.records).write_text("".join(json.dumps(item) + "\n" for item in known.items()))
    costs = {model: [known[key(model, context)] for context in CONTEXTS] for model in MODELS}
    unit, scale = ("ms", 1e-3) if args.cpu else ("GB", 1e9)
    print_table(costs, unit, scale, None if args.cpu else CHIP_OF[args.topology.split(":")[0]])
    if args.output:
        label = "ms per token" if args.cpu else "GB moved per token"
        scaled = {model: [value / scale for value in values] for model, values in costs.items()}
        figures.save(draw(scaled, CONTEXTS, label), args.output)


if __name__ == "__main__":
    main()
