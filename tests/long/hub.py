"""Runs every command on models of a hub: a server on this machine that speaks the API of the Hugging Face Hub.

    python -m tests.long.hub

It serves the embedded LoopLM and a data set. The commands get the server's address by HF_ENDPOINT and run as a user
types them. It prints a row for each command, with what it checks and the files that were downloaded for it, and exits
with status 1 if a check fails. `tests/test_hub.py` is the short form.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from tests.helpers.hub_examples import GATED, LOOPLM, PROBLEMS, ROOT, add_examples
from tests.helpers.hub_server import HubServer

PUSHED = "loop/MELT-nano"
SHORT = [f"--config.{phase}.{key}" for phase in ("transition", "alignment") for key in ("steps=3", "warmup_steps=1")]
SHORT += ["--config.evaluation.problems=8", "--config.evaluation.sequences=4", "--config.evaluation.sample=False"]


class Walk:
    """Runs commands and prints a row for each.

    Attributes:
      failed: number of checks that failed.
    """

    def __init__(self, hub: HubServer, folder: pathlib.Path):
        self._hub, self._folder, self.failed = hub, folder, 0

    def run(
        self,
        title: str,
        commands: Sequence[Sequence[str]],
        check: Callable[[list[str]], bool],
        expected: int = 0,
        token: bool = False,
        offline: bool = False,
    ) -> None:
        """Runs commands at the same time; `check` gets what each printed."""
        variables = self._hub.environment(self._folder / "cache", token) | {"PYTHONPATH": str(ROOT)}
        variables |= {"JAX_PLATFORMS": "cpu"} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        before, requests, start = self._hub.requests.copy(), self._hub.requests.total(), time.perf_counter()
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=os.environ | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command in commands
        ]
        texts = [process.communicate()[0] for process in running]
        seconds = time.perf_counter() - start
        sent = self._hub.requests - before
        files = ", ".join(f"{path} × {n}" for (kind, path), n in sorted(sent.items()) if kind == "CONTENT")
        passed = all(process.returncode == expected for process in running) and check(texts)
        self.failed += not passed
        count = self._hub.requests.total() - requests
        verdict = "as expected" if passed else "FAILED"
        print(f"{title:44} {seconds:5.0f} s {count:4} requests  {verdict:12} {files or 'no file'}", flush=True)
        if not passed:
            print("\n".join(texts))


def read(path: pathlib.Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text())


def main() -> None:
    """Runs the commands in the order of a user's work."""
    with HubServer() as hub, tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        commits = add_examples(hub)
        walk = Walk(hub, folder)
        reads_and_trains(walk, folder, commits)
        pushes_and_opens(walk, hub, folder)
        refuses(walk, hub)
    sys.exit(bool(walk.failed))


def reads_and_trains(walk: Walk, folder: pathlib.Path, commits: dict[str, str]) -> None:
    """From the memory table to a trained MELT, on a LoopLM of the hub."""
    done = lambda texts: True
    walk.run("memory", [["melt_jax.memory", f"--checkpoint={LOOPLM}"]], lambda texts: "LoopLM" in texts[0])
    prepare = ["melt_jax.prepare", f"--tokenizer=hf://{LOOPLM}", f"--input=hf://datasets/{PROBLEMS}/data/*.parquet"]
    prepare += [f"--output={folder / 'data'}", "--length=256", "--long=drop"]
    walk.run("prepare a data set", [prepare], lambda texts: "40 documents" in texts[0])
    convert = ["melt_jax.convert", f"--input=hf://{LOOPLM}@main", "--to=orbax"]
    two = [[*convert, f"--output={folder / name}"] for name in ("first", "second")]
    walk.run("convert, two processes at once", two, done)
    train = ["melt_jax.train", "--config=configs/nano.py", f"--config.teacher={LOOPLM}", *SHORT]
    pinned = lambda texts: read(folder / "run/config.json")["teacher"] == f"hf://{LOOPLM}@{commits[LOOPLM]}"
    walk.run("train; the run records the commit", [[*train, f"--workdir={folder / 'run'}"]], pinned)
    resumed = lambda texts: "alignment: complete" in texts[0]
    walk.run("train again, offline", [[*train, f"--workdir={folder / 'run'}"]], resumed, offline=True)
    compiled = ["melt_jax.compile", "--config=configs/nano.py", f"--config.teacher={LOOPLM}", "--topology=v5e:2x2"]
    walk.run("compile for a TPU", [compiled], lambda texts: "263,041 parameters" in texts[0])
    model = str(folder / "run/alignment/model")
    evaluate = ["melt_jax.evaluate", f"--checkpoint={model}", f"--teacher={LOOPLM}", "--problems=8", "--sequences=4"]
    walk.run("evaluate with a teacher", [evaluate], lambda texts: "KL(teacher" in texts[0])
    generate = ["melt_jax.generate", f"--checkpoint=hf://{LOOPLM}@{commits[LOOPLM][:40]}", "--prompt=a=4;b=a+3;b?"]
    walk.run("generate by a LoopLM", [generate], lambda texts: "KV cache" in texts[0])
    lm_eval = ["melt_jax.lm_eval", f"--model_args=checkpoint={LOOPLM},batch_size=4", "--limit=2"]
    walk.run(
        "lm_eval",
        [[*lm_eval, "--tasks=arithmetic_choice", "--include_path=tests/tasks"]],
        lambda texts: "arithmetic_choice" in texts[0],
    )


def pushes_and_opens(walk: Walk, hub: HubServer, folder: pathlib.Path) -> None:
    """The trained MELT goes to the hub and comes back by its name."""
    model, output = folder / "run/alignment/model", folder / "MELT"
    push = ["melt_jax.convert", f"--input={model}", f"--output={output}", "--to=published", f"--push={PUSHED}"]
    uploaded = lambda texts: f"uploaded {output} as {PUSHED}" in texts[0]
    walk.run("convert and push", [push], uploaded, token=True)
    back = ["melt_jax.convert", f"--input={PUSHED}", f"--output={folder / 'back'}", "--to=published"]
    same = lambda texts: (folder / "back/model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    walk.run("convert what was pushed: the same weights", [back], same)
    print("\nmodel card of the commit:\n")
    repo = hub.repos["models", PUSHED]
    print(repo.commits[repo.revisions["main"]]["README.md"].decode())


def refuses(walk: Walk, hub: HubServer) -> None:
    """Bad names end with one line."""
    one_line = lambda words: lambda texts: len(texts[0].splitlines()) == 1 and words in texts[0]
    memory = lambda name: [["melt_jax.memory", f"--checkpoint={name}"]]
    generate = lambda name: [["melt_jax.generate", "--prompt=a", f"--checkpoint={name}"]]
    walk.run("no such model", memory("loop/none"), one_line("found no model loop/none on"), 1)
    walk.run("no such revision", memory(f"hf://{LOOPLM}@v7"), one_line("found no revision 'v7'"), 1)
    walk.run("gated, without a token", generate(GATED), one_line("is gated; accept its terms at"), 1)
    walk.run("gated, with a token", memory(GATED), lambda texts: "LoopLM" in texts[0], token=True)
    walk.run("offline, not in the cache", memory("loop/none"), one_line("HF_HUB_OFFLINE is set"), 1, offline=True)
    hub.__exit__()
    walk.run("no answer", memory("loop/none"), one_line("found no answer from"), 1)
    walk.run("no answer, in the cache", memory(LOOPLM), lambda texts: "LoopLM" in texts[0])


if __name__ == "__main__":
    main()
