"""What the commands make of their flags, with the work itself replaced by a record of how it was asked for."""

import os
import pathlib
import subprocess
import sys

import pytest

from melt_jax.checkpoint import open_model, save_model
from melt_jax.model.model import reconfigure

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
