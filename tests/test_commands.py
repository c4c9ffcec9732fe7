"""What the commands make of their flags, with the work itself replaced by a record of how it was asked for."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from melt_jax.checkpoints.orbax import open_model, save_model
from melt_jax.data.arithmetic import make_problem
from melt_jax.data.documents import Form
from melt_jax.model.model import reconfigure
from melt_jax.prepare import Settings, prepare

TOP = pathlib.Path(__file__).parent.parent
NANO = "melt_jax/assets/ouro_nano"

# Flags belong to the process, and commands share names: each command has a process of its own.
SCRIPT = """
import sys
from absl import app
from absl.testing import flagsaver
from melt_jax import {command}

class Reached(Exception):
    pass

def reached(*args, **options):
    raise Reached(args[{argument}])

{work} = reached

def main(argv):
    for case in argv[1:]:
        with flagsaver.as_parsed(**dict(flag.split("=", 1) for flag in case.split())):
            try:
                {command}.main([""])
            except Reached as chunk:
                print(chunk)

app.run(main)
"""


def evaluate(*flags):
    """Runs melt_jax.evaluate; returns the finished process."""
    command = [sys.executable, "-m", "melt_jax.evaluate", f"--checkpoint={NANO}", *flags]
    return subprocess.run(command, cwd=TOP, env=os.environ, capture_output=True, text=True)


def test_what_prepare_writes_is_evaluated_on(tmp_path):
    problems = [make_problem(np.random.default_rng(i), 2) for i in range(4)]
    rows = [{"question": p.question, "answer": f"{p.steps}</think>{p.answer}"} for p in problems]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    form = Form(question="question", answer="answer")
    prepare(NANO, [tmp_path / "a.jsonl"], tmp_path / "data", form, Settings(32))
    scored = sum(len(problem.completion) for problem in problems)
    data = f"--data={tmp_path / 'data'}"
    done = evaluate("--task=tokens", data)
    assert done.returncode == 0 and f"per loop, {scored} scored tokens" in done.stdout, done.stderr

    shard = next((tmp_path / "data").glob("*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for flags, message in (
        (("--task=tokens", data), "00000.arrayrecord: expected"),
        (("--task=tokens", data, "--length=32"), "--length goes with a token file"),
        (("--high=11",), "--low and --high must be 1 <= low <= high <= 10, got 2 and 11"),
    ):
        done = evaluate(*flags)
        assert done.returncode != 0 and message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command, flag, work, argument",
    [
        ("generate", "prefill_chunk", "generate.generate", 3),
        ("evaluate", "chunk_size", "evaluate.scoring.exact_answers", 2),
    ],
)
def test_the_chunk_is_the_flags_or_else_that_of_training_or_else_512(command, flag, work, argument, tmp_path):
    melt, prompt = tmp_path / "melt", "prompt=a=4;a?" if command == "generate" else ""
    save_model(melt, reconfigure(open_model(NANO), gate="mean"), NANO, chunk_size=3)
    cases = {
        f"checkpoint={melt}": 3,
        f"checkpoint={melt} {flag}=5": 5,
        f"checkpoint={melt} gate=none": 512,
        f"checkpoint={NANO}": 512,
    }
    script = SCRIPT.format(command=command, work=work, argument=argument)
    arguments = [f"{case} {prompt}".strip() for case in cases]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=TOP, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == list(cases.values())
