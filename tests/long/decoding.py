"""Speed of generation on this machine: stacked and unstacked weights, and transformers on the exported model.

    JAX_PLATFORMS=cpu python -m tests.long.decoding --prompt=128 --batch=1 --batch=8

A LoopLM and a MELT of 30M random weights (width 512, 8 layers, 4 loops, float32) continue random prompts by 33 greedy
tokens, of which the prefill selects the first. The three run in turn, `--turns` times, because a shared machine changes
its speed. The first line says how fast a prefill could be at most. The table has the median speeds of the prefill, in
prompt tokens per second, and of decoding without the prefill, in new tokens per second, and the median and range of the
ratios within a turn. A benchmark: it judges nothing, except that all three select the same tokens.
"""

import argparse
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
import torch

from melt_jax import LoopedTransformer, ModelConfig
from melt_jax.checkpoints.published import save_published
from melt_jax.inference.generation import GenerationOptions, generate
from melt_jax.model.model import init_model, unstack
from tests.helpers.hf import open_exported

NEW, CHUNK = 33, 512  # the prefill selects the first token
SIZES = dict(vocab=4096, width=512, layers=8, loops=4, heads=8, kv_heads=8, head_width=64, feed_forward=1408)


Run = tuple[float, float, list[list[int]]]  # prompt tokens per second, new tokens per second, tokens


def by_jax(model: LoopedTransformer, prompts: list[list[int]]) -> Run:
    """A run of `generate`."""
    result = generate(model, prompts, GenerationOptions(NEW, CHUNK))
    return result.prefill_speed, result.decode_speed, result.tokens


def by_transformers(model: torch.nn.Module, prompts: list[list[int]]) -> Run:
    """A run of transformers; the prefill is timed alone and subtracted from the rest."""

    inputs = torch.tensor(prompts)
    settings = dict(do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings["attention_mask"] = torch.ones_like(inputs)  # without a mask, token 0 of a prompt is padding

    def run(new):
        start = time.perf_counter()
        out = model.generate(inputs, max_new_tokens=new, **settings)
        return time.perf_counter() - start, out[:, len(prompts[0]) :].tolist()

    first, _ = run(1)
    seconds, tokens = run(NEW)
    return len(prompts) * len(prompts[0]) / first, len(prompts) * (NEW - 1) / (seconds - first), tokens


def product_bound() -> float:
    """Prompt tokens per second of the LoopLM if only its products took time, at the speed of large ones in PyTorch."""
    size = 3000
    matrix = torch.ones(size, size)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    width, feed_forward = SIZES["width"], SIZES["feed_forward"]
    weights = SIZES["layers"] * (4 * width**2 + 3 * width * feed_forward)
    return 2 * size**3 / min(seconds) / (2 * SIZES["loops"] * weights)


def with_range(ratios: list[float]) -> str:
    """The median, least and largest ratio."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Prints the table; exits with status 1 if tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, action="append", help="tokens of a prompt; default: 128 and 1024")
    parser.add_argument("--batch", type=int, action="append", help="prompts at a time; default: 1 and 8")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    print(f"products alone, at PyTorch's speed for 3,000 × 3,000: {product_bound():.0f} prompt tokens per second")
    print(f"{'model':8}{'batch':>6}{'prompt':>8}  {'part':10}{'stacked':>9}{'unstacked':>11}{'transformers':>14}"
          f"{'unstacked/stacked':>24}{'unstacked/transformers':>26}")  # fmt: skip
    equal = True
    for gate in ("none", "elementwise"):
        model = init_model(ModelConfig(**SIZES, gate=gate, max_positions=4096), jax.random.key(0))
        with tempfile.TemporaryDirectory() as folder:
            save_published(f"{folder}/model", model, dtype="float32")
            changes = {} if gate == "none" else {"chunk_size": CHUNK}
            ways = [
                (by_jax, model),
                (by_jax, unstack(model)),
                (by_transformers, open_exported(f"{folder}/model", **changes)),
            ]
        for length in args.prompt or (128, 1024):
            for batch in args.batch or (1, 8):
                prompts = np.random.default_rng(0).integers(0, SIZES["vocab"], (batch, length)).tolist()
                turns = []
                for _ in range(args.turns):
                    *speeds, tokens = zip(*(way(of, prompts) for way, of in ways))
                    turns.append(speeds)
                    equal &= tokens[0] == tokens[1] == tokens[2]
                for part, speeds in zip(("prefill", "decoding"), zip(*turns)):
                    cells = "".join(f"{statistics.median(x):>{w}.1f}" for x, w in zip(zip(*speeds), (9, 11, 14)))
                    ratios = [with_range([turn[1] / turn[i] for turn in speeds]) for i in (0, 2)]
                    name = "LoopLM" if gate == "none" else "MELT"
                    print(f"{name:8}{batch:>6}{length:>8}  {part:10}{cells}{ratios[0]:>24}{ratios[1]:>26}", flush=True)
    print("all tokens equal" if equal else "FAIL: tokens differ")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
