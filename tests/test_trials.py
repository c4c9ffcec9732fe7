"""The short form of `tests.long.trials`, and its bookkeeping."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.devices import several_devices
from tests.helpers.runs import ROOT, differing
from tests.helpers.trial import Trial
from tests.long import trials


@pytest.mark.slow
def test_short_trials_survive(tmp_path):
    """Two kills, and one case of each kind of damage."""
    command = [sys.executable, "-m", "tests.long.trials", "--short", f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=several_devices(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert {path.stem for path in tmp_path.glob("*.json")} == set(trials.SHORT)


def test_finished_trials_are_not_run_again(tmp_path, monkeypatch):
    """A trial with failed cases, or that raises, runs again."""
    calls = []

    def run(folder, short):
        calls.append(short)
        trial = Trial("some")
        trial.case("first")
        trial.case("second", "planted" if len(calls) == 1 else "")
        if len(calls) == 2:
            raise RuntimeError
        return trial

    monkeypatch.setattr(trials, "TRIALS", {"some": run})
    outcomes = [trials.run_trial("some", tmp_path, True)[0] for _ in range(4)]
    assert [trial.survived for trial in outcomes] == [1, 0, 2, 2] and len(calls) == 3
    assert outcomes[0].failures == ["second: planted"] and json.loads((tmp_path / "some.json").read_text())


def test_differences_are_bitwise_and_complete():
    assert differing({"a": [1.0], "b": 2}, {"a": [1.0], "b": 2}) == []
    assert differing({"a": 0.1, "b": 2}, {"a": 0.1, "c": 2}) == ["b", "c"]
    assert differing({"a": 0.1}, {"a": 0.1 + 1e-9}) == ["a"] and differing({"a": 0.0}, {"a": -0.0}) == ["a"]


def test_commands_of_trials_are_forks():
    """The parent has not started JAX's backends, which no fork survives."""
    program = "from tests.long import trials; from jax._src import xla_bridge; print(len(xla_bridge._backends))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
