"""Whole runs of the trainer: both phases, interrupted and gone on with, and what they refuse."""

import dataclasses
import json
import os
import shutil
import signal
import time

import chex
import jax
import pytest

from configs import nano
from melt_jax import train
from melt_jax.checkpoints.orbax import open_model
from melt_jax.checkpoints.published import save_published
from melt_jax.config import ConfigError
from melt_jax.data import stream
from melt_jax.training.preemption import PREEMPTED
from tests.helpers.tiny import TINY, make_model
from tests.test_records import LENGTH
from tests.test_records import write as write_records


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "looplm"
    config = dataclasses.replace(TINY, vocab=64, gate="none")
    save_published(folder, make_model(config), dtype="float32")
    return str(folder)


def tiny_run(teacher):
    config = nano.get_config()
    config.teacher = teacher
    config.data.length, config.data.batch, config.data.high = 32, 2, 2
    config.chunk_size = 8
    for phase in (config.transition, config.alignment):
        phase.steps, phase.warmup_steps = 5, 1
    config.log_every, config.checkpoint_every = 2, 2
    config.evaluation.problems, config.evaluation.sequences, config.evaluation.sample = 4, 2, False
    return config


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def fail_after(checkpoint):
    """Fails once that save, which is under way in the background, has ended."""

    def fail():
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt

    return fail


def happens_at(step, event, monkeypatch):
    """While the run waits for the batch that follows so many steps."""
    whole = stream.batches

    def broken(data, seed, start, stop, rows=None):
        for index, batch in enumerate(whole(data, seed, start, stop, rows), start):
            if index == step:
                event()
            yield batch

    monkeypatch.setattr(stream, "batches", broken)


def test_interrupted_in_each_phase_a_run_ends_with_the_same_bits(teacher, tmp_path, monkeypatch, capsys):
    undisturbed = train.run(tiny_run(teacher), tmp_path / "undisturbed")
    fail = fail_after(tmp_path / "disturbed/alignment/checkpoints/2")
    for step, event, error in ((2, sigterm, SystemExit), (8, fail, KeyboardInterrupt)):
        with monkeypatch.context() as patch, pytest.raises(error) as left:
            happens_at(step, event, patch)
            train.run(tiny_run(teacher), tmp_path / "disturbed")
        assert event is fail or left.value.code == PREEMPTED
    resumed = train.run(tiny_run(teacher), tmp_path / "disturbed")
    output = capsys.readouterr().out
    # SIGTERM saves the step under way, which no interval would; a failure goes back to the last interval.
    assert "transition: SIGTERM; step 3 is saved" in output and "transition: goes on from step 3" in output
    assert "alignment: goes on from step 2" in output
    chex.assert_trees_all_equal(resumed, undisturbed)
    chex.assert_trees_all_equal(open_model(tmp_path / "disturbed/alignment/model"), resumed)

    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("undisturbed", "disturbed")]
    assert results[0] == results[1]
    assert list(results[0]) == ["teacher", "single shared KV entry, untrained", "after transition", "after alignment"]
    assert results[0]["teacher"]["cache_bytes_per_token"] == 3 * results[0]["after alignment"]["cache_bytes_per_token"]
    for phase, steps in (("transition", [2, 3, 4, 5]), ("alignment", [2, 4, 5])):
        lines = [
            json.loads(line) for line in (tmp_path / "disturbed" / phase / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["step"] for line in lines] == steps
        assert all(line["tokens_per_second"] > 0 and line["skipped"] == 0 for line in lines)


def test_one_phase_alone_and_what_is_refused(teacher, tmp_path, capsys):
    config = tiny_run(teacher)
    config.phases = ("alignment",)
    config.alignment.steps = 2
    config.evaluation.problems = config.evaluation.sequences = 0
    train.run(config, tmp_path / "run")
    assert "exact answers" not in capsys.readouterr().out  # nothing was measured: no table
    config.run.stall_seconds = 3600.0  # how a run is watched may change,
    config.mesh.fsdp = jax.device_count()  # and where it runs
    train.run(config, tmp_path / "run")
    config.seed = 7
    with pytest.raises(ConfigError, match=r"another config.*\nseed: 0 → 7"):
        train.run(config, tmp_path / "run")
    config.data.length = 20_000_000
    with pytest.raises(ConfigError, match="max_positions"):
        train.run(config, tmp_path / "long")
    config.teacher = str(tmp_path / "run/alignment/model")
    config.tokenizer, config.mesh.tensor = "nowhere", 3
    told = (r"a MELT \(gate elementwise\)", "max_positions", "expected tokenizer.json in nowhere", "mesh: expected")
    with pytest.raises(ConfigError, match="(?s)" + ".*".join(told)):
        train.run(config, tmp_path / "long")
    assert not (tmp_path / "long").exists()


def test_a_run_goes_on_with_the_prepared_data_that_it_began_with(teacher, tmp_path):
    def prepared(seed):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_records(tmp_path / "data", count=6, seed=seed)

    prepared(0)
    config = tiny_run(teacher)
    config.phases = ("alignment",)
    config.alignment.steps = 1
    config.evaluation.problems = config.evaluation.sequences = 0
    config.data.source, config.data.path, config.data.length = "records", str(tmp_path / "data"), LENGTH
    train.run(config, tmp_path / "run")
    prepared(0)  # the same bytes
    train.run(config, tmp_path / "run")
    prepared(1)
    with pytest.raises(ConfigError, match=r"other data.*\nmanifest of data.path: sha256 \w+ → sha256 \w+$"):
        train.run(config, tmp_path / "run")
