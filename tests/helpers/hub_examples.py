"""A `HubServer` with small repositories: a LoopLM with files that are not needed, a gated model and a data set."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pyarrow
import pyarrow.parquet

from melt_jax.inference.answers import fresh_problems
from tests.helpers.hub_server import HubServer

LOOPLM, GATED, PROBLEMS = "loop/LoopLM-nano", "loop/LoopLM-gated", "loop/problems"
NEEDLESS = ("README.md", "pytorch_model.bin", "original/model.safetensors", "modeling_ouro.py")
TOKENIZER = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
ROOT = pathlib.Path(__file__).parent.parent.parent
NANO = ROOT / "melt_jax/assets/ouro_nano"


def add_examples(hub: HubServer) -> dict[str, str]:
    """Fills a server; returns {repository: its commit}."""
    files = {file.name: file.read_bytes() for file in NANO.iterdir()}
    needless = dict.fromkeys(NEEDLESS, b"not needed")
    return {
        LOOPLM: hub.add(LOOPLM, files | needless),
        GATED: hub.add(GATED, files, access="gated"),
        PROBLEMS: hub.add(PROBLEMS, {"data/train-0.parquet": parquet(), "data/other.csv": b"a,b"}, "datasets"),
    }


def parquet(rows: int = 40) -> bytes:
    """A parquet file with a column of short texts that the arithmetic tokenizer can encode."""
    problems = fresh_problems(3, rows)
    texts = [problem.question + problem.steps + problem.answer for problem in problems]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), out)
    return out.getvalue()


def run_commands(cases: list[list[str]], variables: dict[str, str]) -> list[list]:
    """[status, stdout, stderr] of command lines, run in turn by forks of one process with these variables."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.run_commands"],
        input=json.dumps(cases),
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
