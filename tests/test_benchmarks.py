"""The paper's benchmarks as tasks, with local rows in place of each data set: prompts, right answers, scores."""

import json
import pathlib
import sys

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("math_verify")

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

FOLDER = pathlib.Path(__file__).parent.parent / "launch/benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")
CHOICES = {
    "Correct Answer": "four",
    "Incorrect Answer 1": "five",
    "Incorrect Answer 2": "six",
    "Incorrect Answer 3": "7",
}
# Benchmark: a row with the columns of its data set, right answers, wrong answers.
ROWS = {
    "melt_aime24": ({"Problem": "P", "Answer": 204}, ["204", "\\text{204}"], ["205", ""]),
    "melt_aime25": ({"problem": "P", "answer": "70"}, ["70", "70.0"], ["7"]),
    "melt_amc23": ({"question": "P", "answer": 27.0}, ["27", "27.0"], ["28"]),
    "melt_math500": ({"problem": "P", "answer": "\\frac{\\pi}{2}"}, ["\\dfrac{\\pi}{2}", "\\pi/2"], ["\\pi"]),
    "melt_olympiadbench": ({"question": "P", "final_answer": ["$2$", "$3$"]}, ["2, 3", "3,2"], ["2", "2,4"]),
}


def load(monkeypatch, tmp_path, name, row):
    """The task, reading a local row instead of its data set."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    tasks = TaskManager(include_path=str(FOLDER), include_defaults=False)
    entry = tasks.task_index[name]
    config = load_yaml(entry.yaml_path)
    data_files = {config["test_split"]: str(file)}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data_files}}
    assert name in tasks.all_subtasks and "melt_paper" in entry.tags
    (task,) = tasks.load([config | local])["tasks"].values()
    return task


def score(task, doc, boxes):
    """The metric of a problem whose sampled answers hold these boxes."""
    answers = [f"First \\boxed{{0}}, but then \\boxed{{{box}}}." for box in boxes]
    (kept,) = [entry["filter"][0]["filter_fn"] for entry in task.get_config("filter_list")]
    (filtered,) = kept([answers], [doc])
    return task.process_results(doc, [filtered])["pass_at_1"]


@pytest.mark.parametrize("name", ROWS)
def test_mathematical_answers_are_compared(monkeypatch, tmp_path, name):
    """pass@1 is the fraction of all samples that are right; the last box of an answer counts."""
    row, right, wrong = ROWS[name]
    task = load(monkeypatch, tmp_path, name, row)
    (doc,) = task.test_docs()
    assert task.doc_to_text(doc) == "P\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert score(task, doc, right) == 1.0
    assert score(task, doc, wrong) == 0.0
    assert score(task, doc, [right[0], wrong[0], right[1], right[0]]) == 0.75


def test_letters_are_compared(monkeypatch, tmp_path):
    task = load(monkeypatch, tmp_path, "melt_gpqa", {"Question": "Q", **CHOICES})
    (doc,) = task.test_docs()
    prompt = task.doc_to_text(doc)
    right = next(line[0] for line in prompt.splitlines() if line.endswith(". four"))
    assert sorted(line[:2] for line in prompt.splitlines()[2:6]) == ["A.", "B.", "C.", "D."]
    assert score(task, doc, [right, f"\\text{{{right}}}", f"({right})"]) == 1.0
    assert score(task, doc, [letter for letter in "ABCD" if letter != right]) == 0.0


def test_sampling_is_that_of_the_model_cards(monkeypatch, tmp_path):
    """And each problem is answered several times, all of which are scored."""
    for name, (row, *_) in ROWS.items():
        task = load(monkeypatch, tmp_path, name, row)
        options = task.get_config("generation_kwargs")
        assert (options["do_sample"], options["temperature"], options["top_p"]) == (True, 1.0, 0.7)
        assert task.get_config("repeats") > 1


def test_unboxed_answers_are_wrong(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    sys.modules.pop("scoring", None)
    import scoring

    assert not scoring.is_correct("The answer is 204.", {"Answer": 204})
    assert not scoring.is_correct("\\boxed{204", {"Answer": 204})
    assert scoring.last_boxed("\\boxed{a{b}c} d") == "a{b}c"
