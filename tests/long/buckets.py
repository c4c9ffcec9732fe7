"""Runs everything in a bucket and compares it with the same on a disk. Not part of the test suite, but for --short.

    python -m tests.long.buckets [--short]

Starts an emulator of Google Cloud Storage on loopback, with a proxy that fails every tenth request: half of these are
dropped, and of the other half only the answers are lost. Prepares data, trains a MELT with two processes, evaluates and
exports it, once on a disk without interruption and once in a bucket, where the commands are killed with SIGKILL at
chosen requests and given again. Results must be equal, bit by bit. Prints a table and exits with status 1 if one
differs. --short trains one phase, kills once and lets no request fail.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from melt_jax.checkpoints.orbax import weights_digest
from melt_jax.checkpoints.published import save_published
from melt_jax.data.arithmetic import make_problem
from melt_jax.data.records import sha256
from melt_jax.files import as_path, file_sizes, make_folder
from tests.helpers import buckets
from tests.helpers.runs import differing, leaves
from tests.helpers.start_processes import start_processes
from tests.helpers.tiny import TINY, make_model
from tests.helpers.xla_flags import QUICK

ROOT = pathlib.Path(__file__).parent.parent.parent
TOKENIZER = ROOT / "melt_jax/assets/ouro_nano"
PHASES = {"transition": 6, "alignment": 5}  # steps
FAIL_EVERY = 10
# The commands are killed at the first request whose path and query match.
PREPARE_KILLS = [r"name=data/traces/0000|uploadType=multipart", r"name=data/traces/manifest"]  # a shard; the end
TRAIN_KILLS = [
    r"POST .*transition/checkpoints/4",
    r"POST .*transition/model/params/.*d/",
    r"POST .*alignment/metrics\.jsonl",
    r"POST .*alignment/checkpoints/.*commit_success",
    r"POST .*alignment/model/\.incomplete",
]
TIMES = re.compile("seconds|tokens_per_second|goodput|mfu|memory")
OVERRIDES = {
    "chunk_size": 8,
    "student.window": 0,
    "data.source": "records",
    "data.length": 32,
    "data.batch": 4,
    "mesh.fsdp": 2,
    "log_every": 1,
    "checkpoint_every": 2,
    "evaluation.problems": 0,
    "evaluation.sequences": 0,
    "evaluation.sample": False,
    **{f"{phase}.warmup_steps": 1 for phase in PHASES},
    **{f"{phase}.steps": steps for phase, steps in PHASES.items()},
}


@dataclasses.dataclass
class Place:
    """Where everything is: a folder on a disk, or a bucket.

    Attributes:
      base: the folder, or gs://BUCKET.
      cache: a folder on the disk for the commands' cache.
      emulator: None on a disk.
      kills: how often a command was killed.
    """

    base: str
    cache: str
    emulator: buckets.Emulator | None = None
    kills: int = 0

    def run(self, *words: str, kill_at: str | None = None, count: int = 1) -> str:
        """Runs a module in `count` processes, which may be killed; returns the output of the first."""
        variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "XDG_CACHE_HOME": self.cache}
        variables["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{self.cache}/jax")
        if count > 1:
            started = start_processes(count, "-m", *words, stderr=subprocess.STDOUT, **variables)
        else:
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started: Any = [
                subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=os.environ | variables, **pipe)
            ]
        killed = threading.Event()
        if kill_at and self.emulator:
            self.emulator.on_request = lambda method, path: self._kill(started, killed, kill_at, f"{method} {path}")
        try:
            outputs = [process.communicate(timeout=1500)[0] for process in started]
        finally:
            for process in started:
                process.kill()
            if self.emulator:
                self.emulator.on_request = lambda method, path: None
        if not killed.is_set() and any(process.returncode for process in started):
            ends = [f"{output[:3000]}\n…\n{output[-3000:]}" for output in outputs]
            raise SystemExit("\n".join([" ".join(words), *ends]))
        if kill_at and not killed.is_set():
            raise SystemExit(f"{' '.join(words)}: expected a request that matches {kill_at}, found none")
        return outputs[0]

    def _kill(self, started, killed, pattern, request):
        if re.search(pattern, request) and not killed.is_set():
            killed.set()
            self.kills += 1
            for process in started:
                process.send_signal(signal.SIGKILL)

    def repeat(self, *words: str, kills: list[str], count: int = 1) -> str:
        """Runs a command that is killed at each of these requests, and then to its end."""
        for kill in kills if self.emulator else ():
            self.run(*words, kill_at=kill, count=count)
        return self.run(*words, count=count)


def write_inputs(place: Place) -> None:
    """Writes the questions and answers, as jsonl, a small random teacher, and the recipe."""
    problems = [make_problem(np.random.default_rng(i), 2) for i in range(40)]
    rows = [json.dumps({"question": p.question, "answer": f"{p.steps}</think>{p.answer}"}) for p in problems]
    base = as_path(place.base)
    make_folder(base / "input")
    (base / "input" / "a.jsonl").write_text("\n".join(rows[:20]) + "\n")
    (base / "input" / "b.jsonl").write_text("\n".join(rows[20:]) + "\n")
    looplm = make_model(dataclasses.replace(TINY, vocab=64, gate="none"))
    save_published(base / "teacher", looplm, "float32", tokenizer_from=TOKENIZER)
    recipe = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom configs.nano import get_config\n"
    (base / "recipe.py").write_text(recipe)


def prepare(place: Place, kills: list[str]) -> str:
    """Prepares the data."""
    flags = [f"--tokenizer={place.base}/teacher", f"--input={place.base}/input/*.jsonl", "--length=32"]
    columns = ["--question=question", "--answer=answer", "--shard_sequences=4"]
    return place.repeat("melt_jax.prepare", *flags, *columns, f"--output={place.base}/data/traces", kills=kills)


def train(place: Place, kills: list[str], phases: dict[str, int]) -> str:
    """Trains with two processes; `phases`: {name: steps}."""
    words = ["melt_jax.train", f"--config={place.base}/recipe.py", f"--workdir={place.base}/run"]
    overrides = OVERRIDES | {"teacher": f"{place.base}/teacher", "data.path": f"{place.base}/data/traces"}
    overrides["phases"] = ",".join(phases)
    words += [f"--config.{key}={value}" for key, value in overrides.items()]
    return place.repeat(*words, kills=kills, count=2)


def evaluate(place: Place) -> str:
    """Evaluates the first phase's model; returns the rows of perplexities and KL."""
    model, teacher = f"--checkpoint={place.base}/run/transition/model", f"--teacher={place.base}/teacher"
    data = f"--data={place.base}/data/traces"
    flags = ("--task=tokens", data, "--sequences=4", "--decoding_tokens=0")
    lines = place.run("melt_jax.evaluate", model, teacher, *flags).splitlines()
    return "\n".join(line for line in lines if line.startswith(("perplexity", "KL")))


