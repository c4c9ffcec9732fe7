"""Computes the arrays of tests/golden from each folder's weights and inputs, without melt_jax.

    python -m tests.golden.generate --check               compares every array of every folder with the stored one
    python -m tests.golden.generate --check ouro_tiny     compares the arrays of one folder
    python -m tests.golden.generate melt_tiny             rewrites golden.npz

Weights (safetensors) and inputs (input_ids, loss_mask, prompt_ids in golden.npz) are read from the folder. The arrays
of melt_* and window_* are computed in float64 by `tests.helpers.reference` and `tests.helpers.reference_gradients` and
stored as float32: they must agree to 1e-6. The arrays of ouro_* come from the published PyTorch implementation in
float32: they must agree to 1e-4. They are never rewritten, so that our reference is compared with that implementation,
not with itself.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np

from tests.helpers import reference
from tests.helpers.reference import ReferenceConfig, ReferenceRun, Tensors, run_reference
from tests.helpers.reference_gradients import loss_and_gradient

GOLDEN = pathlib.Path(__file__).parent
INPUTS = ("input_ids", "loss_mask", "prompt_ids")
NEW_TOKENS = {"ouro": 16, "melt": 12, "window": 10}
THRESHOLDS = (0.25, 0.5, 0.75, 0.9)
FULL_GRADIENTS = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.kv_gate.u_z.weight",
    "model.norm.weight",
)
BETA, ALPHA = 0.1, 0.3
BOUNDS = {"ouro": 1e-4, "melt": 1e-6, "window": 1e-6}
Arrays = dict[str, np.ndarray]


def folders() -> list[pathlib.Path]:
    """The folders of reference data."""
    return sorted(file.parent for file in GOLDEN.glob("*/golden.npz"))


def compute(folder: pathlib.Path) -> Arrays:
    """Every array of a folder's golden.npz that is not an input, float64 or integer."""
    tensors, config = reference.read_folder(folder)
    with np.load(folder / "golden.npz") as stored:
        inputs = {name: stored[name] for name in INPUTS if name in stored}
    if config.gate == "none":
        return looplm_arrays(tensors, config, inputs)
    settings = json.loads((folder / "golden.json").read_text())
    return (window_arrays if "cases" in settings else melt_arrays)(tensors, config, inputs, settings)


def looplm_arrays(tensors: Tensors, config: ReferenceConfig, inputs: Arrays) -> Arrays:
    """The arrays of a LoopLM: its forward pass, exits at several thresholds, greedy tokens."""
    run = run_sequences(tensors, config, inputs["input_ids"])
    hidden, logits = run["hidden"], reference.logits(tensors, run["hidden"])
    gate = reference.exit_logits(tensors, hidden)
    pdf = reference.exit_pdf(gate)
    out = {
        "hidden": hidden,
        "logits": logits,
        "gate": gate,
        "exit_pdf": pdf,
        "final_logits": logits[-1],
        "k": heads_first(run["keys"]),
        "v": heads_first(run["values"]),
        "attn_out": run["attention_output"],
        "layer_out": run["layer_output"],
        "expected_logits": np.einsum("bst,tbsv->bsv", pdf, logits),
    }
    for threshold in THRESHOLDS:
        reached = np.cumsum(pdf, axis=-1) >= threshold
        step = np.where(reached.any(-1), reached.argmax(-1), config.loops - 1)
        name = f"q{round(100 * threshold):03d}"
        out[f"exit_step_{name}"] = step
        out[f"exit_logits_{name}"] = np.take_along_axis(logits, step[None, ..., None], 0)[0]
    prompt = run_sequences(tensors, config, inputs["prompt_ids"])
    out |= {"prompt_k": heads_first(prompt["keys"]), "prompt_v": heads_first(prompt["values"])}
    return out | greedy(tensors, config, inputs["prompt_ids"], inputs["prompt_ids"].shape[1], NEW_TOKENS["ouro"])


