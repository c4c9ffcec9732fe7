"""Exported models in transformers, and the logits of generation by transformers and by JAX, for comparison."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from melt_jax.inference.answers import SPARE_TOKENS
from melt_jax.inference.generation import next_logits, prefill
from melt_jax.model.cache import Cache
from melt_jax.model.loops import run_chunk
from melt_jax.model.model import LoopedTransformer


def open_exported(folder: str | pathlib.Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """The model of a published folder, by its own code; `changes` replace values of its config."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **changes)
    return model.eval()


def left_padded(prompts: Sequence[Sequence[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """The inputs of a batch of prompts of any lengths."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor([[pad] * n + list(prompt) for n, prompt in zip(pads, prompts)]),
        "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in pads]),
    }


def generated(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, new] and the logits [B, new, V] that selected them, by `generate`, without a stop token."""
    out = model.generate(
        **left_padded(prompts),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, -new:].numpy(), torch.stack(out.logits, 1).numpy()


def generated_by_jax(
    model: LoopedTransformer, prompts: Sequence[Sequence[int]], new: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same by melt_jax, with a prefill in chunks of `chunk` tokens."""
    cache, hidden, lengths = prefill(model, prompts, new, chunk)
    logits = [next_logits(model, hidden)[0]]
    for step in range(new - 1):
        cache, last = _decode(model, cache, jnp.argmax(logits[-1], -1)[:, None].astype(jnp.int32), lengths + step)
        logits.append(last)
    stacked = np.stack(jax.device_get(logits), 1)
    return stacked.argmax(-1), stacked


@jax.jit
def _decode(model: LoopedTransformer, cache: Cache, tokens: jax.Array, start: jax.Array) -> tuple[Cache, jax.Array]:
    out = run_chunk(model, tokens, cache, start)
    return cache.write(out.kv, out.segments, start), next_logits(model, out.hidden[:, :, 0])[0]


def completions(model: PreTrainedModel, problems: Sequence[Any], stop: int, batch: int = 64) -> list[list[int]]:
    """Greedy completions of problems, as `exact_answers` generates them, each up to and including `stop`."""
    limit = max(len(problem.completion) for problem in problems) + SPARE_TOKENS
    found = []
    for first in range(0, len(problems), batch):
        inputs = left_padded([problem.prompt for problem in problems[first : first + batch]])
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False, eos_token_id=stop, pad_token_id=0)
        for row in tokens[:, inputs["input_ids"].shape[1] :].tolist():
            found.append(row[: row.index(stop) + 1] if stop in row else row)
    return found
