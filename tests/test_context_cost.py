"""launch/context_cost.py: one compilation gives the bytes of every context; stored results are not computed again."""

import json
import sys

import pytest

from launch import context_cost
from melt_jax.analysis.decoding import decoding_bytes
from melt_jax.config import ModelConfig


def table(capsys):
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_stored_results_are_not_computed_again(tmp_path, monkeypatch, capsys):
    calls = []

    def seconds(model, context):
        calls.append((model, context))
        return context * (2e-3 if model == "MELT" else 1e-3)

    monkeypatch.setattr(context_cost, "cpu_seconds", seconds)
    monkeypatch.setattr(context_cost, "CONTEXTS", (512, 1024))
    file = tmp_path / "records.jsonl"
    for command in ([], [f"--output={tmp_path / 'context.png'}"]):
        monkeypatch.setattr(sys, "argv", ["context_cost.py", "--cpu", f"--records={file}", *command])
        context_cost.main()
        assert table(capsys) == [["512", "512.00", "1024.00", "2.000"], ["1,024", "1024.00", "2048.00", "2.000"]]
    assert len(calls) == 4 and (tmp_path / "context.png").stat().st_size > 1000
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 4


@pytest.mark.slow
def test_cpu_decodes_a_full_cache():
    assert context_cost.cpu_seconds("MELT", 64) > 0


def test_contexts_cost_both_models_the_same():
    """In bytes that must move, only MELT's gates differ: a token reads every live entry in every loop."""
    looplm, melt = ModelConfig(), ModelConfig(gate="elementwise")
    grow = lambda config: decoding_bytes(config, 1, 32768).cache - decoding_bytes(config, 1, 512).cache
    assert grow(looplm) == grow(melt) > 0
    assert decoding_bytes(melt, 1, 512).total < 1.2 * decoding_bytes(looplm, 1, 512).total
