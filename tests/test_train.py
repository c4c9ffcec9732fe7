"""Whole runs of the trainer: interruption, failure, resumption, and the keys that a resumed run may change."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time

import chex
import jax
import numpy as np
import pytest

from configs import nano
from melt_jax import train
from melt_jax.checkpoints.orbax import open_model, save_model
from melt_jax.checkpoints.published import save_published
from melt_jax.compile import make_program
from melt_jax.config import ConfigError, InputError, freeze
from melt_jax.data import stream
from melt_jax.inference import scoring
from melt_jax.sharding import make_mesh
from melt_jax.training.preemption import PREEMPTED
from melt_jax.training.skipped import NonFiniteError
from tests.helpers.tiny import TINY, make_model
from tests.test_records import LENGTH
from tests.test_records import write as write_records

LOOPLM = dataclasses.replace(TINY, vocab=64, gate="none")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "looplm"
    save_published(folder, make_model(LOOPLM), dtype="float32")
    return str(folder)


def tiny_run(teacher):
    config = nano.get_config()
    config.teacher = teacher
    config.data.length, config.data.batch, config.data.high = 32, 2, 2
    config.chunk_size = 8
    for phase in (config.transition, config.alignment):
        phase.steps, phase.warmup_steps = 5, 1
    config.log_every, config.checkpoint_every = 2, 2
    config.evaluation.problems, config.evaluation.sequences, config.evaluation.sample = 0, 2, False
    config.evaluation.decoding_tokens = 0
    return config


def alignment_run(teacher, steps):
    """The second phase alone, without evaluation."""
    config = tiny_run(teacher)
    config.phases, config.alignment.steps, config.evaluation.sequences = ("alignment",), steps, 0
    return config


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def fail_after(checkpoint):
    """A function that fails once the background save of that checkpoint has finished."""

    def fail():
        deadline = time.monotonic() + 600
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt

    return fail


def call_at_step(step, event, patch):
    """Calls `event` while the run waits for its next batch after that many steps."""
    make_batches = stream.batches

    def broken(data, seed, start, stop, indices=None):
        for index, batch in enumerate(make_batches(data, seed, start, stop, indices), start):
            if index == step:
                event()
            yield batch

    patch.setattr(stream, "batches", broken)


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.slow
def test_interrupted_runs_are_bitwise_identical(teacher, tmp_path, monkeypatch, capsys):
    """SIGTERM, a kill before the checkpoints are deleted, a failed evaluation, and a kill between two checkpoints."""
    uninterrupted, folder = train.run(tiny_run(teacher), tmp_path / "uninterrupted"), tmp_path / "interrupted"
    killed, broken = KeyboardInterrupt("killed"), RuntimeError("evaluation")
    score = scoring.score

    def score_teachers_only(model, *args):
        if model.config.gate == "elementwise":
            raise broken
        return score(model, *args)

    interruptions = (
        (lambda patch: call_at_step(2, sigterm, patch), SystemExit),
        (lambda patch: patch.setattr(shutil, "rmtree", raises(killed)), KeyboardInterrupt),
        (lambda patch: patch.setattr(scoring, "score", score_teachers_only), RuntimeError),
        (lambda patch: call_at_step(8, fail_after(folder / "alignment/checkpoints/2"), patch), KeyboardInterrupt),
    )
    left = []
    for interrupt, error in interruptions:
        with monkeypatch.context() as patch, pytest.raises(error) as caught:
            interrupt(patch)
            train.run(tiny_run(teacher), folder)
        left.append((folder / "transition/checkpoints").exists())
        assert error is not SystemExit or caught.value.code == PREEMPTED
    resumed = train.run(tiny_run(teacher), folder)
    output = capsys.readouterr().out
    # SIGTERM saves the running step, even between checkpoints; after a kill the last checkpoint counts.
    assert "transition: SIGTERM; step 3 is saved" in output and output.count("transition: resumes from step 3") == 1
    assert output.count("transition: complete") == 2 and "alignment: resumes from step 2" in output
    assert left == [True, True, False, False]
    chex.assert_trees_all_equal(resumed, uninterrupted)
    chex.assert_trees_all_equal(open_model(folder / "alignment/model"), resumed)
    chex.assert_trees_all_equal(train.run(tiny_run(teacher), folder), resumed)  # a complete run is read, not trained

    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("uninterrupted", "interrupted")]
    assert results[0] == results[1]
    assert list(results[0]) == ["teacher", "single shared KV entry, untrained", "after transition", "after alignment"]
    assert results[0]["teacher"]["cache_bytes_per_token"] == 3 * results[0]["after alignment"]["cache_bytes_per_token"]
    for phase, steps in (("transition", [1, 2, 3, 4, 5]), ("alignment", [1, 2, 4, 5])):
        lines = [json.loads(line) for line in (folder / phase / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == steps
        assert all(line["tokens_per_second"] > 0 and line["skipped"] == 0 for line in lines)


@pytest.mark.slow
def test_kill_after_a_save_loses_no_line(teacher, tmp_path, monkeypatch):
    """The checkpoint of step 2 is complete before step 3 runs; the line of step 2 has then been written."""
    config = alignment_run(teacher, 3)
    config.log_every = 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at_step(2, fail_after(tmp_path / "alignment/checkpoints/2"), patch)
        train.run(config, tmp_path)
    train.run(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "alignment/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


@pytest.mark.slow
def test_killed_save_of_the_model_is_resumed(teacher, tmp_path, monkeypatch, capsys):
    """The phase resumes from its last checkpoint; once the model is saved, damaged checkpoints are not read."""
    config = alignment_run(teacher, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_model", raises(KeyboardInterrupt()))
        train.run(config, tmp_path)
    weights = train.run(config, tmp_path)
    assert "alignment: resumes from step 2" in capsys.readouterr().out
    for file in list((tmp_path / "alignment/checkpoints/2").rglob("*"))[::2]:
        if file.is_file():
            file.unlink()
    chex.assert_trees_all_equal(train.run(config, tmp_path), weights)


@pytest.mark.slow
def test_damaged_checkpoint_changes_no_bits(teacher, tmp_path, monkeypatch, capsys):
    """The run names the checkpoint, continues from the one before it, and ends with the bits of an undisturbed run."""
    config = alignment_run(teacher, 5)
    undisturbed, folder = train.run(config, tmp_path / "undisturbed"), tmp_path / "disturbed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at_step(4, fail_after(folder / "alignment/checkpoints/4"), patch)
        train.run(config, folder)
    files = [path for path in (folder / "alignment/checkpoints/4").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    capsys.readouterr()
    chex.assert_trees_all_equal(train.run(config, folder), undisturbed)
    output = capsys.readouterr().out
    assert f"{largest}: expected CRC-32" in output and "alignment: resumes from step 2" in output
    lines = [json.loads(line) for line in (folder / "alignment/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5]


@pytest.mark.slow
def test_phase_without_finite_steps_publishes_nothing(teacher, tmp_path, monkeypatch, capsys):
    """The weight is named at each step, and skipped steps in a row stop the run; a restart ends in the same way."""

    def spoiled(looplm, config, key, make=train.make_student):
        named = lambda path: jax.tree_util.keystr(path).startswith(".layers.input_layernorm.")
        spoil = lambda path, x: x.at[1, 0].set(float("nan")) if named(path) else x
        return jax.tree_util.tree_map_with_path(spoil, make(looplm, config, key))

    monkeypatch.setattr(train, "make_student", spoiled)
    config = alignment_run(teacher, 2)
    for limit, message in ((3, "found none in 2 steps"), (3, "found none in 2 steps"), (2, "in 2 steps in a row")):
        config.run.skipped_limit = limit
        with pytest.raises(NonFiniteError, match=message):
            train.run(config, tmp_path)
        assert not (tmp_path / "alignment/model").exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped: " in line]
    assert len(lines) == 2 and all("so are the weights layers.input_layernorm of layer 1, " in line for line in lines)


def test_only_resumable_keys_may_change(teacher, tmp_path):
    """Monitoring, evaluation, devices and the teacher's folder may change; objective, seed and teacher may not."""
    config, folder = alignment_run(teacher, 1), str(tmp_path / "run")
    train.run(config, folder)
    moved = str(tmp_path / "moved")
    shutil.copytree(teacher, moved)
    config.teacher, config.mesh.fsdp, config.run.stall_seconds = moved, jax.device_count(), 3600.0
    config.log_every, config.checkpoint_every, config.checkpoints_kept = 3, 4, 5
    config.remat, config.attention_block, config.evaluation.seed = "layer", 7, 9
    train.run(config, folder)
    config.seed, config.alignment.beta = 7, 0.5
    with pytest.raises(ConfigError, match=r":\n  - alignment.beta: .*\n  - seed: expected 0, found 7$"):
        train.run(config, folder)
    config = alignment_run(moved, 1)
    shutil.rmtree(moved)
    save_published(moved, make_model(LOOPLM, 5), dtype="float32")
    with pytest.raises(ConfigError, match=r":\n  - teacher weights: expected sha256 \w+, found sha256 \w+$"):
        train.run(config, folder)


