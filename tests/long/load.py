"""Many prompts at once, very long generations and many training steps. Not in the test suite.

    python -m tests.long.load [--short]

- 64 prompts of 1 to 120 tokens, greedy and sampled, in float32: each must get the tokens that it gets alone.
- 10,000 tokens, sampled, in float64: each must be the token that the logits of one run over the whole sequence select,
  and the memory of the process must not grow while they are decoded.
- 2,000 training steps of a small run with 200 checkpoints: neither memory nor open files may grow between step 500 and
  2,000.

The memory of a run is its live memory (`tests.helpers.live_memory`). Resident memory also has what the allocator keeps
of freed memory, some MiB that depend on the machine's load, in which a small leak cannot be seen. What counts is the
median growth of 100 steps, because libraries use some MiB more or less at times. Orbax gains some kB in each save:
TensorStore 0.1.86 never frees the keys and values of the dictionaries that it returns to it. The trial measures that
without melt_jax. For each checkpoint and the steps before it a run may gain `SAVE_GROWTH` more, so the trial fails with
a leak of 20 kB in each checkpoint, or of 5 kB in each step.

Models are random and tiny: a LoopLM, a MELT, and a MELT with a window and two sweeps.
"""

import argparse
import dataclasses
import gc
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np

from melt_jax.config import ModelConfig
from melt_jax.inference.generation import GenerationOptions, for_decoding, generate
from melt_jax.inference.sampling import Sampling, sample_tokens
from tests.helpers.live_memory import resident_bytes
from tests.helpers.run_commands import in_fork
from tests.helpers.runs import ROOT, arguments_of, last_step, prepare
from tests.helpers.tiny import TINY, make_model, random_tokens, run
from tests.helpers.trial import Trial, print_trials
from tests.helpers.xla_flags import QUICK

CONFIGS = {
    "LoopLM": dataclasses.replace(TINY, gate="none", attention_block=512),
    "MELT": dataclasses.replace(TINY, attention_block=512),
    "MELT, window 5": dataclasses.replace(TINY, attention_block=512, window=5, sweeps=2),
}
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(1.0, top_k=20, top_p=0.95, seed=3)}
GROWTH = 8 * 2**20  # bytes of memory that a process may gain: a few of the allocator's areas
CHECKPOINT_EVERY, WINDOW = 10, 100  # steps
SAVE_GROWTH = 10_000  # bytes of live memory that a run may gain in a checkpoint and the steps before it


def many_prompts(count: int) -> Trial:
    """Each of many prompts gets the tokens that it gets alone."""
    trial = Trial(f"{count} prompts of mixed lengths")
    for name, config in CONFIGS.items():
        for error in in_fork(_differ_from_alone, config, count):
            trial.case(name, error)
    trial.worst = f"{len(trial.failures)} of {trial.cases} differ from the prompt alone (24 new tokens each)"
    return trial


def _differ_from_alone(config: ModelConfig, count: int) -> list[str]:
    """An error, or an empty text, for each prompt and each way of sampling."""
    model = for_decoding(make_model(config))
    lengths = np.random.default_rng(7).integers(1, 121, count)
    prompts = [random_tokens(1, int(length), seed)[0].tolist() for seed, length in enumerate(lengths)]
    errors = []
    for name, sampling in SAMPLINGS.items():
        # Equal numbers of slots, so that programs for one prompt are compiled once.
        options = GenerationOptions(24, 16, sampling, slot_multiple=160)
        together = generate(model, prompts, options).tokens
        for i, prompt in enumerate(prompts):
            alone = generate(model, [prompt], options, indices=[i]).tokens[0]
            same = alone == together[i]
            at = next((n for n, pair in enumerate(zip(alone, together[i])) if pair[0] != pair[1]), 0)
            errors.append("" if same else f"{name}, prompt {i} of {len(prompt)} tokens differs from token {at} on")
    return errors


def long_generations(tokens: int) -> Trial:
    """Very long generations equal a recomputation, in flat memory."""
    trial, grown = Trial(f"{tokens:,} generated tokens"), {}
    for name, config in CONFIGS.items():
        wrong, grown[name], error = in_fork(_generate_and_recompute, config, tokens)
        trial.case(f"{name}, recomputed", wrong and f"{wrong} of {tokens} tokens differ: {error}")
        trial.case(f"{name}, memory", grown[name] > GROWTH and f"grew by {grown[name] / 2**20:.1f} MiB")
    figures = ", ".join(f"{name} {growth / 2**20:.1f}" for name, growth in grown.items())
    trial.worst = f"memory gained from a tenth of the tokens to the last, MiB: {figures}"
    return trial


