"""Models and data sets of the hub, against a loopback server that speaks its API: names, downloads, errors, uploads."""

import fnmatch
import json
import os
import pathlib
import subprocess
import sys

import pytest

from melt_jax.checkpoints import hub
from melt_jax.checkpoints.hub import Repository
from melt_jax.checkpoints.model_card import model_card
from melt_jax.checkpoints.orbax import weights_digest
from melt_jax.config import InputError
from melt_jax.convert import Changes, Upload, convert
from tests.helpers.edit_config import edit_config
from tests.helpers.hub_examples import (
    GATED,
    LOOPLM,
    NANO,
    NEEDLESS,
    PROBLEMS,
    ROOT,
    TOKENIZER,
    add_examples,
    run_commands,
)
from tests.helpers.hub_server import HubServer

CONVERT = ("melt_jax.convert", "--to=orbax")


@pytest.fixture(scope="module")
def server():
    """A server and the commits of its repositories."""
    with HubServer() as started:
        yield started, add_examples(started)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def snapshot(cache, name, commit, kind="models"):
    return cache / "hub" / f"{kind}--{name.replace('/', '--')}" / "snapshots" / commit


def file_names(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hf://org/name", Repository("org/name")),
        ("hf://org/name@refs/pr/1", Repository("org/name", "refs/pr/1")),
        ("hf://name@v1.0", Repository("name", "v1.0")),
        ("ByteDance/Ouro-1.4B-Thinking", Repository("ByteDance/Ouro-1.4B-Thinking")),
        ("tests/golden", None),
        ("tests/missing", None),
        ("./org/name", None),
        ("/org/name", None),
        ("org/name/part", None),
        ("name", None),
        ("", None),
    ],
)
def test_names_of_models(text, expected):
    """A bare `org/name` is a model of the hub only if there is no local folder `org`."""
    assert hub.repository(text) == expected


@pytest.mark.parametrize("text", ["hf://", "hf://a/b/c", "hf://datasets/org/name", "hf://org/name@", "hf://org/na me"])
def test_malformed_names_are_refused(text):
    with pytest.raises(InputError, match="expected a model of the hub as hf://org/name"):
        hub.repository(text)


def test_local_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / LOOPLM).mkdir(parents=True)
    assert hub.local_folder(LOOPLM) == pathlib.Path(LOOPLM)
    assert hub.pinned(LOOPLM) == LOOPLM


@pytest.mark.slow
def test_commands_download_only_their_files(server, cache, tmp_path):
    """`memory` needs config.json, `prepare` the tokenizer and the matching files, `convert` the model."""
    started, commits = server
    model = snapshot(cache, LOOPLM, commits[LOOPLM])
    variables = started.environment(cache)
    prepare = ["melt_jax.prepare", f"--tokenizer={LOOPLM}", "--length=64", "--long=drop"]
    prepare += [f"--input=hf://datasets/{PROBLEMS}/**/*.parquet", f"--output={tmp_path / 'data'}"]
    found = []
    for case in (["melt_jax.memory", f"--checkpoint={LOOPLM}"], prepare):
        [(status, _, stderr)] = run_commands([case], variables)
        assert (status, stderr) == (0, ""), stderr
        found.append(file_names(model))
    assert found == [["config.json"], sorted(("config.json", *TOKENIZER))]
    assert file_names(snapshot(cache, PROBLEMS, commits[PROBLEMS], "datasets")) == ["data/train-0.parquet"]
    assert json.loads((tmp_path / "data/manifest.json").read_text())["counts"]["documents"] == 40
    [(status, stdout, stderr)] = run_commands(
        [[*CONVERT, f"--input=hf://{LOOPLM}@main", f"--output={tmp_path / 'out'}"]], variables
    )
    assert (status, stderr) == (0, ""), stderr and f"hf://{LOOPLM}@main: published" in stdout
    assert file_names(model) == sorted(("config.json", "model.safetensors", *TOKENIZER))
    assert not any(started.downloads(name) for name in NEEDLESS if name != "original/model.safetensors")
    assert weights_digest(tmp_path / "out") == weights_digest(NANO)
    assert json.loads((tmp_path / "out/config.json").read_text())["_name_or_path"] == LOOPLM


@pytest.mark.slow
def test_one_process_downloads_and_others_wait(server, cache, tmp_path):
    started, commits = server
    script = f"from melt_jax.checkpoints import hub; print(hub.local_folder({LOOPLM!r}))"
    before = started.downloads("model.safetensors")
    environment = os.environ | started.environment(cache)
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in "123"]
    folders = {process.communicate()[0].strip() for process in running}
    assert folders == {str(snapshot(cache, LOOPLM, commits[LOOPLM]))}
    assert started.downloads("model.safetensors") - before == 1


