"""The plugin of vLLM: it sets the scheduling of a MELT, refuses what vLLM cannot do, and needs neither vLLM nor JAX.

`python -m tests.long.vllm` runs it in vLLM.
"""

import importlib
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from melt_jax.inference import vllm_plugin
from melt_jax.inference.vllm_plugin import configure
from tests.helpers import tpu_serving
from tests.helpers.hub_examples import ROOT


def vllm_config(
    window=0, sweeps=1, speculative=None, chunked=True, tokens=2048, requests=256, model_type="melt", scheduler=None
):
    """The parts of a `VllmConfig` that the plugin uses."""
    hf_config = SimpleNamespace(model_type=model_type, chunk_size=16, window=window, sweeps=sweeps)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, max_model_len=512),
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=chunked,
            max_num_batched_tokens=tokens,
            max_num_seqs=requests,
            long_prefill_token_threshold=0,
            long_prefill_token_threshold_adaptive=True,
            scheduler_cls=scheduler,
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        speculative_config=speculative,
    )


def test_prompts_run_in_trained_chunks():
    """No request can shorten another's chunk: a step has room for a chunk of every request."""
    for requests in (8, 256):
        config = vllm_config(requests=requests)
        configure(config)
        scheduler = config.scheduler_config
        assert scheduler.long_prefill_token_threshold == 16 and not scheduler.long_prefill_token_threshold_adaptive
        assert scheduler.max_num_seqs == min(requests, 128)
        assert scheduler.max_num_seqs * 16 <= scheduler.max_num_batched_tokens == 2048
        assert not config.cache_config.enable_prefix_caching


def test_request_that_is_alone_runs_in_chunks(monkeypatch):
    """vLLM lifts the limit on a prompt's tokens in a step from the only request; the scheduler keeps it."""

    class Stock:
        def __init__(self, vllm_config, requests):
            self.scheduler_config, self.requests = vllm_config.scheduler_config, requests
            self.max_num_scheduled_tokens = self.scheduler_config.max_num_batched_tokens

        def get_request_counts(self):
            return self.requests, 0

        def schedule(self):
            return self.max_num_scheduled_tokens

    class AsyncStock(Stock):
        pass

    for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    path = "vllm.v1.core.sched"
    monkeypatch.setitem(sys.modules, f"{path}.scheduler", SimpleNamespace(Scheduler=Stock))
    monkeypatch.setitem(sys.modules, f"{path}.async_scheduler", SimpleNamespace(AsyncScheduler=AsyncStock))
    module, name = vllm_plugin.SCHEDULER.rsplit(".", 1)
    monkeypatch.delitem(sys.modules, module, raising=False)
    make_scheduler = getattr(importlib.import_module(module), name)
    for is_async in (False, True):
        config = vllm_config()
        configure(config)
        config.scheduler_config.async_scheduling = is_async
        alone, two = make_scheduler(config, 1), make_scheduler(config, requests=2)
        assert isinstance(alone, AsyncStock) == is_async
        assert [alone.schedule(), two.schedule()] == [16, 2048] and alone.max_num_scheduled_tokens == 2048
    monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": 8}, "window, sweeps: expected 0 and 1"),
        ({"sweeps": 2}, "found 0 and 2"),
        ({"speculative": object()}, "speculative decoding: expected none"),
        ({"scheduler": "other.Scheduler"}, "--scheduler-cls: expected none"),
        ({"chunked": False}, "--enable-chunked-prefill: expected true"),
        ({"tokens": 15}, "--max-num-batched-tokens: expected at least 16"),
    ],
)
def test_refuses_what_vllm_cannot_do(changes, message):
    with pytest.raises(ValueError, match=message):
        configure(vllm_config(**changes))


def test_entry_point_needs_no_jax():
    """vLLM imports the entry point in each of its processes, in an environment that may have no JAX."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, name = entry["melt_jax"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    script = f"import {module}, sys; sys.exit(bool({{'jax', 'vllm', 'flax'}} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def stub_vllm(monkeypatch, models, on_tpu):
    """Puts `models` where vLLM has the hooks of its models."""
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_tpu=lambda: on_tpu))
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models", SimpleNamespace(config=models))


def test_other_models_keep_their_configuration(monkeypatch):
    """The hook runs for every model of the transformers backend, after the one that was there."""
    calls = []

    class Base:
        @classmethod
        def verify_and_update_config(cls, config):
            calls.append(config)

    models = SimpleNamespace(MODELS_CONFIG_MAP={vllm_plugin.ARCHITECTURE: Base}, VerifyAndUpdateConfig=Base)
    stub_vllm(monkeypatch, models, on_tpu=False)
    vllm_plugin.register()
    other, melt = vllm_config(model_type="ouro"), vllm_config()
    for config in (other, melt):
        models.MODELS_CONFIG_MAP[vllm_plugin.ARCHITECTURE].verify_and_update_config(config)
    assert calls == [other, melt]
    assert other.cache_config.enable_prefix_caching and not melt.cache_config.enable_prefix_caching


def test_tpus_have_models_of_their_own(monkeypatch):
    """Both are registered with tpu-inference; a MELT gets its chunks, a LoopLM a cache for each loop and layer."""
    registered = {}
    for name, module in tpu_serving.modules(registered=registered).items():
        monkeypatch.setitem(sys.modules, name, module)
    base = type("Base", (), {"verify_and_update_config": classmethod(lambda cls, config: None)})
    models = SimpleNamespace(MODELS_CONFIG_MAP={}, VerifyAndUpdateConfig=base)
    stub_vllm(monkeypatch, models, on_tpu=True)
    vllm_plugin.register()
    assert set(registered) == set(models.MODELS_CONFIG_MAP) == {"MeltForCausalLM", "OuroForCausalLM"}
    melt, ouro = vllm_config(), vllm_config(model_type="ouro")
    ouro.model_config.hf_config.total_ut_steps = 4
    ouro.model_config.model_arch_config = SimpleNamespace(total_num_hidden_layers=24)
    for name, config in (("MeltForCausalLM", melt), ("OuroForCausalLM", ouro)):
        models.MODELS_CONFIG_MAP[name].verify_and_update_config(config)
    assert melt.scheduler_config.scheduler_cls == vllm_plugin.SCHEDULER
    assert ouro.model_config.model_arch_config.total_num_hidden_layers == 4 * 24
    assert ouro.scheduler_config.scheduler_cls is None