def melt_arrays(tensors: Tensors, config: ReferenceConfig, inputs: Arrays, settings: dict) -> Arrays:
    """The arrays of a MELT: chunk lengths, the transition, gate variants, greedy tokens, losses and gradients."""
    ids, chunk = inputs["input_ids"], settings["chunk"]
    teacher = run_sequences(tensors, dataclasses.replace(config, gate="none"), ids)
    out = {}
    for length in settings["chunks"]:
        run = run_sequences(tensors, config, ids, length)
        out |= {f"chunk{length}_{name}": x for name, x in chunk_arrays(tensors, run, teacher, inputs).items()}
    for tag, alpha in (("alpha00", 0.0), ("alpha03", ALPHA)):
        run = run_sequences(tensors, config, ids, chunk, alpha)
        kd = distillation(tensors, run, teacher, inputs["loss_mask"])
        out |= {f"{tag}_hidden": run["hidden"], f"{tag}_attn_out": run["attention_output"], f"{tag}_kd": kd.mean()}
    for gate in ("scalar", "last", "mean", "ema"):
        variant = dataclasses.replace(config, gate=gate)
        out[f"gate_{gate}_hidden"] = run_sequences(tensors, variant, ids, chunk)["hidden"]
    gated = dataclasses.replace(config, first_loop="gated")
    out["first_gated_hidden"] = run_sequences(tensors, gated, ids, chunk)["hidden"]
    out |= greedy(tensors, config, inputs["prompt_ids"], settings["prefill"], NEW_TOKENS["melt"])
    return out | gradient_arrays(tensors, config, inputs, chunk)


def window_arrays(tensors: Tensors, config: ReferenceConfig, inputs: Arrays, settings: dict) -> Arrays:
    """The arrays of a MELT with several windows and sweeps: forward passes, greedy tokens, losses and gradients."""
    teacher = run_sequences(tensors, dataclasses.replace(config, gate="none"), inputs["input_ids"])
    changed = lambda window, sweeps: dataclasses.replace(config, window=window, sweeps=sweeps)
    names = ("hidden", "attn_out", "k", "v", "kd", "align")
    out = {}
    for case, (chunk, window, sweeps, alpha) in enumerate(settings["cases"]):
        run = run_sequences(tensors, changed(window, sweeps), inputs["input_ids"], chunk, alpha)
        arrays = chunk_arrays(tensors, run, teacher, inputs)
        out |= {f"case{case}_{name}": arrays[name] for name in names}
    prefill, window, sweeps = settings["greedy"]
    tokens = greedy(tensors, changed(window, sweeps), inputs["prompt_ids"], prefill, NEW_TOKENS["window"])
    chunk, window, sweeps = settings["grad"]
    gradients = gradient_arrays(tensors, changed(window, sweeps), inputs, chunk)
    return out | gradients | {"gen_ids": tokens["gen_ids"]}


def gradient_arrays(tensors: Tensors, config: ReferenceConfig, inputs: Arrays, chunk: int) -> Arrays:
    """The loss and gradient of each phase: the norm of every tensor's, and some in full."""
    out = {}
    for phase, options in (("phase1", {"alpha": ALPHA}), ("phase2", {"beta": BETA})):
        loss, gradient = loss_and_gradient(tensors, config, inputs["input_ids"], inputs["loss_mask"], chunk, **options)
        out[f"{phase}_loss"] = np.array(loss)
        out |= {f"{phase}_gradnorm/{name}": np.linalg.norm(x) for name, x in gradient.items()}
        out |= {f"{phase}_grad/{name}": gradient[name] for name in FULL_GRADIENTS}
    return out


def chunk_arrays(tensors: Tensors, run: Arrays, teacher: Arrays, inputs: Arrays) -> Arrays:
    """The stored arrays of one chunk length."""
    mask, hidden = inputs["loss_mask"], run["hidden"]
    kd = distillation(tensors, run, teacher, mask)
    gap = np.sum((run["attention_output"] - teacher["attention_output"]) ** 2, axis=-1)
    align = np.sum(gap * mask, axis=(2, 3)) / mask.sum()
    return {
        "hidden": hidden,
        "attn_out": run["attention_output"],
        "k": heads_first(run["shared_keys"]),
        "v": heads_first(run["shared_values"]),
        "final_logits": reference.logits(tensors, hidden[-1]),
        "exit_pdf": reference.exit_pdf(reference.exit_logits(tensors, hidden)),
        "kd_per_loop": kd,
        "kd": kd.mean(),
        "align_per_loop_layer": align,
        "align": align.mean(),
    }