def test_what_is_compiled_is_what_runs(teacher, tmp_path, monkeypatch):
    """The steps have the text of `melt_jax.compile`'s programs; each phase compiles one; the teacher is read once."""
    config_dict = tiny_run(teacher)
    config_dict.evaluation.sequences, config_dict.evaluation.baselines = 0, False
    config_dict.remat = "products"
    for phase in (config_dict.transition, config_dict.alignment):
        phase.steps = 2
    texts, steps, reads = [], [], []

    def recorded(*args, make=train.make_train_step):
        step = make(*args)
        steps.append(step)

        def run(*inputs):
            if len(texts) < len(steps):
                texts.append(step.lower(*inputs).as_text())
            return step(*inputs)

        return run

    def read(folder, *args, open_model=train.open_model, **kwargs):
        reads.append(folder)
        return open_model(folder, *args, **kwargs)

    monkeypatch.setattr(train, "make_train_step", recorded)
    monkeypatch.setattr(train, "open_model", read)
    train.run(config_dict, tmp_path)
    assert reads == [teacher] and [step._cache_size() for step in steps] == [1, 1]
    config = freeze(config_dict)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        for phase, text in zip(config.phases, texts, strict=True):
            compiled = make_program(config, LOOPLM, mesh, phase).lower().as_text()
            pairs = itertools.zip_longest(compiled.splitlines(), text.splitlines())
            assert [pair for pair in pairs if pair[0] != pair[1]][:3] == []


