"""launch/tables.py: rows are valid configurations, recorded runs are not repeated, intervals follow their formula."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from launch import tables
from melt_jax.config import InputError

SMALL = tables.Experiment("two rows", {"base": "", "β 0": "alignment.beta=0.0"}, "configs/nano.py", seeds=2)
SCORES = {"final_kl": 0.25}


def record(row, seed, overrides="", **values):
    columns = dict.fromkeys(tables.COLUMNS, "0.5") | values
    return columns | {"row": row, "seed": str(seed), "overrides": overrides}


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_row_is_a_valid_configuration(name):
    tables.check(tables.TABLES[name])
    labels = [tables.folder_name(row) for row in tables.TABLES[name].rows]
    assert len(set(labels)) == len(labels)  # each row has its own folder


def test_an_invalid_row_is_named():
    with pytest.raises(InputError, match=r"^typo: the configuration has errors:\n  - alignment.bta: unknown key"):
        tables.check(dataclasses.replace(SMALL, rows={"typo": "alignment.bta=1"}))


def test_rows_of_chunks_are_distinct_computations():
    """Sweeps beyond ⌈C/(W + 1)⌉ change nothing and have no row."""
    rows = tables.chunk_rows(160)
    assert "C 4, W 0, s 3" in rows and "C 4, W 4, s 2" not in rows and "C 1, W 0, s 2" not in rows
    assert rows["C all, W 16, s 2"] == "chunk_size=160 student.window=16 student.sweeps=2"


def test_recorded_runs_are_not_repeated(monkeypatch, tmp_path, capsys):
    """A run is known by its row, seed and overrides; a failed run is repeated, the others are recorded at once."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setitem(tables.TABLES, "small", SMALL)
    tables.write_csv(tmp_path / "small.csv", [record("base", 0), record("β 0", 0, "alignment.beta=1.0")])
    started = []

    def train(experiment, run, workdir):
        started.append(run)
        if run[1] == 1 and len(started) < 9:
            raise subprocess.CalledProcessError(75, "train")
        return record(*run)

    monkeypatch.setattr(tables, "train", train)
    wanted = [("β 0", 0, "alignment.beta=0.0"), ("base", 1, ""), ("β 0", 1, "alignment.beta=0.0")]
    assert tables.run_experiment("small", tmp_path, at_once=1) == 2
    assert started == wanted and capsys.readouterr().out.count("failed with status 75") == 2
    started[:] = [None] * 9
    assert tables.run_experiment("small", tmp_path, at_once=1) == 0
    assert started[9:] == wanted[1:]
    assert tables.missing_runs(SMALL, tables.read_csv(tmp_path / "small.csv")) == []


def test_a_run_is_recorded_with_its_scores(monkeypatch, tmp_path):
    """The last phase's answers and KL, and the transition's answers if there was one."""
    later = {"answers": 0.75, "comparison": {"chunked": SCORES, "chunked_start": SCORES, "decoding": {"final_kl": 0.5}}}
    results = {"after transition": later | {"answers": 0.5}, "after alignment": later}
    commands = []

    def run(command, **options):
        commands.append(command)
        folder = next(word.partition("=")[2] for word in command if word.startswith("--workdir="))
        (tmp_path / folder / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(subprocess, "run", run)
    found = tables.train(SMALL, ("β 0", 3, "alignment.beta=0.0"), tmp_path)
    assert [found[column] for column in tables.COLUMNS[1:-1]] == (
        ["3", "alignment.beta=0.0", "0.500000", "0.750000", "0.250000", "0.250000", "0.500000"]
    )
    assert {"--config.alignment.beta=0.0", "--config.seed=3"} < set(commands[0]) and commands[0][0] == sys.executable
    del results["after transition"]
    assert tables.train(SMALL, ("base", 0, ""), tmp_path)["answers_transition"] == ""


def test_intervals_follow_students_t():
    """Three values: half of the interval is 4.303 standard errors."""
    mean, half = tables.interval([1.0, 2.0, 4.5])
    assert mean == 2.5
    np.testing.assert_allclose(half, 4.302653 * np.std([1, 2, 4.5], ddof=1) / math.sqrt(3), rtol=1e-6)
    assert math.isnan(tables.interval([1.0])[1])


def test_tables_show_current_rows_only(tmp_path):
    """Records of rows or overrides that the table does not have are kept in the file but not shown."""
    records = [record("base", 0, answers="1.0"), record("base", 1, answers="0.9"), record("gone", 0), record("base", 7)]
    text = tables.markdown(SMALL, records)
    assert text.splitlines()[2:] == ["| base | 50.0 ± 0.0 | 95.0 ± 63.5 | 0.50000 ± 0.00000 | 0.50000 ± 0.00000 | "
                                     "0.00000 ± 0.00000 | 2 |"]  # fmt: skip
    tables.draw(SMALL, records).savefig(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 1000
