"""Compares melt_jax.lm_eval with the harness's own `hf` model, in PyTorch, on an exported folder.

    python -m tests.long.harness                        # the embedded LoopLM and a MELT made of it
    python -m tests.long.harness --checkpoint=runs/nano/melt --limit=24

Exports the checkpoint with `melt_jax.convert`, evaluates the tasks of `tests/tasks` with both, prints both columns, and
exits with status 1 if a score differs by more than --tolerance. Needs the extras `eval` and `test`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from tests.helpers.edit_config import edit_config

ROOT = pathlib.Path(__file__).parent.parent.parent
TASKS = {
    "arithmetic_choice": "acc",
    "arithmetic_step": "exact_match",
    "arithmetic_perplexity": "byte_perplexity",
}
TEACHER = "melt_jax/assets/ouro_nano"
CHUNK = 8  # of a checkpoint that states none
GATES = ("none", "last")  # a LoopLM, and the MELT without weights of its own


def environment() -> dict[str, str]:
    """Offline, on the CPU."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def run(*words: str) -> None:
    """Runs a command in the repository; its output appears only if it fails."""
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def scores(folder: pathlib.Path) -> dict[str, float]:
    """{task: score} of the newest results in a folder of the harness."""
    file = max(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(file.read_text())["results"]
    return {task: results[task][f"{metric},none"] for task, metric in TASKS.items()}


def set_chunk(folder: pathlib.Path) -> None:
    """States a short training chunk for a MELT without one, so that prompts have several chunks and it is no LoopLM."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "melt" and "chunk_size" not in config:
        edit_config(folder, chunk_size=CHUNK)


def evaluate_both(folder: pathlib.Path, checkpoint: str, limit: int) -> dict[str, tuple[float, float]]:
    """{task: (score by JAX, score by PyTorch)} of a published folder."""
    shared = ["--tasks=" + ",".join(TASKS), f"--limit={limit}", "--include_path=tests/tasks"]
    ours = f"--model_args=checkpoint={checkpoint},batch_size=16,dtype=float32"
    run(sys.executable, "-m", "melt_jax.lm_eval", ours, f"--output_path={folder / 'jax'}", *shared)
    theirs = f"pretrained={checkpoint},dtype=float32,trust_remote_code=True"
    words = ["--model", "hf", "--model_args", theirs, "--batch_size", "16", "--device", "cpu"]
    words += ["--tasks", ",".join(TASKS), "--limit", str(limit), "--include_path", "tests/tasks"]
    run(sys.executable, "-m", "lm_eval", "run", *words, "--output_path", str(folder / "torch"), "--trust_remote_code")
    jax, torch = scores(folder / "jax"), scores(folder / "torch")
    return {task: (jax[task], torch[task]) for task in TASKS}


def main() -> None:
    """Prints a row for each model and task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="model folder; default: the embedded LoopLM with each of GATES")
    parser.add_argument("--limit", type=int, default=24, help="examples of each task")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference, relative for perplexities")
    args = parser.parse_args()
    models = [(args.checkpoint, None)] if args.checkpoint else [(TEACHER, gate) for gate in GATES]
    wrong = 0
    print(f"{'model':40} {'task':24} {'melt_jax':>10} {'hf':>10}")
    for source, gate in models:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            convert = ["melt_jax.convert", f"--input={source}", f"--output={folder / 'model'}", "--to=published"]
            run(sys.executable, "-m", *convert, *([f"--gate={gate}"] if gate else []))
            set_chunk(folder / "model")
            for task, (ours, theirs) in evaluate_both(folder, str(folder / "model"), args.limit).items():
                differs = abs(ours - theirs) > args.tolerance * max(abs(theirs), 1.0)
                wrong += differs
                label = f"{source}{f', gate {gate}' if gate else ''}"
                print(f"{label:40} {task:24} {ours:10.4f} {theirs:10.4f}{'  differs' if differs else ''}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