@pytest.mark.slow
def test_offline_mode_reads_the_cache(server, cache, tmp_path):
    started, _ = server
    variables = started.environment(cache)
    memory = ["melt_jax.memory", f"--checkpoint={LOOPLM}"]
    convert_cached = [*CONVERT, f"--input={LOOPLM}", f"--output={tmp_path / 'out'}"]
    [(status, online, _)] = run_commands([memory], variables)
    assert status == 0
    sent = started.requests.total()
    cached, lacking = run_commands([memory, convert_cached], variables | {"HF_HUB_OFFLINE": "1"})
    assert started.requests.total() == sent
    assert cached == [0, online, ""]
    status, _, stderr = lacking
    assert status == 1 and len(stderr.splitlines()) == 1 and "HF_HUB_OFFLINE is set" in stderr


ERRORS = {
    LOOPLM + "-2": "found no model loop/LoopLM-nano-2 on",
    GATED: "found that loop/LoopLM-gated is gated; accept its terms at",
    f"hf://{LOOPLM}@v7": "found no revision 'v7' of loop/LoopLM-nano;",
    "hf://a..b/name": "found no valid name of a repository;",
}


def test_errors_take_one_line(server, cache):
    started, _ = server
    cases = [["melt_jax.generate", "--prompt=a", f"--checkpoint={name}"] for name in ERRORS]
    data = f"hf://datasets/{PROBLEMS}"
    cases += [
        ["melt_jax.prepare", f"--tokenizer={NANO}", "--output=unused", f"--input={pattern}"]
        for pattern in (f"{data}-2/x.parquet", f"{data}/x.parquet", "hf://datasets/x")
    ]
    outcomes = run_commands(cases, started.environment(cache))
    expected = [
        *ERRORS.values(),
        "found no dataset loop/problems-2 on",
        "files that match",
        "hf://datasets/org/name/path",
    ]
    for (status, stdout, stderr), message in zip(outcomes, expected, strict=True):
        assert (status, stdout) == (1, "") and len(stderr.splitlines()) == 1 and message in stderr, stderr


def test_no_network_takes_one_line(cache):
    with HubServer() as stopped:
        variables = stopped.environment(cache)
    [(status, stdout, stderr)] = run_commands([["melt_jax.memory", f"--checkpoint={LOOPLM}"]], variables)
    assert (status, stdout) == (1, "") and len(stderr.splitlines()) == 1
    assert f"found no answer from {variables['HF_ENDPOINT']}" in stderr


def test_gated_model_opens_with_a_token(server, cache):
    started, _ = server
    case = ["melt_jax.memory", f"--checkpoint={GATED}"]
    [(status, _, stderr)] = run_commands([case], started.environment(cache, token=True))
    assert (status, stderr) == (0, ""), stderr


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A workdir with the records of a run and its model."""
    workdir = tmp_path_factory.mktemp("run")
    run = {"phases": ["alignment"], "teacher": f"hf://{LOOPLM}@0123", "seed": 7, "data": {"source": "arithmetic"}}
    run["alignment"] = {"steps": 180, "learning_rate": 1e-3, "beta": 0.1}
    scores = {"chunked": {"final_kl": 0.00031, "tokens": 900}, "decoding": {"final_kl": 0.00042, "tokens": 1800}}
    (workdir / "config.json").write_text(json.dumps(run))
    row = {"comparison": scores, "answers": 0.995, "problems": 256}
    (workdir / "results.json").write_text(json.dumps({"after alignment": row}))
    (workdir / "alignment").mkdir()
    convert(NANO, workdir / "alignment/model", "orbax", Changes("elementwise"))
    edit_config(workdir / "alignment/model", window=8, chunk_size=9)
    return workdir


@pytest.mark.slow
def test_push_uploads_folder_and_card(server, cache, run_folder, tmp_path):
    """One commit holds the published folder and its card, and the model opens by its name."""
    started, _ = server
    name = "loop/MELT-nano"
    flags = [f"--input={run_folder / 'alignment/model'}", f"--output={tmp_path / 'MELT'}", "--to=published"]
    push = ["melt_jax.convert", *flags, f"--push={name}"]
    [(status, stdout, stderr)] = run_commands([push], started.environment(cache))
    assert status == 1 and "denies access (401)" in stderr and "add --keep_existing" in stderr
    [(status, stdout, stderr)] = run_commands([[*push, "--keep_existing"]], started.environment(cache, token=True))
    assert (status, stderr) == (0, ""), stderr
    repo = started.repos["models", name]
    commit = repo.revisions["main"]
    assert f"{started.url}/{name}/commit/{commit}" in stdout and repo.messages == ["initial commit", "Upload the model"]
    stored = repo.commits[commit]
    assert {path: stored[path] for path in stored if path != ".gitattributes"} == {
        path: (tmp_path / "MELT" / path).read_bytes() for path in file_names(tmp_path / "MELT")
    }
    opened = ["melt_jax.memory", f"--checkpoint={name}"]
    assert run_commands([opened], started.environment(cache))[0][0] == 0
    check_card(stored["README.md"].decode())


def check_card(text):
    """The card's front matter is what the hub reads, and its table states the run."""
    yaml = pytest.importorskip("yaml")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "base_model": LOOPLM,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["melt", "looped-transformer", "melt_jax", "custom_code"],
    }
    rows = dict(
        line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ") and line != "| | |"
    )
    assert rows["teacher"] == f"{LOOPLM}@0123"
    assert rows["window"].startswith("8 tokens") and rows["chunk"] == "9 tokens, sweeps 1"
    assert rows["recipe: alignment"] == "steps 180, learning_rate 0.001, beta 0.1"
    assert rows["KL to the teacher, decoding"] == "0.0004 nats per token, 1,800 tokens"
    assert rows["exact answers"] == "99.5% of 256 problems" and rows["licence"] == "apache-2.0"


