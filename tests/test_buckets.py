"""Models, data and runs in a bucket of an emulator on loopback: the results are those of a disk."""

import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from melt_jax.checkpoints.orbax import open_model, save_model, weights_digest
from melt_jax.checkpoints.published import save_published
from melt_jax.checkpoints.tensor_files import list_tensors, read_tensor
from melt_jax.config import InputError
from melt_jax.data.records import Layout, ShardWriter, open_records, verify_shards, write_manifest
from melt_jax.files import INCOMPLETE, as_path, atomic_folder
from melt_jax.training.attempts import Attempt, read_attempts
from melt_jax.training.checkpoints import Checkpoints
from melt_jax.training.log import RunLog
from tests.helpers.tiny import TINY, make_model

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_short_run_in_a_bucket(emulator):
    """Prepare, train with two processes, SIGKILL, resume, evaluate, export: bitwise as on a disk."""
    command = [sys.executable, "-m", "tests.long.buckets", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+) +equal", done.stdout, re.M) == ["prepare", "train", "logs", "evaluate", "export"]
    assert "killed 1 times" in done.stdout


@pytest.mark.slow
def test_models_of_both_forms_are_read(bucket):
    """An incomplete folder is refused in one line."""
    model = make_model(TINY)
    save_model(f"{bucket}/orbax", model)
    save_published(f"{bucket}/published", model, "float32")
    assert weights_digest(f"{bucket}/orbax") == weights_digest(f"{bucket}/published")
    (as_path(bucket) / "orbax" / INCOMPLETE).write_text("")
    with pytest.raises(InputError, match=r"gs://.*: 1 error\n.*expected a complete folder, found .incomplete"):
        open_model(f"{bucket}/orbax")
    with pytest.raises(InputError, match="found no such folder"):
        open_model(f"{bucket}/missing")


def test_tensors_are_read_by_range(bucket, tmp_path, monkeypatch):
    """A tensor that is larger than a range is read in several; a short file is refused."""
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(7, 5)).astype(jnp.bfloat16), "b": rng.normal(size=(11,)).astype(np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = as_path(bucket) / "x.safetensors"
    file.write_bytes((tmp_path / "x.safetensors").read_bytes())
    monkeypatch.setattr("melt_jax.checkpoints.tensor_files.RANGE_BYTES", 16)
    assert list_tensors(file) == list_tensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert read_tensor(file, name).dtype == tensor.dtype
        np.testing.assert_array_equal(read_tensor(file, name), tensor)
    file.write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(SafetensorError, match="bytes instead of"):
        list_tensors(file)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(SafetensorError, match="no safetensors header"):
        list_tensors(file)


def test_shards_are_fetched_once_and_checked(bucket, tmp_path, monkeypatch):
    """A shard that differs from its sha256 is refused; one of the cache is used by every folder that has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layout = Layout.of(4, 100)
    records = [np.arange(i, i + 4, dtype="<u2").tobytes() + b"\1\0" * 4 + b"\xe0" for i in range(5)]
    with atomic_folder(f"{bucket}/data") as folder:
        writer = ShardWriter(folder, 2)
        for record in records:
            writer.write(record)
        writer.close()
        kept = {"counts": {}, "tokenizer": {"sha256": "", "vocab": 9}, "inputs": []}
        parts = {"length": 4, "token_dtype": layout.token_dtype, "segment_dtype": layout.segment_dtype}
        write_manifest(folder, parts | kept | {"shards": writer.shards})
    sequences = open_records(f"{bucket}/data")
    assert len(sequences) == 5 and not list(tmp_path.rglob("*.arrayrecord"))
    assert [sequences[i].tokens[0] for i in (4, 0, 1)] == [4, 0, 1]
    assert len(list(tmp_path.rglob("*.arrayrecord"))) == 2
    shard = as_path(bucket) / "data" / "00001.arrayrecord"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    assert "00001.arrayrecord: expected sha256" in verify_shards(f"{bucket}/data")[0]
    with pytest.raises(InputError, match=r"00001.arrayrecord: expected sha256"):
        sequences[2]
    (as_path(bucket) / "data" / INCOMPLETE).write_text("")
    with pytest.raises(InputError, match="expected a complete folder"):
        open_records(f"{bucket}/data")


def test_logs_are_written_anew(bucket):
    """Lines of steps that run again are dropped; TensorBoard's file and the attempts are whole objects too."""
    folder = as_path(bucket) / "run" / "transition"
    interval = [{"loss": (np.float32(1.5), np.float32(1))}]
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with RunLog(folder, "transition", start, 4) as log, Attempt(folder.parent, log.console):
            for step in steps:
                log.write(step, interval)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [re.search(r'"step": (\d)', line)[1] for line in lines] == ["1", "2", "3", "4"]
    events = [file for file in folder.iterdir() if "tfevents" in file.name]
    assert len(events) >= 1 and all(b"transition/loss" in file.read_bytes() for file in events)
    assert len(read_attempts(folder.parent)) == 2


def test_checkpoints_restore_bitwise(bucket):
    folder = as_path(bucket) / "checkpoints"
    state = {"a": jnp.arange(5.0), "b": jnp.ones((2, 3), jnp.bfloat16)}
    checkpoints = Checkpoints(folder, 1, 1)
    for step in (1, 2):
        checkpoints.save(step, {"a": state["a"] * step, "b": state["b"]})
    checkpoints.close()
    checkpoints = Checkpoints(folder, 1, 1)
    assert checkpoints.latest() == 2
    restored = checkpoints.restore(2, state)
    assert np.array_equal(restored["a"], 2 * state["a"]) and np.array_equal(restored["b"], state["b"])
    checkpoints.close()


def test_commands_name_the_bucket_in_one_line(emulator):
    """Of a bucket that does not exist."""
    command = [sys.executable, "-m", "melt_jax.plot", "--workdir=gs://no-such-bucket/run", "--output=a.png"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "gs://no-such-bucket/run: expected the workdir of a run" in done.stderr
