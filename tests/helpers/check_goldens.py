#!/usr/bin/env python3
"""Compares melt_jax with the reference data of tests/golden.

    python tests/helpers/check_goldens.py [FOLDER ...]      by default every folder; melt_jax must be importable

A folder contains config.json, safetensors, golden.npz and a README that describes its arrays. Prints a line per array
with its largest absolute error and the bound. The exit status is 1 if an error exceeds its bound.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import melt_jax

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
run_sequence = jax.jit(melt_jax.run_sequence, static_argnames="chunk_size")
logits = jax.jit(lambda model, hidden: model.logits(hidden))
exit_pdf = jax.jit(lambda model, hidden: model.exit_pdf(hidden))
alignment_loss = jax.jit(melt_jax.alignment_loss, static_argnames="chunk_size")
transition_loss = jax.jit(melt_jax.transition_loss, static_argnames="chunk_size")
gradients = {
    "phase1": jax.jit(jax.value_and_grad(melt_jax.transition_loss), static_argnames="chunk_size"),
    "phase2": jax.jit(jax.value_and_grad(melt_jax.alignment_loss), static_argnames="chunk_size"),
}


def run(*args, **kwargs):
    """`run_sequence`, compiled, with NumPy arrays as results."""
    return jax.device_get(run_sequence(*args, **kwargs))


class Comparison(NamedTuple):
    """One array against its reference."""

    name: str
    error: float
    bound: float
    relative: bool

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.bound)

    def __str__(self):
        unit = " of the largest" if self.relative else ""
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name:58s} {self.error:9.2e} <= {self.bound:.0e}{unit}"


def compare(name: str, got: Any, want: Any, bound: float, relative: bool = False) -> Comparison:
    """The largest absolute error, or `relative` to the largest expected number; infinite if the shapes differ."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return Comparison(f"{name}: expected shape {want.shape}, found {got.shape}", float("inf"), bound, relative)
    error = float(np.max(np.abs(got - want), initial=0.0))
    if relative:
        error /= max(float(np.max(np.abs(want), initial=0.0)), 1e-12)
    return Comparison(name, error, bound, relative)


def check_looplm(folder: pathlib.Path, golden: dict[str, np.ndarray]) -> Iterator[Comparison]:
    """Compares a LoopLM on sequences without padding, as one chunk and in chunks of five."""
    model = melt_jax.load_model(folder)
    ids = golden["input_ids"]
    mask = golden.get("attention_mask", np.ones(ids.shape)).astype(bool)
    tokens_first = lambda x: x.transpose(0, 1, 2, 4, 3, 5)  # [T, L, B, K, S, E] → [T, L, B, S, K, E]
    for b, keep in enumerate(mask):
        sequence = ids[b : b + 1, keep]
        for chunk in (sequence.shape[1], 5):
            out = run(model, sequence, chunk_size=chunk)
            at = f"sequence {b} chunk {chunk} "
            yield compare(at + "hidden", out.hidden[:, 0], golden["hidden"][:, b][:, keep], 2e-4)
            attended = golden["attn_out"][:, :, b][:, :, keep]
            yield compare(at + "attention_output", out.attention_output[:, :, 0], attended, 2e-4)
            yield compare(
                at + "logits of every loop", logits(model, out.hidden)[:, 0], golden["logits"][:, b][:, keep], 3e-4
            )
            pdf = np.asarray(exit_pdf(model, out.hidden))[0]
            yield compare(at + "exit pdf", pdf, golden["exit_pdf"][b][keep], 1e-5)
            yield from check_exit_steps(at, pdf, golden, b, keep)
            keys = tokens_first(golden["k"])[:, :, b][:, :, keep]
            yield compare(at + "keys", out.cache.keys[:, :, 0], keys, 2e-4)
            values = tokens_first(golden["v"])[:, :, b][:, :, keep]
            yield compare(at + "values", out.cache.values[:, :, 0], values, 2e-4)
    if "prompt_ids" in golden:
        for prefill in (golden["prompt_ids"].shape[1], 3):
            yield check_greedy(model, golden["prompt_ids"], golden["gen_ids"], prefill)
    if "gen_batch_ids" in golden:
        yield check_greedy(model, [sequence[keep] for sequence, keep in zip(ids, mask)], golden["gen_batch_ids"], 4)


