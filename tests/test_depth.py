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
    records = {("teacher", 0, 1): 0.25, ("MELT", 0, 1): 0.5, ("MELT", 1, 1): 0.75}
    depth.write(tmp_path / "depth.csv", records)
    assert depth.read(tmp_path / "depth.csv") == records and depth.read(tmp_path / "none.csv") == {}


def test_recorded_scores_are_not_measured_again(tmp_path, monkeypatch):
    """Every other number of loops is, and recorded at once."""
    asked = []

    class Scores:
        answer_exact = depth.np.array([True, False])

    monkeypatch.setattr(depth, "open_for_inference", lambda checkpoint, changes: str(checkpoint))
    monkeypatch.setattr(depth, "reconfigure", lambda model, loops: (model, loops))
    monkeypatch.setattr(depth, "exact_answers", lambda model, *_: asked.append(model) or Scores)
    run, path = make_run(tmp_path / "run"), tmp_path / "depth.csv"
    depth.write(path, {("teacher", 0, loops): 1.0 for loops in depth.LOOPS} | {("MELT", 0, 3): 0.0})
    depth.evaluate([run], path)
    assert asked == [(str(run / depth.MODEL), loops) for loops in depth.LOOPS if loops != 3]
    melt = depth.scores_by_loops(depth.read(path))["MELT"]
    assert melt == {loops: [0.0 if loops == 3 else 0.5] for loops in depth.LOOPS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": CONFIG["data"] | {"source": "tokens"}}, "expected data.source arithmetic, found tokens"),
        ({"chunk_size": 8}, "expected the chunk_size of .*, found another one; match fewer runs"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, changes, message):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes)]
    with pytest.raises(InputError, match=message):
        depth.read_runs(runs)


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected the workdir of a run whose alignment has ended"):
        depth.read_runs([tmp_path])
