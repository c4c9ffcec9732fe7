"""The log in Weights & Biases, offline: one W&B run for all attempts of a workdir, with metrics and configuration."""

import importlib.util
import json
import struct

import pytest

from melt_jax import train
from melt_jax.config import InputError
from melt_jax.training import wandb_log
from tests.test_train import alignment_run, call_at_step, sigterm, teacher  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # of wandb itself


def records(folder):
    """The records in the one `.wandb` file of an offline run: protocol buffers in the format of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data, place, whole, found = file.read_bytes(), 7, b"", []  # after the file's own header
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # the end of a block
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            found.append(Record())
            found[-1].ParseFromString(whole)
            whole = b""
    return found


def history(folder):
    """[{name: number}] of an offline run's lines."""
    lines = [record.history for record in records(folder) if record.WhichOneof("record_type") == "history"]
    name = lambda item: item.key or "/".join(item.nested_key)
    return [{name(item): json.loads(item.value_json) for item in line.item} for line in lines]


@pytest.mark.slow
def test_attempts_share_one_offline_run(teacher, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = alignment_run(teacher, 4)
    config.run.wandb = "team/melt"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        call_at_step(2, sigterm, patch)
        train.run(config, tmp_path / "run")
    train.run(config, tmp_path / "run")
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    number = json.loads((tmp_path / "run/wandb.json").read_text())["id"]
    assert len(folders) == 2 and all(folder.name.endswith(f"-{number}") for folder in folders)
    logged = json.loads((tmp_path / "run/alignment/metrics.jsonl").read_text().splitlines()[-1])
    assert [line["alignment/step"] for line in history(folders[0])] == [1, 2, 3]
    last = history(folders[1])[-1]
    assert (last["alignment/step"], last["alignment/loss"]) == (4, logged["loss"])
    exits = [record.exit.exit_code for record in records(folders[0]) if record.WhichOneof("record_type") == "exit"]
    assert exits == [0]  # preempted, not failed
    runs = [record.run for record in records(folders[0]) if record.WhichOneof("record_type") == "run"]
    stated = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (runs[0].entity, runs[0].project, runs[0].display_name) == ("team", "melt", "run")
    assert stated["optimizer"]["b1"] == config.optimizer.b1 and "git_commit" in stated


def test_nothing_is_opened_without_a_project(tmp_path, teacher):  # noqa: F811
    from melt_jax.config import freeze

    with wandb_log.wandb_run(freeze(alignment_run(teacher, 1)), tmp_path):
        wandb_log.write("alignment", 1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_missing_package_is_one_line(teacher, tmp_path, monkeypatch):  # noqa: F811
    config = alignment_run(teacher, 1)
    config.run.wandb = "melt"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(InputError, match=r"run.wandb: expected the package wandb, .*-e .\.\[wandb\]"):
        train.run(config, tmp_path)