def check_exit_steps(
    at: str, pdf: np.ndarray, golden: dict[str, np.ndarray], b: int, keep: np.ndarray
) -> Iterator[Comparison]:
    """Compares the loop at which each token exits, for each threshold."""
    for key in sorted(k for k in golden if k.startswith("exit_step_q")):
        threshold = int(key.removeprefix("exit_step_q")) / 100
        yield compare(f"{at}exit loop at {threshold}", melt_jax.exit_loop(pdf, threshold), golden[key][b][keep], 0)


def check_greedy(model: melt_jax.LoopedTransformer, prompts: Any, want: np.ndarray, prefill: int) -> Comparison:
    """Compares greedy tokens after prompts that are prefilled in chunks of `prefill` tokens."""
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    got = melt_jax.generate_tokens(model, prompts, max_new_tokens=want.shape[1], prefill_chunk=prefill)
    return compare(f"greedy tokens, prefill chunk {prefill}", got, want, 0)


def check_melt(folder: pathlib.Path, golden: dict[str, np.ndarray]) -> Iterator[Comparison]:
    """Compares a MELT; its teacher is the LoopLM inside it."""
    model, teacher = melt_jax.load_model(folder), melt_jax.load_model(folder, gate="none")
    settings = json.loads((folder / "golden.json").read_text())
    chunk, ids, mask = settings["chunk"], golden["input_ids"], golden["loss_mask"]
    for c in sorted(int(k[5:-7]) for k in golden if k.startswith("chunk") and k.endswith("_hidden")):
        out = run(model, ids, chunk_size=c)
        get = lambda name, c=c: golden[f"chunk{c}_{name}"]
        yield compare(f"chunk {c} hidden", out.hidden, get("hidden"), 2e-4)
        yield compare(f"chunk {c} attention_output", out.attention_output, get("attn_out"), 2e-4)
        yield compare(f"chunk {c} final logits", logits(model, out.hidden)[-1], get("final_logits"), 3e-4)
        yield compare(f"chunk {c} exit pdf", exit_pdf(model, out.hidden), get("exit_pdf"), 1e-5)
        yield compare(f"chunk {c} shared keys", out.cache.keys, get("k").transpose(0, 1, 3, 2, 4), 2e-4)
        yield compare(f"chunk {c} shared values", out.cache.values, get("v").transpose(0, 1, 3, 2, 4), 2e-4)
        loss = alignment_loss(model, teacher, ids, mask, beta=0.1, chunk_size=c)
        yield compare(f"chunk {c} alignment loss", loss, get("kd") + 0.1 * get("align"), 1e-4, True)
    for tag, alpha in (("alpha00", 0.0), ("alpha03", 0.3)):
        out = run(model, ids, chunk_size=chunk, alpha=alpha)
        yield compare(f"transition {alpha} hidden", out.hidden, golden[f"{tag}_hidden"], 2e-4)
        yield compare(f"transition {alpha} attention_output", out.attention_output, golden[f"{tag}_attn_out"], 2e-4)
        loss, _ = gradients["phase1"](model, teacher, ids, mask, alpha=alpha, chunk_size=chunk)
        # The KL at α = 0 is zero and its reference is rounding error, so the bound is absolute.
        yield compare(f"transition {alpha} loss", loss, golden[f"{tag}_kd"], 1e-5)
    for kind in ("scalar", "last", "mean", "ema"):
        out = run(melt_jax.load_model(folder, gate=kind), ids, chunk_size=chunk)
        yield compare(f"gate {kind} hidden", out.hidden, golden[f"gate_{kind}_hidden"], 2e-4)
    out = run(melt_jax.load_model(folder, first_loop="gated"), ids, chunk_size=chunk)
    yield compare("first loop gated hidden", out.hidden, golden["first_gated_hidden"], 2e-4)
    yield check_greedy(model, golden["prompt_ids"], golden["gen_ids"], settings["prefill"])
    yield from check_gradients(model, teacher, golden, chunk)