def test_errors_are_reported_together(teacher, tmp_path):
    save_model(tmp_path / "melt", make_model(dataclasses.replace(LOOPLM, gate="elementwise")))
    config = alignment_run(str(tmp_path / "melt"), 1)
    config.data.length, config.tokenizer, config.mesh.tensor = 20_000_000, "nowhere", 3
    errors = (r"a MELT \(gate elementwise\)", "max_positions", "nowhere", "mesh: expected")
    with pytest.raises(ConfigError, match="(?s)" + ".*".join(errors)):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_run_is_resumed_with_its_prepared_data(teacher, tmp_path, capsys):
    def prepare(seed):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        write_records(tmp_path / "data", count=6, seed=seed)

    prepare(0)
    config = alignment_run(teacher, 1)
    config.data.source, config.data.path, config.data.length = "records", str(tmp_path / "data"), LENGTH
    train.run(config, tmp_path / "run")
    assert "data: 6 sequences, 0.33 epochs\n" in capsys.readouterr().out
    prepare(0)  # the same bytes
    (tmp_path / "data").rename(tmp_path / "moved")
    config.data.path = str(tmp_path / "moved")
    train.run(config, tmp_path / "run")
    prepare(1)
    config.data.path = str(tmp_path / "data")
    with pytest.raises(ConfigError, match=r":\n  - manifest of data.path: expected sha256 \w+, found sha256 \w+$"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_run_is_resumed_with_its_token_file(teacher, tmp_path):
    tokens = np.arange(4 * 32).reshape(4, 32) % 64
    np.save(tmp_path / "tokens.npy", tokens)
    config = alignment_run(teacher, 1)
    config.data.source, config.data.path = "tokens", str(tmp_path / "tokens.npy")
    train.run(config, tmp_path / "run")
    np.save(tmp_path / "tokens.npy", tokens[::-1])
    with pytest.raises(ConfigError, match=r":\n  - contents of data.path: expected sha256 \w+, found sha256 \w+$"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_missing_model_of_an_earlier_phase_trains_nothing_again(teacher, tmp_path):
    """A complete run needs its last model only; an unfinished later phase cannot start from another model."""
    config = tiny_run(teacher)
    config.evaluation.sequences, config.evaluation.baselines = 0, False
    for phase in (config.transition, config.alignment):
        phase.steps = 2
    weights = train.run(config, tmp_path)
    shutil.rmtree(tmp_path / "transition/model")
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("transition", "alignment")]
    chex.assert_trees_all_equal(train.run(config, tmp_path), weights)
    assert [(tmp_path / name / "metrics.jsonl").read_text() for name in ("transition", "alignment")] == logs
    shutil.rmtree(tmp_path / "alignment/model")
    with pytest.raises(InputError, match="transition/model: expected the model from which alignment started, found no"):
        train.run(config, tmp_path)
