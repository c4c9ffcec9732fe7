"""launch/compile_table.py: rows, cells, stored records and failures."""

import json
import subprocess
import sys

import pytest

from launch import compile_table

RECORD = {
    "total": 12e9, "memory": 17e9, "fits": True, "temporaries": 1e9, "chips": 4, "steps": 900, "batch": 4,
    "devices": 4, "tensor": 2, "micro_batches": 1, "read_seconds": 0.5, "flops_ratio": 1.1,
    "gather_group": 1, "gathered_ratio": None, "unknown_gathers": 0, "copy_bytes": 1e9,
    "collectives": {"all-gather": [3, 5e9]},
    "compile_seconds": 60, "token_bytes": 2e9, "moved_token_bytes": 3e9,
    "roofline": {"product_seconds": 1.0, "memory_seconds": 1.0, "collective_seconds": 0.5, "memory_bytes": 30e9,
                 "bound_seconds": 1.0, "sum_seconds": 2.5},
}  # fmt: skip


def test_rows_have_a_cell_for_each_column():
    columns = tuple(dict.fromkeys(column for _, columns in compile_table.COLUMNS.values() for column in columns))
    columns = (*columns, *(column for column in compile_table.WORK if column not in columns))
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    title, rule = compile_table.head(("choice",), columns).splitlines()
    assert cells(title) == ["choice", *columns] and len(cells(rule)) == 1 + len(columns)
    found = dict(zip(cells(title), cells(compile_table.row(("a",), columns, RECORD)), strict=True))
    assert found["GB a device"] == "12.0 of 17.0" and found["chip-hours"] == "8 to 20"
    assert found["moved / must move"] == "1.500" and found["ms at peak"] == "100.0" and found["tokens / s"] == "40"
    assert found["at once"] == "2" and found["reading weights, s"] == "0.50"
    assert found["weights gathered, copies"] == "none" and found["collectives, GB"] == "5"
    assert cells(compile_table.row(("a",), columns, RECORD | {"fits": False}))[1] == "**12.0 of 17.0**"
    assert cells(compile_table.row(("a",), columns, None)) == ["a", "does not fit", *[""] * (len(columns) - 1)]


SPLIT = {"batch": 4, "tensor": 2, "micro_batches": 1}


@pytest.mark.parametrize(
    "status, stdout, stderr, found",
    [
        (1, 'noise\n{"total": 3, "fits": false}', "", {"total": 3, "fits": False} | SPLIT),
        (1, "", "melt_jax.compile: alignment on 4 × TPU v5 lite DOES NOT FIT: RESOURCE_EXHAUSTED", None),
        (1, "", "melt_jax.compile: topology: expected one such as v5e:4x4", "expected one such as"),
        (-11, "", "", "exited with status -11"),
    ],
)
def test_other_failures_are_not_lack_of_memory(monkeypatch, status, stdout, stderr, found):
    done = subprocess.CompletedProcess((), status, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    overrides = {"data.batch": 4, "mesh.tensor": 2, "micro_batches": 1}
    compiled = lambda: compile_table.compile_step("configs/ouro_1_4b.py", "v5e:2x2", "alignment", **overrides)
    if isinstance(found, str):
        with pytest.raises(compile_table.StepFailedError, match=found):
            compiled()
    else:
        assert compiled() == found


@pytest.mark.parametrize(
    ("changes", "cell"),
    [
        ({}, "none"),
        ({"gather_group": 4, "gathered_ratio": 1.0}, "1.00"),
        ({"gather_group": 4, "gathered_ratio": 1.0, "unknown_gathers": 1e8}, "≥ 1.00"),
        ({"gather_group": 4}, "unknown"),
    ],
)
def test_unattributed_gathers_are_shown(changes, cell):
    assert compile_table.cells(RECORD | changes)["weights gathered, copies"] == cell


def test_stored_records_are_not_compiled_again(tmp_path, monkeypatch):
    records = iter((RECORD, None))
    monkeypatch.setattr(compile_table, "compile_step", lambda **_: next(records))
    (_, first), (_, second) = compile_table.steps("topologies", "v5p:2x2x2")
    for _ in range(2):
        stored = compile_table.Records(tmp_path / "records.jsonl")
        assert [stored.compile(first), stored.compile(second)] == [json.loads(json.dumps(RECORD)), None]


def test_rows_are_chosen_by_their_names():
    assert len(compile_table.steps("topologies", "")) == len(compile_table.TOPOLOGIES)
    assert [names[:3] for names, _ in compile_table.steps("topologies", "1.4B v6e")] == [
        ("1.4B", "v6e:4x4", "alignment"),
        ("1.4B", "v6e:4x4", "transition"),
    ]
    assert [names for names, _ in compile_table.steps("levers", "^chunks")] == [("chunks of 512",)]
    assert [names for names, _ in compile_table.steps("windows", "^50 51 v5e")] == [
        ("50", "51", "v5e:4x4", "alignment", "4", "4", "1")
    ]


def test_topologies_make_two_tables(monkeypatch, capsys):
    """Both have the same rows, even if a later step fails."""
    records = iter((RECORD, None))
    monkeypatch.setattr(compile_table, "compile_step", lambda **_: next(records))
    monkeypatch.setattr(sys, "argv", ["compile_table.py", "--only=v5p:2x2x"])
    with pytest.raises(StopIteration):
        compile_table.main()
    first, second = (table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n"))
    assert [len(lines) for lines in (first, second)] == [4, 4]
    assert first[2] == "| 1.4B | v5p:2x2x2 | alignment | 8 | 1 | 1 | 12.0 of 17.0 | 1.0 | 8 to 20 | 60 |"
    assert second[2] == "| 1.4B | v5p:2x2x2 | alignment | 1.10 | none | 5 | 1.00 + 1.00 + 0.50 |"
    assert "transition" in first[3] and "does not fit" in first[3] and "transition" in second[3]
