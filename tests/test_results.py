"""The results of a run: measured once, stored in a file, printed as a table."""

import dataclasses
import io
import json

import pytest
from rich.console import Console
from rich.table import Table

from configs import nano
from melt_jax.config import freeze
from melt_jax.inference import results, scoring
from melt_jax.inference.results import Progress, Results, table
from melt_jax.inference.scoring import Comparison, LoopScores, Scores
from tests.helpers.tiny import TINY, looplm, make_model


def run_config(**evaluation):
    config = nano.get_config()
    config.data.length, config.data.batch, config.data.high, config.chunk_size = 32, 2, 2, 8
    config.evaluation.update({"problems": 2, "sequences": 2, "decoding_tokens": 16} | evaluation)
    return freeze(config)


@pytest.fixture
def measured(monkeypatch):
    """Replaces `scoring.score`; returns the list of the teachers it is called with."""
    calls = []

    def score(model, teacher, config, before_piece):
        before_piece("a piece")
        calls.append(teacher)
        return Scores(0.5, 0.25, 2, None, 64, 0, 4)

    monkeypatch.setattr(scoring, "score", score)
    return calls


def test_model_is_measured_once(measured, tmp_path):
    """A resumed run reads its results from the file; a changed evaluation is measured again, except for `sample`."""
    teacher, student = make_model(seed=1), make_model
    path = tmp_path / "results.json"
    Results(path).measure("student", student, teacher, run_config())
    again = Results(path)
    again.measure("student", student, teacher, run_config(sample=False))
    assert len(measured) == 1 and measured[0] is teacher
    again.measure("student", student, teacher, run_config(sequences=1))
    assert len(measured) == 2 and measured[1] is teacher
    assert "student" in again.table()
    Results(tmp_path / "none").measure("student", student, teacher, run_config(problems=0, sequences=0))
    assert len(measured) == 2


def test_teacher_is_not_compared_with_itself(measured, tmp_path):
    teacher = make_model()
    Results(tmp_path / "results.json").measure("teacher", lambda: teacher, teacher, run_config())
    assert measured == [None]


@pytest.mark.slow
def test_run_is_scored_on_both_tasks(tmp_path):
    """Exact answers, and the KL of sequences to the teacher; the result is plain JSON with a line in the table."""
    model = make_model(dataclasses.replace(TINY, vocab=64, layers=1, loops=2))
    rows = Results(tmp_path / "results.json")
    rows.measure("student", lambda: model, looplm(model), run_config())
    row = json.loads((tmp_path / "results.json").read_text())["student"]
    assert row["problems"] == 2 and 0 <= row["answers"] <= 1 and row["loops"] == 2
    assert row["cache_bytes_per_token"] == 2 * TINY.kv_heads * TINY.head_width * 4
    assert row["cache_bytes_per_sequence"] == 0
    assert row["comparison"]["decoding"]["chunk"] == 1
    assert 0 < row["comparison"]["decoding"]["tokens"] <= row["comparison"]["chunked"]["tokens"]
    assert f"{row['comparison']['decoding']['final_kl']:.4f}" in rows.table()
    assert "<think>" in scoring.sample(model, run_config())


def loop_scores(chunk, final_kl, tokens=100):
    return LoopScores(chunk, tokens, [2.0, 1.5], [0.5, final_kl], final_kl)


def test_table_shows_what_was_compared():
    """Unmeasured values are dashes, −0 prints as 0, and first tokens have columns only if there are fewer."""
    asdict = dataclasses.asdict
    same = Comparison(loop_scores(8, 0.25), loop_scores(8, 0.25), loop_scores(1, -1e-9))
    rows = {
        "teacher": asdict(Scores(None, None, 0, None, 128, 0, 4)),
        "melt": asdict(Scores(0.5, 0.5, 8, same, 32, 96, 4)),
    }
    heading, teacher, melt = table(rows).splitlines()
    assert teacher.split() == ["teacher", "4", "–", "–", "–", "128", "0"]
    assert melt.split() == ["melt", "4", "50.0%", "of", "8", "0.2500", "0.0000", "32", "96"]
    assert "first tokens" not in heading
    fewer = Comparison(loop_scores(8, 0.25), loop_scores(8, 0.125, 10), loop_scores(1, 0.375, 10))
    rows["melt"] = asdict(Scores(0.5, 0.5, 8, fewer, 32, 96, 4))
    heading, _, melt = table(rows).splitlines()
    assert "first tokens, chunked" in heading and "first tokens, decoding" in heading
    assert melt.split()[5:8] == ["0.2500", "0.1250", "0.3750"]


def test_comparison_states_the_difference_to_decoding():
    """The two are compared on the same tokens."""
    whole = Comparison(loop_scores(8, 0.25), loop_scores(8, 0.25), loop_scores(1, 0.375))
    line = "KL to the teacher 0.2500 nats per token in chunks of 8"
    assert str(whole) == f"{line}, 0.3750 in decoding, difference +0.1250"
    first = dataclasses.replace(whole, chunked_start=loop_scores(8, 0.5, 10))
    assert str(first) == f"{line}; on the first tokens 0.5000, 0.3750 in decoding, difference -0.1250"
    assert str(Comparison(loop_scores(8, 0.25), None, None)) == line


def test_progress_prints_at_intervals_and_asks_for_preemption(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(results.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(results, "exit_if_preempted", lambda: asked.append(now[0]))
    console = Console(record=True, width=80, file=io.StringIO())
    progress = Progress("evaluating", console)
    for now[0] in (0.0, 1.0, 9.0, 11.0):
        progress(f"piece at {now[0]}")
    assert asked == [0.0, 1.0, 9.0, 11.0]
    assert console.export_text().splitlines() == ["evaluating: piece at 0.0", "evaluating: piece at 11.0"]


def test_wide_tables_are_not_cut():
    wide = Table()
    for i in range(60):
        wide.add_column(f"column {i}")
    wide.add_row(*[f"{10**i:,}" for i in range(60)])
    assert "…" not in results.render(wide) and f"{10**59:,}" in results.render(wide)
