"""A plugin of vLLM that serves published MELTs with the chunk that they were trained with.

    pip install --no-deps .
    vllm serve MELT-1.6B --trust-remote-code

vLLM runs the PyTorch code of the model's folder by its transformers backend; on TPUs, tpu-inference runs that of
`tpu_inference`. They keep one KV cache per layer, to which each of the T loops writes the same slots: a query of loop t
reads the tokens that run in the same step as they are in loop t, and final entries of earlier ones. So the tokens of a
prompt that run in one step are a chunk, and the result depends on how vLLM cuts prompts. This plugin makes it cut them
as training does, into chunks of `chunk_size` tokens that no other request can shorten, and turns prefix caching off. It
imports neither vLLM nor JAX until vLLM calls it.
"""

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.melt_jax")
ARCHITECTURE = "TransformersForCausalLM"  # vLLM's name of its transformers backend
SCHEDULER = "melt_jax.inference.vllm_scheduler.make_scheduler"


def register() -> None:
    """The entry point of `vllm.general_plugins`; vLLM calls it once in each of its processes."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.is_tpu():
        from melt_jax.inference.tpu_inference import register_models

        register_models()
        _hook("MeltForCausalLM", _configure_melt)
        _hook("OuroForCausalLM", count_caches)
    else:
        _hook(ARCHITECTURE, _configure_melt)


def _hook(architecture: str, change: Callable[[Any], None]) -> None:
    """Makes vLLM call `change` with the configuration of an architecture, after a hook that it may have."""
    from vllm.model_executor.models import config as models  # pyright: ignore[reportMissingImports]

    before = models.MODELS_CONFIG_MAP.get(architecture, models.VerifyAndUpdateConfig)

    class ConfigHook(before):
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            change(vllm_config)

    models.MODELS_CONFIG_MAP[architecture] = ConfigHook


def _configure_melt(vllm_config):
    if vllm_config.model_config.hf_config.model_type == "melt":
        configure(vllm_config)


def count_caches(vllm_config: Any) -> None:
    """Makes vLLM count T · L layers in a LoopLM, and so allocate as many caches on TPUs."""
    model = vllm_config.model_config
    model.model_arch_config.total_num_hidden_layers *= model.hf_config.total_ut_steps


def configure(vllm_config: Any) -> None:
    """Sets the scheduling that a MELT needs, and logs what it changes.

    A step has room for a chunk of every request: if it has not, fewer requests run at a time.

    Args:
      vllm_config: a `VllmConfig`, before the engine starts; it is changed.

    Raises:
      ValueError: lists what vLLM cannot do for this model.
    """
    hf_config, scheduler = vllm_config.model_config.hf_config, vllm_config.scheduler_config
    chunk = min(hf_config.chunk_size, vllm_config.model_config.max_model_len)
    if errors := serving_errors(vllm_config, chunk):
        raise ValueError("; ".join(errors))
    scheduler.long_prefill_token_threshold = chunk
    scheduler.long_prefill_token_threshold_adaptive = False
    scheduler.scheduler_cls = SCHEDULER
    vllm_config.cache_config.enable_prefix_caching = False
    most = scheduler.max_num_batched_tokens // chunk
    logger.info("melt_jax: prompts run in chunks of %d tokens, without prefix caching", chunk)
    if most < scheduler.max_num_seqs:
        logger.info(
            "melt_jax: %d requests at a time instead of %d, because a step has %d tokens; raise"
            " --max-num-batched-tokens for more",
            *(most, scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
        )
        scheduler.max_num_seqs = most


def serving_errors(vllm_config: Any, chunk: int) -> list[str]:
    """What vLLM cannot do for this MELT, one text each."""
    hf_config, scheduler = vllm_config.model_config.hf_config, vllm_config.scheduler_config
    errors = []
    if hf_config.window or hf_config.sweeps > 1:
        errors.append(
            f"window, sweeps: expected 0 and 1, because vLLM keeps one KV entry per token and layer, found"
            f" {hf_config.window} and {hf_config.sweeps}; generate with transformers or melt_jax"
        )
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        errors.append(f"--scheduler-cls: expected none, found {scheduler.scheduler_cls}")
    if vllm_config.speculative_config is not None:
        errors.append("speculative decoding: expected none, because it checks several tokens in one chunk, found some")
    if not scheduler.enable_chunked_prefill:
        errors.append("--enable-chunked-prefill: expected true, found false")
    if scheduler.max_num_batched_tokens < chunk:
        errors.append(
            f"--max-num-batched-tokens: expected at least {chunk}, the chunk, found {scheduler.max_num_batched_tokens}"
        )
    return errors