def export(place: Place) -> str:
    """Exports the first phase's model."""
    source, output = f"--input={place.base}/run/transition/model", f"--output={place.base}/published"
    return place.run("melt_jax.convert", source, output, "--to=published")


def data_of(place: Place) -> dict[str, str]:
    """{shard: sha256} of the prepared data."""
    folder = as_path(place.base) / "data" / "traces"
    return {name: sha256(folder / name) for name in file_sizes(folder) if name.endswith(".arrayrecord")}


def log_of(place: Place, phases: dict[str, int]) -> list[dict[str, float]]:
    """The lines of the logs, without times."""
    logs = [(as_path(place.base) / "run" / phase / "metrics.jsonl").read_text() for phase in phases]
    lines = [json.loads(line) for log in logs for line in log.splitlines()]
    return [{key: value for key, value in line.items() if not TIMES.search(key)} for line in lines]


def compare(disk: Place, bucket: Place, short: bool) -> bool:
    """Runs everything in both places and prints the table; returns whether all results are equal."""
    equal, start = [], time.monotonic()
    phases = {"transition": PHASES["transition"]} if short else PHASES

    def row(name: str, same: bool, text: str) -> None:
        nonlocal start
        equal.append(same)
        seconds, start = time.monotonic() - start, time.monotonic()
        print(f"{name:10} {'equal' if same else 'DIFFERENT':10} {seconds:7.1f} s  {text}", flush=True)

    for place in (disk, bucket):
        write_inputs(place)
    for place in (disk, bucket):
        prepare(place, [] if short else PREPARE_KILLS)
    found, wanted = data_of(bucket), data_of(disk)
    row("prepare", found == wanted and len(wanted) > 2, f"{len(wanted)} shards; killed {bucket.kills} times")

    for place in (disk, bucket):
        before = place.kills
        train(place, TRAIN_KILLS[:1] if short else TRAIN_KILLS, phases)
    found, wanted = (leaves(as_path(place.base) / "run", phases) for place in (bucket, disk))
    different = differing(found, wanted)
    text = f"{len(different)} of {len(wanted)} leaves differ; killed {bucket.kills - before} times"
    row("train", not different, " ".join([text, *different[:3]]))
    found, wanted = log_of(bucket, phases), log_of(disk, phases)
    row("logs", found == wanted and len(wanted) == sum(phases.values()), f"{len(wanted)} lines")

    found, wanted = (evaluate(place) for place in (bucket, disk))
    row("evaluate", found == wanted and "perplexity" in wanted, "the printed tables")
    for place in (bucket, disk):
        export(place)
    digests = [weights_digest(f"{place.base}/published") for place in (bucket, disk)]
    row("export", digests[0] == digests[1], f"sha256 {digests[1][:12]}")
    emulator = bucket.emulator
    assert emulator is not None
    print(f"{emulator.requests} requests to the bucket, {emulator.failures} of them failed")
    return all(equal)


def main() -> int:
    """Runs everything and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="kill once, let no request fail")
    short = parser.parse_args().short
    with tempfile.TemporaryDirectory(prefix="melt_buckets_") as folder, buckets.emulator() as emulator:
        emulator.fail_every = 0 if short else FAIL_EVERY
        disk, bucket = (Place(base, f"{folder}/cache") for base in (f"{folder}/disk", emulator.new_bucket()))
        bucket.emulator = emulator
        return int(not compare(disk, bucket, short))


if __name__ == "__main__":
    sys.exit(main())
