"""Two processes train bitwise like one, and every mesh restores their checkpoints bitwise."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest

from melt_jax.checkpoints.orbax import open_model, save_model
from melt_jax.training import processes as processes_module
from melt_jax.training.checkpoints import SaveError
from melt_jax.training.processes import (
    broadcast_from_process_0,
    broadcast_text_from_process_0,
    is_communication_error,
    record_failure,
    text_from_process_0,
    wait_for_abort,
)
from tests.helpers.devices import several_devices
from tests.helpers.mesh_steps import gap
from tests.helpers.process_run import OTHERS, STEPS
from tests.helpers.runs import differing, leaves
from tests.helpers.start_processes import start_processes
from tests.helpers.tiny import TINY, make_model
from tests.long import processes

pytestmark = pytest.mark.xdist_group("processes")  # one worker makes the runs


def start(folder, name, count, devices, *other):
    """Starts processes that train together and write their results to FOLDER/NAMEi.json."""
    arguments = ["-m", "tests.helpers.process_run", folder / "teacher", folder / name, folder / name, *other]
    return start_processes(count, *arguments, stderr=subprocess.STDOUT, **several_devices(devices))


def wait(processes):
    """Waits for processes and returns their outputs; shows them if a process fails."""
    try:
        outputs = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of two processes with four devices each and of one with eight, by name, and their outputs."""
    folder = tmp_path_factory.mktemp("processes")
    save_model(folder / "teacher", make_model(dataclasses.replace(TINY, vocab=64, gate="none")))
    outputs = wait(start(folder, "two", 2, 4))
    outputs += wait(start(folder, "one", 1, 8, folder / "two"))
    read = lambda name: json.loads((folder / name).read_text())
    return {"two": [read("two0.json"), read("two1.json")], "one": read("one0.json"), "folder": folder}, outputs


@pytest.mark.slow
def test_two_processes_train_as_one(runs):
    """Losses, weights and moments are bitwise equal: both draw the same gates, and each sequence is used once."""
    found, outputs = runs
    lines = [(found["folder"] / name / "transition/metrics.jsonl").read_text().splitlines() for name in ("two", "one")]
    two, one = ([json.loads(line)["loss"] for line in log] for log in lines)
    assert len(one) == STEPS and one[-1] > 0 and two == one
    weights = [leaves(found["folder"] / name, {"transition": STEPS}) for name in ("two", "one")]
    assert len(weights[0]) > 60 and not differing(*weights)
    assert "parameters on 8 × cpu" in outputs[0] and "transition" not in outputs[1]


@pytest.mark.slow
def test_each_process_makes_its_own_sequences(runs):
    two, one = ([np.array(process["tokens"]) for process in part] for part in (runs[0]["two"], [runs[0]["one"]]))
    assert [tokens.shape for tokens in two] == [(STEPS, 4, 32)] * 2
    np.testing.assert_array_equal(np.concatenate(two, axis=1), one[0])


@pytest.mark.slow
def test_checkpoints_are_restored_on_every_mesh(runs):
    """Weights, moments and step, saved on replica 2 × fsdp 2 × tensor 2, then restored on one mesh after another."""
    found = runs[0]["one"]
    assert found["restored"] == {str(shape): [] for shape in OTHERS}
    assert found["resumed"] == {str(shape): [] for shape in OTHERS[:-1]}
    model = open_model(runs[0]["folder"] / "two/transition/model", dtype="float32")
    assert model.config.gate == "elementwise"


def test_nan_is_never_bitwise_equal(monkeypatch, tmp_path):
    """`tests.long.processes` and `tests.helpers.mesh_steps` report nan as a difference, even if both sides have it."""
    found = {"a": {"x.model.w": np.ones(3)}, "b": {"x.model.w": np.ones(3)}}
    logged = {"a": np.array([1.0, 2.0]), "b": np.array([1.0, 2.0])}
    monkeypatch.setattr(processes, "leaves", lambda workdir, phases: found[workdir.name])
    monkeypatch.setattr(processes, "losses", lambda workdir: logged[workdir.name])
    equal = lambda: processes.compare(tmp_path / "a", tmp_path / "b").bitwise_equal
    assert equal()
    logged["a"] = np.array([1.0, np.nan])
    assert not equal()
    logged["b"] = logged["a"]
    assert not equal()
    logged["a"] = logged["b"] = np.array([1.0, 2.0])
    found["a"] = {"x.model.w": np.array([np.nan, 1, 1])}
    assert not equal()
    found["b"] = found["a"]
    assert not equal()
    assert np.isnan(gap({"m": np.zeros(1), "w": np.array([1, np.inf])}, {"m": np.zeros(1), "w": np.ones(2)}))


