"""Where a run's time goes over several attempts, and what each attempt records."""

import json

import jax
import pytest
from rich.console import Console

from melt_jax import train
from melt_jax.training import attempts
from melt_jax.training.attempts import CATEGORIES, COMPILE_EVENT, Attempt, spent, summarize
from tests.test_train import alignment_run, call_at_step, sigterm, teacher  # noqa: F401


def attempt(started, phases, **seconds):
    """The file of an attempt without pauses."""
    seconds = dict.fromkeys(CATEGORIES, 0.0) | seconds
    return {"started": started, "updated": started + sum(seconds.values()), "seconds": seconds, "phases": phases}


def phase(start, last, seconds):
    return {"start": start, "last": last, "seconds": seconds}


@pytest.fixture
def now(monkeypatch):
    """The clock of attempts, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(attempts, "clock", lambda: now[0])
    return now


def test_nested_blocks_are_counted_once(now, tmp_path):
    """Compilation is taken from the block in which it happens; the rest of an attempt is loading."""
    with Attempt(tmp_path, Console(quiet=True)) as this:
        now[0] += 1
        with spent("training"):
            now[0] += 10
            with spent("saving"):
                now[0] += 3
            now[0] += 5
            jax.monitoring.record_event_duration_secs(COMPILE_EVENT, 4.0)
        now[0] += 2
    wanted = {"training": 11, "compiling": 4, "saving": 3, "evaluating": 0, "waiting": 0, "loading": 3}
    assert this.goodput().seconds == wanted | {"repeated": 0, "stopped": 0}
    assert this.goodput().fraction == pytest.approx(11 / 21)


def test_repeated_and_stopped_seconds_are_no_goodput():
    """The first attempt trained 8 steps, the second resumes after 6; the third only after another phase began."""
    first = attempt(0.0, {"transition": phase(0, 8, 16.0)}, training=16.0, loading=4.0)
    second = attempt(30.0, {"transition": phase(6, 10, 8.0), "alignment": phase(0, 3, 9.0)}, training=17.0)
    third = attempt(50.0, {"alignment": phase(2, 4, 6.0)}, training=6.0)
    total = summarize([first, second, third])
    assert total.seconds["repeated"] == 2 * 2.0 + 1 * 3.0
    assert total.seconds["stopped"] == 10.0 + 3.0
    assert total.seconds["training"] == 39.0 - 7.0
    assert sum(total.seconds.values()) == 56.0
    assert str(total).startswith("goodput 57.1% of 56.0 s in 3 attempts; seconds: training 32.0, ")


def test_attempt_without_progress_repeats_nothing():
    """A start that dies before its first step does not hide which steps the next start repeats."""
    attempts = [
        attempt(0.0, {"transition": phase(0, 4, 8.0)}, training=8.0),
        attempt(8.0, {}, loading=1.0),
        attempt(9.0, {"transition": phase(2, 2, 0.0)}, loading=1.0),
    ]
    assert summarize(attempts).seconds["repeated"] == 4.0


def test_killed_attempt_keeps_its_last_record(now, tmp_path):
    """Its file is as of the last line of the log, and the next attempt has the next number."""
    with pytest.raises(KeyboardInterrupt), Attempt(tmp_path, Console(quiet=True)):
        with spent("training"):
            attempts.record("transition", 0)
            now[0] += 6
            attempts.record("transition", 3)
        found = json.loads((tmp_path / "attempts/0001.json").read_text())
        assert found["phases"] == {"transition": phase(0, 3, 6.0)}
        raise KeyboardInterrupt
    with Attempt(tmp_path, Console(quiet=True)) as second:
        assert second.goodput().attempts == 2
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == ["0001.json", "0002.json"]
    (tmp_path / "attempts/0001.json").unlink()
    with Attempt(tmp_path, Console(quiet=True)):
        pass
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == ["0002.json", "0003.json"]


def test_commit_is_that_of_the_sources():
    commit = attempts.git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


@pytest.mark.slow
def test_run_ends_its_log_with_the_goodput(teacher, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Over the preempted attempt and the one that completes the run; also in the last line of metrics.jsonl."""
    config = alignment_run(teacher, 4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        call_at_step(2, sigterm, patch)
        train.run(config, tmp_path)
    train.run(config, tmp_path)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("goodput ") and " s in 2 attempts; seconds: training " in last
    record = json.loads((tmp_path / "alignment/metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 4 and 0 < record["goodput"] < 1 and record["goodput/attempts"] == 2
    files = attempts.read_attempts(tmp_path)
    assert [file["phases"]["alignment"]["start"] for file in files] == [0, 3]
    assert all(file["git_commit"] == attempts.git_commit() for file in files)
    for file in files:
        assert sum(file["seconds"].values()) == pytest.approx(file["updated"] - file["started"])
        assert min(file["seconds"].values()) >= 0 and file["seconds"]["compiling"] > 0 < file["seconds"]["training"]