def test_card_of_the_main_job_has_the_last_phases_records(run_folder):
    convert(run_folder / "alignment/model", run_folder / "melt", "published")
    check_card(model_card(run_folder / "melt", "org/name", str(run_folder / "melt")))


def test_workdir_stands_for_its_last_model(run_folder, tmp_path):
    convert(run_folder, tmp_path / "melt", "published")
    assert weights_digest(tmp_path / "melt") == weights_digest(run_folder / "alignment/model")


def test_uploaded_folder_can_be_overwritten(run_folder, tmp_path, monkeypatch):
    """Its card belongs to it."""
    monkeypatch.setattr("melt_jax.checkpoints.hub.upload", lambda *_: "commit")
    convert(run_folder, tmp_path / "melt", "published", upload=Upload("org/name"))
    assert (tmp_path / "melt/README.md").exists()
    convert(run_folder, tmp_path / "melt", "published", existing="overwrite")
    assert not (tmp_path / "melt/README.md").exists()
    convert(run_folder, tmp_path / "orbax", "orbax")
    (tmp_path / "orbax/README.md").write_text("notes")
    with pytest.raises(InputError, match=r"expected only files that melt_jax wrote, found also README\.md"):
        convert(run_folder, tmp_path / "orbax", "orbax", existing="overwrite")


def test_card_without_records(tmp_path):
    """It states what the folder holds, and that the rest is not recorded."""
    text = model_card(NANO, "org/name", str(NANO))
    assert "LoopLM" in text and not any(word in text for word in ("base_model", "None", "teacher", "recipe"))
    convert(NANO, tmp_path / "melt", "published", Changes("elementwise"))
    edit_config(tmp_path / "melt", _name_or_path=LOOPLM)
    for name, expected in ((None, LOOPLM), ("org/other", "org/other")):
        text = model_card(tmp_path / "melt", "org/name", str(tmp_path / "melt"), base_model=name)
        assert f"base_model: {expected}\n" in text and f"| teacher | {expected} |" in text
        assert "| recipe | not recorded |" in text and "None" not in text


def test_push_needs_published_form(tmp_path):
    with pytest.raises(InputError, match="expected --to=published"):
        convert(NANO, tmp_path / "out", "orbax", upload=Upload("org/name"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pattern, wanted, other",
    [("*.jsonl", "a.jsonl", "data/a.jsonl"), ("data/*.jsonl", "data/a.jsonl", "data/old/a.jsonl")],
)
def test_only_files_as_deep_as_the_pattern_are_downloaded(monkeypatch, tmp_path, pattern, wanted, other):
    """The hub's client matches by `fnmatch`, whose star also matches slashes."""
    asked = []

    def download(found, files, leave_out, text):
        asked.append((files, leave_out))
        return tmp_path

    monkeypatch.setattr(hub, "_download", download)
    hub.local_files(f"hf://datasets/org/name/{pattern}")
    [(files, leave_out)] = asked
    taken = lambda path: (
        any(fnmatch.fnmatch(path, p) for p in files) and not any(fnmatch.fnmatch(path, p) for p in leave_out)
    )
    assert taken(wanted) and not taken(other)