def test_comparison_of_runs_is_bitwise(monkeypatch, tmp_path):
    """The sign of a zero in an optimizer moment and one answer in results.json count as differences."""
    found = {"a": {"x.model.w": np.ones(3), "m": np.zeros(1)}, "b": {"x.model.w": np.ones(3), "m": np.zeros(1)}}
    monkeypatch.setattr(processes, "leaves", lambda workdir, phases: found[workdir.name])
    monkeypatch.setattr(processes, "losses", lambda workdir: np.ones(2))
    for name in found:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    compare = lambda: processes.compare(tmp_path / "a", tmp_path / "b")
    assert compare().bitwise_equal
    found["a"]["m"] = -np.zeros(1)
    assert not compare().bitwise_equal and compare().leaves == 1
    found["a"]["m"] = np.zeros(1)
    (tmp_path / "a/results.json").write_text('{"answers": 1}')
    assert not compare().bitwise_equal


FAILS = """
import sys
import jax
from melt_jax import command_line, train
from melt_jax.config import InputError
from melt_jax.training.processes import wait_for_process_0

def run(config, workdir):
    if jax.process_index() == 0 or sys.argv[1] == "all":
        raise (RuntimeError if sys.argv[1] == "defect" else InputError)("planted")
    wait_for_process_0()

train.run = run
train.define_flags()
command_line.run(lambda argv: train.main(argv[:1]), positional=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["defect", "input", "all"])
def test_a_failed_process_waits_for_no_other(tmp_path, kind):
    """Its own error is its last line, and JAX ends the others, which wait for it; if all fail, each ends by itself."""
    flags = (kind, "--config=configs/nano.py", f"--workdir={tmp_path}")
    started = start_processes(2, "-c", FAILS, *flags, stderr=subprocess.STDOUT, **several_devices(1))
    first, other = (process.communicate(timeout=1800)[0] for process in started)
    assert started[0].returncode == 1 and first.strip().endswith(": planted") and "barrier" not in first.lower()
    assert ("Traceback" in first) == (kind == "defect")
    if kind == "all":
        assert started[1].returncode == 1 and other.strip().endswith(": planted")
    else:
        assert started[1].returncode not in (0, 1) and "planted" not in other


def test_broken_communication_is_told_from_other_errors(monkeypatch):
    """Also if it is the reason of an error about a save. Too little memory and files that cannot be written differ."""

    def because_of(cause):
        error = SaveError("save")
        error.__cause__ = cause
        return error

    broken = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    gathered = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    disk = ValueError("UNAVAILABLE: Error writing file [source locations='tensorstore/…']")
    assert not is_communication_error(broken)  # of a single process
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert all(map(is_communication_error, (broken, because_of(broken), because_of(gathered))))
    others = (memory, ValueError("x"), because_of(OSError("full")), because_of(disk))
    assert not any(map(is_communication_error, others))


def test_process_waits_for_the_name_of_a_lost_one(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(processes_module.time, "sleep", waited.append)
    wait_for_abort(ValueError("reset\nby peer"), 7)
    assert waited == [7 + processes_module.VERDICT_SECONDS]
    assert "of the run, found reset by peer; waits up to 37 s for JAX to list" in capsys.readouterr().err


def test_single_process_broadcasts_to_itself():
    assert broadcast_from_process_0(True) is True and broadcast_from_process_0(False) is False
    assert [broadcast_text_from_process_0(text) for text in ("", "T × L")] == ["", "T × L"]
    assert text_from_process_0(str.upper, "loop") == "LOOP"


@pytest.mark.slow
def test_text_of_process_0_reaches_every_process():
    """Texts may have any length, even 0. Bad input that process 0 finds is reported by every process."""
    program = """
import jax
from melt_jax.config import InputError
from melt_jax.training.processes import broadcast_text_from_process_0, initialize_distributed, text_from_process_0
initialize_distributed()
for text in ("", "T × L", "a" * 1000):
    print(broadcast_text_from_process_0(text if jax.process_index() == 0 else "ignored"))
print(text_from_process_0(lambda: f"process {jax.process_index()}"))
def fail():
    raise InputError("no such model")
try:
    text_from_process_0(fail)
except InputError as error:
    print(error)
"""
    for process in start_processes(2, "-c", program):
        output = process.communicate(timeout=900)[0]  # Gloo prints a line first
        assert output.endswith("\n\nT × L\n" + "a" * 1000 + "\nprocess 0\nno such model\n")


def test_failures_are_recorded_for_the_launcher(tmp_path, monkeypatch, capsys):
    record_failure(SaveError("disk full"))  # without the variable, nothing is written
    monkeypatch.setenv("MELT_FAILED", str(tmp_path / "failed"))
    record_failure(SaveError("disk full"))
    record_failure(ValueError("a defect"))
    lines = (tmp_path / "failed").read_text().splitlines()
    assert lines == ["process 0: SaveError: disk full", "process 0: ValueError: a defect"]
    monkeypatch.setenv("MELT_FAILED", str(tmp_path / "failed/nowhere"))
    record_failure(SaveError("disk full"))  # is reported, and the error itself is not replaced
    assert "failed/nowhere: expected a file that can be written, found" in capsys.readouterr().err