def check_window(folder: pathlib.Path, golden: dict[str, np.ndarray]) -> Iterator[Comparison]:
    """Compares a MELT with several windows and sweeps; its teacher is the LoopLM inside it."""
    settings, teacher = json.loads((folder / "golden.json").read_text()), melt_jax.load_model(folder, gate="none")
    ids, mask = golden["input_ids"], golden["loss_mask"]
    for case, (chunk, window, sweeps, alpha) in enumerate(settings["cases"]):
        model = melt_jax.load_model(folder, window=window, sweeps=sweeps)
        at = f"window {window} chunk {chunk} sweeps {sweeps}" + ("" if alpha is None else f" transition {alpha}")
        get = lambda name, case=case: golden[f"case{case}_{name}"]
        out = run(model, ids, chunk_size=chunk, alpha=alpha)
        yield compare(f"{at} hidden", out.hidden, get("hidden"), 2e-4)
        yield compare(f"{at} attention_output", out.attention_output, get("attn_out"), 2e-4)
        if alpha is not None:
            loss = transition_loss(model, teacher, ids, mask, alpha=alpha, chunk_size=chunk)
            yield compare(f"{at} loss", loss, get("kd"), 1e-4, True)
            continue
        yield compare(f"{at} shared keys", out.cache.keys, get("k").transpose(0, 1, 3, 2, 4), 2e-4)
        yield compare(f"{at} shared values", out.cache.values, get("v").transpose(0, 1, 3, 2, 4), 2e-4)
        loss = alignment_loss(model, teacher, ids, mask, beta=0.1, chunk_size=chunk)
        yield compare(f"{at} alignment loss", loss, get("kd") + 0.1 * get("align"), 1e-4, True)
        if chunk <= sweeps * (window + 1):
            decoded = run(model, ids, chunk_size=1)
            yield compare(f"{at} hidden in decoding", out.hidden, decoded.hidden, 2e-4)
    prefill, window, sweeps = settings["greedy"]
    model = melt_jax.load_model(folder, window=window, sweeps=sweeps)
    yield check_greedy(model, golden["prompt_ids"], golden["gen_ids"], prefill)
    chunk, window, sweeps = settings["grad"]
    model = melt_jax.load_model(folder, window=window, sweeps=sweeps)
    yield from check_gradients(model, teacher, golden, chunk)


def check_gradients(
    model: melt_jax.LoopedTransformer, teacher: melt_jax.LoopedTransformer, golden: dict[str, np.ndarray], chunk: int
) -> Iterator[Comparison]:
    """Compares, per phase, the loss, the norm of every gradient and some gradients in full."""
    ids, mask = golden["input_ids"], golden["loss_mask"]
    for phase, options in (("phase1", {"alpha": 0.3}), ("phase2", {"beta": 0.1})):
        value, gradient = jax.device_get(gradients[phase](model, teacher, ids, mask, chunk_size=chunk, **options))
        yield compare(f"{phase} loss", value, golden[f"{phase}_loss"], 1e-4, True)
        gradient = {name: np.asarray(x, np.float64) for name, x in melt_jax.to_hf_tensors(gradient).items()}
        for key in (k for k in golden if k.startswith(f"{phase}_gradnorm/")):
            name, want = key.split("/", 1)[1], golden[key]
            yield compare(
                f"{phase} gradient norm {name}", np.linalg.norm(gradient[name]), want, 1e-3, bool(want > 1e-6)
            )
        for key in (k for k in golden if k.startswith(f"{phase}_grad/")):
            name = key.split("/", 1)[1]
            yield compare(f"{phase} gradient {name}", gradient[name], golden[key], 1e-3, True)


def check_folder(folder: pathlib.Path) -> Iterator[Comparison]:
    """Yields every comparison of a folder."""
    golden = dict(np.load(folder / "golden.npz"))
    checks = {"ouro": check_looplm, "melt": check_melt, "window": check_window}
    yield from checks[folder.name.split("_")[0]](folder, golden)


def main(folders: list[str]) -> int:
    """Prints a line per comparison and returns the exit status."""
    passed = []
    for folder in map(pathlib.Path, folders or sorted(file.parent for file in GOLDEN.glob("*/golden.npz"))):
        print(f"== {folder.name}")
        for comparison in check_folder(folder):
            print(comparison, flush=True)
            passed.append(comparison.passed)
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
