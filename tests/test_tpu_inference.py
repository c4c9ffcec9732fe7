"""The model for tpu-inference computes what melt_jax does, with paged caches, chunks, decoding, and both in a step.

tpu-inference needs a TPU; `tests/helpers/tpu_serving.py` stands in for it.
"""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from melt_jax import run_sequence
from melt_jax.checkpoints.published import load_model, save_published
from melt_jax.inference.sampling import select_logits
from melt_jax.inference.tpu_inference import LoopedForCausalLM, serving_errors
from melt_jax.model.model import reconfigure
from tests.helpers.devices import several_devices
from tests.helpers.hf import generated_by_jax
from tests.helpers.hub_examples import ROOT
from tests.helpers.tiny import TINY, looplm, make_model, random_tokens
from tests.helpers.tpu_serving import Runner, make_caches, modules, serve, vllm_config

GOLDEN = ROOT / "tests/golden/melt_tiny"
PAGE = 4


@pytest.fixture(autouse=True)
def tpu_inference(monkeypatch):
    """Puts the stand-in's modules where the model imports tpu-inference."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def run_requests(folder, texts, new, chunk, dtype, **changes):
    """`serve` for the model of a folder, on a mesh of one device."""
    runner = Runner(LoopedForCausalLM, vllm_config(folder, dtype, **changes))
    return serve(runner, make_caches(runner, texts, new, PAGE), texts, new, chunk, PAGE)


def prompts(*lengths):
    """Random prompts of the tiny vocabulary."""
    return [random_tokens(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]


def test_mixed_steps_equal_melt_jax(tmp_path, float64):
    """Prompts of mixed lengths that arrive one per step, on scattered pages; a prefill with other chunks differs."""
    save_published(tmp_path / "melt", make_model(), "float32")
    model, texts = load_model(tmp_path / "melt", "float64"), prompts(11, 2, 7, 1, 4)
    tokens, logits, steps = run_requests(tmp_path / "melt", texts, 5, 4, "float64", loops=TINY.loops)
    expected_tokens, expected = generated_by_jax(model, texts, 5, 4)
    assert tokens == expected_tokens.tolist()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    assert any(ones and more for ones, more in steps)
    other_chunk = run_sequence(model, [texts[0]], 3).hidden[-1, :, -1]
    assert np.abs(model.logits(other_chunk)[0] - logits[0][0]).max() > 1e-3


def test_golden_tokens_and_logits(float64):
    """The reference's greedy decoding after a prefill in chunks of 4."""
    golden, chunk = np.load(GOLDEN / "golden.npz"), json.loads((GOLDEN / "golden.json").read_text())["prefill"]
    new = golden["gen_ids"].shape[1]
    tokens, logits, _ = run_requests(GOLDEN, golden["prompt_ids"].tolist(), new, chunk, "float64")
    assert tokens == golden["gen_ids"].tolist()
    np.testing.assert_allclose(logits, golden["gen_logits"], rtol=0, atol=1e-5 * np.abs(golden["gen_logits"]).max())


def test_looplm_has_a_cache_per_loop(tmp_path, float64):
    """A LoopLM in chunks equals the whole sequence."""
    save_published(tmp_path / "looplm", looplm(make_model()), "float32")
    model, texts = load_model(tmp_path / "looplm", "float64"), prompts(7, 3)
    tokens, logits, _ = run_requests(tmp_path / "looplm", texts, 3, 4, "float64", loops=TINY.loops)
    for text, new, found in zip(texts, tokens, logits):
        hidden = run_sequence(model, [text + new[:-1]], 99).hidden[-1, 0, len(text) - 1 :]
        np.testing.assert_allclose(found, model.logits(hidden), rtol=0, atol=1e-12)


def test_exit_gate_and_loops_of_the_configuration(tmp_path, float64):
    """`--hf-overrides` changes both; the logits are those of the loop that the exit gate selects."""
    save_published(tmp_path / "melt", make_model(), "float32")
    model = reconfigure(load_model(tmp_path / "melt", "float64"), loops=4, exit_threshold=0.5)
    [text] = prompts(9)
    _, [logits], _ = run_requests(tmp_path / "melt", [text], 1, 4, "float64", loops=4, threshold=0.5)
    hidden = run_sequence(model, [text], 4).hidden[:, :, -1:]
    expected, chosen = select_logits(model, hidden)
    assert 0 <= int(chosen[0, 0]) < 3
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"window": 3}, "window, sweeps: expected 0 and 1, .* found 3 and 1"),
        ({"sweeps": 2}, "window, sweeps: expected 0 and 1, .* found 0 and 2"),
        ({"scheduler_cls": "DPScheduler"}, "scheduler: expected .*make_scheduler, found DPScheduler"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size: expected 1"),
        ({"cache_dtype": "fp8"}, "--kv-cache-dtype: expected auto, found fp8"),
    ],
)
def test_refuses_what_cannot_be_served(values, message):
    config = dataclasses.replace(TINY, **{name: values.pop(name) for name in ("window", "sweeps") if name in values})
    errors = serving_errors(vllm_config("folder", **values), config)
    assert len(errors) == 1 and re.fullmatch(f"{message}.*", errors[0])


@pytest.mark.slow
def test_two_devices_compute_the_same():
    """Heads, feed-forward, vocabulary and latents split over two devices, in another process."""
    command = [sys.executable, "-m", "tests.helpers.tpu_serving"]
    out = subprocess.run(command, cwd=ROOT, env=several_devices(2), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