def run_sequences(tensors, config, ids, chunk=None, alpha=None) -> Arrays:
    """`run_reference` of each sequence of ids [B, S]; its arrays have B before S."""
    length = ids.shape[1]
    runs = [run_reference(tensors, config, tokens, None, range(0, length, chunk or length), alpha) for tokens in ids]
    # The token axis of hidden is the second, of entries the third from last, of the others the second from last.
    axis = lambda name: -4 if name.endswith(("keys", "values")) else -3
    return {name: np.stack([run[name] for run in runs], axis(name)) for name in runs[0]}


def heads_first(entries: np.ndarray) -> np.ndarray:
    """[..., S, K, E] → [..., K, S, E]."""
    return np.swapaxes(entries, -3, -2)


def distillation(tensors, run, teacher, mask) -> np.ndarray:
    """KL(teacher ‖ student), nats per scored token: [T]."""
    log_p, log_q = (reference.log_softmax(reference.logits(tensors, x["hidden"])) for x in (teacher, run))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return np.sum(kl * mask, axis=(1, 2)) / mask.sum()


def greedy(tensors, config, prompts, prefill, count) -> Arrays:
    """gen_ids [B, count] and gen_logits [B, count, V] after prompts that are prefilled in chunks of `prefill`."""
    ids, scores = [], []
    for prompt in prompts:
        run = ReferenceRun(tensors, config)
        last = [run.append(prompt[start : start + prefill]) for start in range(0, len(prompt), prefill)][-1]
        scores.append([])
        for _ in range(count):
            scores[-1].append(reference.logits(tensors, last))
            last = run.append([int(scores[-1][-1].argmax())])
        ids.append([int(x.argmax()) for x in scores[-1]])
    return {"gen_ids": np.array(ids), "gen_logits": np.array(scores)}


def differences(folder: pathlib.Path) -> Iterator[tuple[str, float, float]]:
    """Yields (array, largest difference relative to its largest number, bound) of each array.

    The difference is infinite if the array is missing on one side. An array of numbers below 1e-6 is compared as if its
    largest were 1e-6: the KL at α = 0 is only rounding error.
    """
    computed = compute(folder)
    with np.load(folder / "golden.npz") as archive:
        stored = {name: x for name, x in archive.items() if name not in INPUTS}
    for name in sorted({*stored, *computed}):
        want, got = stored.get(name), computed.get(name)
        if want is None or got is None or want.shape != got.shape:
            yield name, float("inf"), 0.0
        elif want.dtype.kind == "i":
            yield name, float(np.abs(got - want).max()), 0.0
        else:
            scale = max(np.abs(want).max(), 1e-6)
            yield name, float(np.abs(got - want.astype(np.float64)).max() / scale), BOUNDS[folder.name.split("_")[0]]


def write(folder: pathlib.Path) -> None:
    """Rewrites golden.npz."""
    with np.load(folder / "golden.npz") as stored:
        inputs = {name: stored[name] for name in INPUTS if name in stored}
    numbers = {name: x if x.dtype.kind == "i" else x.astype(np.float32) for name, x in compute(folder).items()}
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, **inputs, **numbers)


def main(arguments: list[str] | None = None) -> int:
    """Rewrites or compares the arrays; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the stored arrays, write nothing")
    parser.add_argument("folders", nargs="*", help="names of folders; default: all")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    failed = 0
    for folder in [GOLDEN / name for name in options.folders] or folders():
        print(f"== {folder.name}")
        if options.check:
            for name, difference, bound in differences(folder):
                failed += difference > bound
                print(f"{'ok  ' if difference <= bound else 'FAIL'} {name:70s} {difference:9.2e} <= {bound:.0e}")
        elif folder.name.startswith("ouro"):
            print("not written: these arrays come from the published implementation; compare them with --check")
        else:
            write(folder)
            print("written")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
