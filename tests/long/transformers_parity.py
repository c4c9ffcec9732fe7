"""Compares transformers with melt_jax on exported models. Not part of the test suite.

    JAX_PLATFORMS=cpu python -m tests.long.transformers_parity [--checkpoint=runs/nano/alignment/model …]

Exports every golden checkpoint, the embedded LoopLM, the same with new gates, and each --checkpoint; opens the folders
with `AutoModelForCausalLM` in float32; generates 64 tokens after a left-padded batch of prompts by `generate`; and
prints the largest differences of logits and whether all tokens are equal. Models of the arithmetic task also answer 64
problems with either. Exits with status 1 if a logit differs by more than 2e-4 or a token differs. Takes about three
minutes on one core.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np

from melt_jax.checkpoints.orbax import default_chunk, open_model
from melt_jax.convert import Changes, convert
from melt_jax.data import arithmetic
from melt_jax.data.arithmetic_tokenizer import tokenizer_errors
from melt_jax.inference.answers import answer_of, exact_answers, fresh_problems
from tests.helpers.hf import completions, generated, generated_by_jax, open_exported

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN, NANO = ROOT / "tests/golden", ROOT / "melt_jax/assets/ouro_nano"
BOUND = 2e-4
NEW, PROBLEMS = 64, 64
# (name, folder, what convert changes, fields of the config: chunk, window, sweeps)
WINDOWS = ((4, 3, 1), (7, 3, 2), (6, 0, 3), (5, 8, 1))
MODELS = [
    *((name, GOLDEN / name, Changes(), ()) for name in ("ouro_tiny", "ouro_tiny_gqa", "ouro_tiny_sharded")),
    *((name, GOLDEN / name, Changes(), (4, 0, 1)) for name in ("melt_tiny", "melt_tiny_gqa")),
    *(
        (f"melt_tiny {gate}", GOLDEN / "melt_tiny", Changes(gate), (4, 0, 1))
        for gate in ("scalar", "mean", "ema", "last")
    ),
    ("melt_tiny gated", GOLDEN / "melt_tiny", Changes(first_loop="gated"), (4, 0, 1)),
    *(("window_tiny C={} W={} s={}".format(*window), GOLDEN / "window_tiny", Changes(), window) for window in WINDOWS),
    ("ouro_nano", NANO, Changes(), ()),
    ("ouro_nano with new gates", NANO, Changes("elementwise"), (9, 8, 1)),
]


def main() -> None:
    """Compares every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", action="append", default=[], help="a further model folder; may be repeated")
    models = MODELS + [(path, pathlib.Path(path), Changes(), ()) for path in parser.parse_args().checkpoint]
    print(
        f"{'model':40}{'prefill':>12}{f'{NEW} tokens':>12}{'tokens equal':>14}{'answers: JAX':>14}{'transformers':>14}"
    )
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, source, changes, fields) in enumerate(models):
            target = pathlib.Path(folder) / str(number)
            convert(source, target, "published", changes)
            good &= compare(name, target, dict(zip(("chunk_size", "window", "sweeps"), fields)))
    sys.exit(0 if good else 1)


def compare(name: str, folder: pathlib.Path, fields: dict[str, int]) -> bool:
    """Prints a model's line; returns whether the two agree."""
    model = open_model(folder, dtype="float32", window=fields.get("window"), sweeps=fields.get("sweeps"))
    chunk = fields.get("chunk_size") or default_chunk(folder, model.config)
    exported = open_exported(folder, **fields)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.config.vocab, length).tolist() for length in (19, 7, 3, 30)]
    tokens, logits = generated(exported, prompts, NEW)
    want_tokens, want_logits = generated_by_jax(model, prompts, NEW, chunk)
    differences = np.abs(logits - want_logits).max(axis=(0, 2))
    same = bool((tokens == want_tokens).all())
    good = same and differences.max() <= BOUND
    equal = f"{(tokens == want_tokens).sum()} of {tokens.size}"
    line = f"{name:40}{differences[0]:12.1e}{differences.max():12.1e}{equal:>14}"
    if (folder / "tokenizer.json").is_file() and not tokenizer_errors(folder):
        problems = fresh_problems(5, PROBLEMS)
        ours = exact_answers(model, problems, chunk).completions
        theirs = completions(exported, problems, arithmetic.STOP)
        good &= ours == theirs
        exact = lambda found: sum(answer_of(x) == answer_of(p.completion) for x, p in zip(found, problems))
        line += f"{exact(ours):>8} of {PROBLEMS}{exact(theirs):>8} of {PROBLEMS}"
        line += "" if ours == theirs else f"  {sum(x != y for x, y in zip(ours, theirs))} completions differ"
    print(line + ("" if good else "  FAIL"), flush=True)
    return good


if __name__ == "__main__":
    main()
