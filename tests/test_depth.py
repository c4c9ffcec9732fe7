"""launch/depth.py: scores are recorded once, and runs that cannot be compared are refused."""

import json

import pytest

from launch import depth
from melt_jax.config import InputError

CONFIG = {
    "seed": 0, "teacher": "teacher", "student": {}, "chunk_size": 4,
    "data": {"source": "arithmetic", "low": 2, "high": 3, "hops": 1}, "evaluation": {"seed": 1, "problems": 4},
}  # fmt: skip


def make_run(folder, **changes):
    (folder / depth.MODEL).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_scores_are_read_as_written(tmp_path):
    records = {("a", "teacher", 0, 1): 0.25, ("a", "MELT", 0, 1): 0.5, ("a", "MELT", 1, 1): 0.75}
    depth.write(tmp_path / "depth.csv", records)
    assert depth.read(tmp_path / "depth.csv") == records and depth.read(tmp_path / "none.csv") == {}


def test_recorded_scores_are_not_measured_again(tmp_path, monkeypatch):
    """Every other number of loops is, and a file with scores of another config is refused."""
    asked = []

    class Scores:
        answer_exact = depth.np.array([True, False])

    monkeypatch.setattr(depth, "open_for_inference", lambda checkpoint, changes: str(checkpoint))
    monkeypatch.setattr(depth, "reconfigure", lambda model, loops: (model, loops))
    monkeypatch.setattr(depth, "exact_answers", lambda model, *_: asked.append(model) or Scores)
    runs, path = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)], tmp_path / "depth.csv"
    depth.evaluate(runs[:1], path)
    assert asked == [(model, loops) for model in ("teacher", str(runs[0] / depth.MODEL)) for loops in depth.LOOPS]
    del asked[:]
    depth.evaluate(runs, path)
    assert asked == [(str(runs[1] / depth.MODEL), loops) for loops in depth.LOOPS]
    scores = depth.scores_by_loops(depth.read(path))
    assert scores == {name: dict.fromkeys(depth.LOOPS, [0.5] * n) for name, n in (("teacher", 1), ("MELT", 2))}
    assert "| MELT | 50.0 ± 0.0 |" in depth.markdown(scores)
    with pytest.raises(InputError, match=r"depth\.csv: expected scores of runs with the config .*; move it away"):
        depth.evaluate([make_run(tmp_path / "c", chunk_size=8)], path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": CONFIG["data"] | {"source": "tokens"}}, "expected data.source arithmetic, found tokens"),
        ({"chunk_size": 8}, "b: expected the config of .*a but for the seed; match fewer runs"),
        ({}, "expected one run per seed, found several"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, changes, message):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes)]
    with pytest.raises(InputError, match=message):
        depth.read_runs(runs)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected the workdir of a run whose alignment has ended"):
        depth.read_runs([tmp_path])
