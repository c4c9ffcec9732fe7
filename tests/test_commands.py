"""Every command rejects bad input with status 1 and one message; `evaluate` reads what `prepare` writes."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from melt_jax.data.arithmetic import make_problem
from melt_jax.generate import read_prompts
from tests.helpers.run_commands import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
NANO = "melt_jax/assets/ouro_nano"
MISSING = "tests/no_such_file"

VALID = {
    "train": {"config": "configs/nano.py", "workdir": "runs/unused"},
    "compile": {"config": "configs/nano.py", "topology": "v5e:2x2"},
    "prepare": {"tokenizer": NANO, "input": MISSING, "output": "data/unused"},
    "convert": {"input": NANO, "output": "checkpoints/unused", "to": "orbax"},
    "generate": {"checkpoint": NANO, "prompt": "a=4;a?"},
    "evaluate": {"checkpoint": NANO},
    "memory": {},
    "plot": {"workdir": MISSING, "output": "unused.png"},
}
REQUIRED = [
    (command, flag) for command, flags in VALID.items() for flag in flags if (command, flag) != ("prepare", "input")
]
BAD_VALUES = {
    "train": ("config.chunk_size", "many"),
    "compile": ("phase", "sleeping"),
    "prepare": ("length", "many"),
    "convert": ("to", "paper"),
    "generate": ("top_k", "many"),
    "evaluate": ("task", "sleeping"),
    "memory": ("loops", "many"),
    "plot": ("output", "curves.doc"),
}
MISSING_FILES = {
    "train": "config",
    "compile": "config",
    "prepare": "input",
    "convert": "input",
    "generate": "checkpoint",
    "evaluate": "checkpoint",
    "memory": "checkpoint",
    "plot": "workdir",
}


def run_commands(cases: list[list[str]]) -> list[list]:
    """[status, stdout, stderr] of each command line, run by a process that has imported all commands."""
    process = [sys.executable, "-m", "tests.helpers.run_commands"]
    done = subprocess.run(process, input=json.dumps(cases), cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command_line(command: str, *extra: str, **changes: str | None) -> list[str]:
    """A command with its valid flags, some of them changed or, if None, left out."""
    flags = VALID[command] | changes
    return [f"melt_jax.{command}", *(f"--{key}={value}" for key, value in flags.items() if value is not None), *extra]


CASES = (
    {(command, "unknown flag"): command_line(command, "--no_such_flag=3") for command in COMMANDS}
    | {(command, "argument"): command_line(command, "extra") for command in COMMANDS}
    | {(command, flag): command_line(command, **{flag: None}) for command, flag in REQUIRED}
    | {(command, "bad value"): command_line(command, **dict([pair])) for command, pair in BAD_VALUES.items()}
    | {(command, "missing file"): command_line(command, **{flag: MISSING}) for command, flag in MISSING_FILES.items()}
)


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], list]:
    """The status, stdout and stderr of each of `CASES`."""
    return dict(zip(CASES, run_commands(list(CASES.values()))))


@pytest.mark.parametrize("command, kind", CASES)
def test_bad_input_ends_with_one_message(outcomes, command, kind):
    """Status 1, nothing on standard output, and one line that names the command and the bad input."""
    status, stdout, stderr = outcomes[command, kind]
    named = {
        "unknown flag": "no_such_flag",
        "argument": "'extra'",
        "bad value": BAD_VALUES[command][1],
        "missing file": MISSING,
    }
    lines = stderr.splitlines()
    if (command, kind) == ("train", "bad value"):
        assert lines.pop(0) == "melt_jax.train: the configuration has errors:"
    else:
        assert stderr.startswith(f"melt_jax.{command}: ")
    assert status == 1 and stdout == "" and len(lines) == 1 and named.get(kind, f"--{kind}") in lines[0]


def test_every_command_has_cases():
    assert set(VALID) == set(BAD_VALUES) == set(MISSING_FILES) == set(COMMANDS)


def test_train_reports_all_config_errors():
    case = command_line("train", "--config.alignmnt.beta=1", "--config.phases=x,y", "--config.seed=-1")
    [(status, stdout, stderr)] = run_commands([case])
    assert (
        status == 1
        and stdout == ""
        and stderr.splitlines()
        == [
            "melt_jax.train: the configuration has errors:",
            "  - alignmnt.beta: unknown key; did you mean alignment.beta?",
            "  - seed: expected at least 0 and at most 4294967295, found -1",
            "  - phases: expected one of pretraining, warm_start, transition, alignment, found ('x', 'y')",
        ]
    )


@pytest.mark.slow
def test_evaluate_reads_what_prepare_writes(tmp_path):
    problems = [make_problem(np.random.default_rng(i), 2) for i in range(4)]
    rows = [{"question": p.question, "answer": f"{p.steps}</think>{p.answer}"} for p in problems]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "data"
    columns = ("--question=question", "--answer=answer", "--length=32")
    flags = {"input": str(tmp_path / "a.jsonl"), "output": str(data)}
    evaluate = command_line("evaluate", "--task=tokens", f"--data={data}")
    prepared, evaluated = run_commands([command_line("prepare", *columns, **flags), evaluate])
    assert prepared[0] == 0, prepared
    scored = sum(len(problem.completion) for problem in problems)
    assert evaluated[0] == 0 and f"{scored} scored tokens" in evaluated[1], evaluated

    shard = next(data.glob("*.arrayrecord"))
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged, with_length = run_commands([evaluate, [*evaluate, "--length=32"]])
    assert damaged[0] == 1 and "00000.arrayrecord: expected" in damaged[2] and "Traceback" not in damaged[2]
    assert with_length[0] == 1 and "--length" in with_length[2] and "Traceback" not in with_length[2]


def test_evaluate_takes_several_numbers_of_loops(tmp_path):
    """Each has a table of scores and one of the gates; a number that guidance excludes is an error."""
    data = tmp_path / "tokens.npy"
    np.save(data, np.arange(24, dtype=np.int32).reshape(2, 12) % 7)
    flags = (f"--data={data}", "--task=tokens", "--loops=1,3", "--decoding_tokens=0")
    case = command_line("evaluate", *flags, checkpoint="tests/golden/melt_tiny_gqa")
    evaluated, guided = run_commands([case, [*case, "--guidance=0.2"]])
    lines = evaluated[1].splitlines()
    assert evaluated[0] == 0, evaluated
    assert [line.split()[0] for line in lines if " loops, 22 scored tokens" in line] == ["1", "3"]
    assert sum(line.startswith("gate openness, mean of 1 − z, chunk ") for line in lines) == 2
    assert guided[:2] == [1, ""] and "guidance: expected 0 with one loop, found 0.2" in guided[2]


def test_prompts_are_separated_by_newlines_only(tmp_path):
    (tmp_path / "prompts").write_bytes("a\u2028b\x0cc\r\n\n d\n".encode())
    assert read_prompts(str(tmp_path / "prompts")) == ["a\u2028b\x0cc", " d"]
