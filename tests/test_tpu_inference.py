"""The model for tpu-inference computes what melt_jax does, with paged caches, chunks, decoding, and both in a step.

tpu-inference needs a TPU; `tests/helpers/tpu_serving.py` stands in for it.
"""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from melt_jax.checkpoints.published import load_model, save_published
from melt_jax.config import InputError
from melt_jax.inference.tpu_inference import MeltForCausalLM, register_models
from melt_jax.model.model import reconfigure
from tests.helpers.devices import several_devices
from tests.helpers.hf import generated_by_jax
from tests.helpers.hub_examples import ROOT
from tests.helpers.tiny import TINY, looplm, make_model, random_tokens
from tests.helpers.tpu_serving import Runner, modules, new_cache, serve, vllm_config

GOLDEN = ROOT / "tests/golden/melt_tiny"
PAGE = 4


@pytest.fixture(autouse=True)
def tpu_inference(monkeypatch):
    """Puts the stand-in's modules where the model imports tpu-inference; the models that it registers."""
    registered = {}
    for name, module in modules(registered=registered).items():
        monkeypatch.setitem(sys.modules, name, module)
    return registered


def one_device_mesh():
    """As tpu-inference makes it: the axes are not explicit."""
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))


def run_requests(folder, prompts, new, chunk, dtype, **changes):
    """`serve` for the model of a folder."""
    runner = Runner(MeltForCausalLM, vllm_config(folder, dtype, **changes), one_device_mesh())
    config = runner.model.model.config
    pages = 1 + len(prompts) * -(-(max(map(len, prompts)) + new) // PAGE)
    caches = [new_cache(pages, PAGE, config.kv_heads, config.head_width, dtype) for _ in range(config.layers)]
    return serve(runner, caches, prompts, new, chunk, PAGE)


def test_mixed_steps_equal_melt_jax(tmp_path, float64):
    """Prompts of mixed lengths that arrive one per step, on scattered pages, with caches that were not empty."""
    save_published(tmp_path / "melt", make_model(), "float32")
    model = load_model(tmp_path / "melt", "float64")
    prompts = [random_tokens(1, length, seed)[0].tolist() for seed, length in enumerate((11, 2, 7, 1, 4))]
    tokens, logits, steps = run_requests(tmp_path / "melt", prompts, 5, 4, "float64", loops=TINY.loops)
    expected_tokens, expected = generated_by_jax(model, prompts, 5, 4)
    assert tokens == expected_tokens.tolist()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
    assert any(ones and more for ones, more in steps)
    _, whole = generated_by_jax(model, prompts, 5, 16)
    assert np.abs(whole - expected).max() > 1e-3


def test_golden_tokens_and_logits(float64):
    """The reference's greedy decoding after a prefill in chunks of 4."""
    golden, chunk = np.load(GOLDEN / "golden.npz"), json.loads((GOLDEN / "golden.json").read_text())["prefill"]
    new = golden["gen_ids"].shape[1]
    tokens, logits, _ = run_requests(GOLDEN, golden["prompt_ids"].tolist(), new, chunk, "float64")
    assert tokens == golden["gen_ids"].tolist()
    np.testing.assert_allclose(logits, golden["gen_logits"], rtol=0, atol=1e-5 * np.abs(golden["gen_logits"]).max())
