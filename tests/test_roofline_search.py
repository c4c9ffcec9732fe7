"""launch/roofline_search.py: candidates, stored results, and the goal."""

import sys

import pytest

from launch import compile_table, roofline_search

RECORD = {
    "fits": True, "total": 20e9, "memory": 100e9,
    "roofline": {
        "product_seconds": 2.0, "full_rate_seconds": 2.0, "memory_seconds": 1.0, "collective_seconds": 0.5,
        "sum_seconds": 3.5, "bound": "products",
    },
}  # fmt: skip


def search(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["roofline_search.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        roofline_search.main()
    return ended.value.code


def test_candidates_fill_the_slice():
    """Each runs one micro-batch; the batch is as many sequences as run at once, in all groups of devices."""
    names, steps = zip(*roofline_search.candidates("v5p", "alignment"))
    assert len(set(names)) == len(names) == 4 * 4 * 3 * 3 * 2 * 2 * 2 * 2
    assert {step["data.batch"] * step["mesh.tensor"] for step in steps} == {8, 16, 24, 32}


def test_least_sum_is_compared_with_the_goal(monkeypatch, capsys, tmp_path):
    slow = RECORD | {"roofline": RECORD["roofline"] | {"sum_seconds": 2.9}}
    results = iter((RECORD, slow, None))
    monkeypatch.setattr(compile_table, "compile_step", lambda **_: next(results))
    only = "--only=tensor .*, 1 at once, chunk 500, pallas"
    arguments = ("--chip=v5p", f"--records={tmp_path / 'records'}", only)
    assert search(monkeypatch, *arguments, "--limit=1") == 1
    best = "tensor 1, 1 at once, chunk 500, pallas of 512, remat products, gather step, unrolled, default"
    assert f"least sum: {best}: 1.75, goal 1.5" in capsys.readouterr().out
    assert search(monkeypatch, *arguments, "--limit=2") == 0
    output = capsys.readouterr().out
    assert "| 20.0 of 100.0 | 2.00 | 1.00 | 0.50 | products | 3.50 | 1.75 |" in output
    assert "does not fit" in output and "tensor 2" in output and output.endswith(": 1.45, goal 1.5\n")