def _generate_and_recompute(config: ModelConfig, count: int) -> tuple[int, int, str]:
    """(tokens that differ, bytes of memory gained while decoding, the first difference)."""
    memory: list[int] = []

    def measure(new: list[list[int]]) -> None:
        gc.collect()
        memory.append(resident_bytes())

    with jax.enable_x64(True):
        model, prompt = make_model(config), random_tokens(1, 37)[0].tolist()
        sampling = Sampling(1.0, seed=5)
        options = GenerationOptions(count, 16 if config.window else 1, sampling, block=100)
        if config.window:  # chunks of at most W + 1 tokens compute what decoding does
            options = dataclasses.replace(options, prefill_chunk=config.window + 1)
        found = np.array(generate(for_decoding(model), [prompt], options, on_tokens=measure).tokens[0])
        chunk = 512 if config.gate == "none" else config.window + 1
        hidden = run(model, [prompt + found.tolist()], chunk_size=chunk).hidden[-1, :, len(prompt) - 1 : -1]
        steps = np.arange(count, dtype=np.int32)
        wanted = np.asarray(sample_tokens(model.logits(hidden)[0], sampling, np.zeros_like(steps), steps))
    differ = np.flatnonzero(found != wanted)
    first = f"the first is token {differ[0]}" if differ.size else ""
    return int(differ.size), max(memory[-5:]) - max(memory[: max(len(memory) // 10, 1)]), first


def many_steps(folder: pathlib.Path, steps: int) -> Trial:
    """Neither memory nor open files grow over many training steps; in a folder with `teacher`."""
    trial, workdir, file = Trial(f"{steps:,} training steps"), folder / "steps", folder / "steps.samples"
    shutil.rmtree(workdir, ignore_errors=True)
    file.unlink(missing_ok=True)
    changes = {"phases": "transition", "transition__steps": steps, "checkpoint_every": CHECKPOINT_EVERY, "log_every": 5}
    arguments = arguments_of(workdir, evaluation__sequences=0, mesh__fsdp=1, **changes)
    done = _measured("command", file, workdir / "transition", "melt_jax.train", *arguments)
    if not trial.case("run", (done.returncode or last_step(workdir, "transition") < steps) and done.stderr[-500:]):
        return trial
    samples = np.loadtxt(file, dtype=np.int64)  # one line each: step, live bytes, resident bytes, open files
    starts = range(steps // 4, steps - WINDOW + 1, WINDOW)
    parts = [samples[(start < samples[:, 0]) & (samples[:, 0] <= start + WINDOW)] for start in starts]
    _, live, resident, _ = np.transpose([np.median(part, axis=0) for part in parts])
    files = [part[:, 3].min() for part in parts]
    growth = np.median(np.diff(live)) * CHECKPOINT_EVERY / WINDOW
    checkpoint = workdir / "transition/checkpoints" / str(steps) / "default"
    shutil.rmtree(folder / "saves", ignore_errors=True)
    orbax = int(_measured("saves", checkpoint, folder / "saves").stdout)
    text = f"{growth / 1e3:.1f} kB of live memory a checkpoint, Orbax alone {orbax / 1e3:.1f}"
    trial.case("memory", growth > orbax + SAVE_GROWTH and text)
    trial.case("open files", files[-1] > files[0] and f"{files[0]} → {files[-1]}")
    trial.worst = (
        f"steps {starts[0]} to {steps}: {text}; live {live[0] / 2**20:.1f} → {live[-1] / 2**20:.1f} MiB, resident"
        f" {resident[0] / 2**20:.1f} → {resident[-1] / 2**20:.1f} MiB, open files {files[0]} → {files[-1]}"
    )
    return trial


def _measured(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `tests.helpers.live_memory`."""
    command = [sys.executable, "-m", "tests.helpers.live_memory", *map(str, arguments)]
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONMALLOC": "malloc"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


def main() -> int:
    """Runs the trials and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/tmp/load", type=pathlib.Path, help="replaced if it exists")
    parser.add_argument("--short", action="store_true", help="8 prompts, 300 tokens, 500 steps")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    prepare(folder, anew=True)
    prompts, tokens, steps = (8, 300, 500) if arguments.short else (64, 10_000, 2000)
    return print_trials([(many_prompts, prompts), (long_generations, tokens), (many_steps, folder, steps)])


if __name__ == "__main__":
    sys.exit(main())
