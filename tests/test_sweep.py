"""launch/sweep.py: the runs that its arguments describe, and the arguments it refuses before the first run."""

import json
import pathlib
import shlex
import subprocess
import sys

import pytest

from launch import sweep
from melt_jax.command_line import load_config
from melt_jax.config import InputError, freeze

ROOT = pathlib.Path(__file__).parent.parent
NANO = "configs/nano.py"


def test_prints_a_command_for_every_combination():
    """The script runs without PYTHONPATH, as documented; `--config.KEY` applies to all runs."""
    workdir = "gs://bucket/w"
    command = [sys.executable, "launch/sweep.py", f"--config={NANO}", f"--workdir={workdir}", "--print"]
    command += ["--config.log_every=5", "alignment.beta=0,1", "seed=3"]
    done = subprocess.run(command, cwd=ROOT, env={"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train = ["-m", "melt_jax.train", f"--config={NANO}"]
    assert [shlex.split(line)[1:] for line in done.stdout.splitlines()] == [
        [*train, f"--workdir={workdir}/alignment.beta={beta},seed=3"]
        + ["--config.log_every=5", f"--config.alignment.beta={beta}", "--config.seed=3"]
        for beta in (0, 1)
    ]


@pytest.mark.parametrize(
    "swept, message",
    [
        (["a"], "overrides: expected key=value or key=value,value, found 'a'"),
        (["a=1,"], "overrides: expected key=value or key=value,value, found 'a=1,'"),
        (["b=2", "b=1"], "overrides: expected each key once, found b twice"),
    ],
)
def test_combinations_reject_other_forms(swept, message):
    with pytest.raises(InputError) as error:
        sweep.combinations(swept)
    assert str(error.value) == message


def test_commas_in_brackets_belong_to_the_value():
    choices = sweep.combinations(["phases=('transition',),('transition','alignment')"])
    assert [freeze(load_config(NANO, choice)).phases for choice in choices] == [
        ("transition",),
        ("transition", "alignment"),
    ]


def test_seed_can_be_swept():
    """The seed may equal that of the evaluation."""
    choices = sweep.combinations(["seed=0,1,2"])
    sweep.check_choices(NANO, choices, [])
    assert [freeze(load_config(NANO, choice)).seed for choice in choices] == [0, 1, 2]


def test_every_run_is_checked_first():
    with pytest.raises(InputError, match=r"^alignmnt.beta=1,seed=-1: the configuration has errors:") as error:
        sweep.check_choices(NANO, sweep.combinations(["alignmnt.beta=1", "seed=-1,x"]), [("chunk_size", "many")])
    for key in ("alignmnt.beta", "seed", "chunk_size"):
        assert f"\n  - {key}: " in str(error.value)


def test_failed_runs_are_counted(tmp_path, capfd):
    """The results of the other runs are still printed."""
    commands = {tmp_path / name: [sys.executable, "-c", f"raise SystemExit({status})"] for name, status in
                (("a", 0), ("b", 75), ("c", 1))}  # fmt: skip
    (tmp_path / "a").mkdir()
    row = dict(answers=0.5, problems=4, comparison=None, loops=3, cache_bytes_per_token=16, cache_bytes_per_sequence=0)
    (tmp_path / "a/results.json").write_text(json.dumps({"teacher": row, "after alignment": row}))
    assert sweep.sweep(commands) == 2
    printed = capfd.readouterr().out.splitlines()
    assert printed[2] == f"failed with status 75: {tmp_path / 'b'}"
    assert printed[-1].split() == ["a,", "after", "alignment", "3", "50.0%", "of", "4", "–", "–", "16", "0"]
    assert printed[-2].startswith("model ")
