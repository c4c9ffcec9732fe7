"""melt_jax: the Memory-Efficient Looped Transformer in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melt_jax.checkpoints.published import load_model, to_hf_tensors
    from melt_jax.config import ModelConfig
    from melt_jax.inference.generation import generate_tokens
    from melt_jax.model.loops import run_chunk
    from melt_jax.model.model import LoopedTransformer, exit_loop, init_model, parameter_count
    from melt_jax.model.sequence import run_sequence
    from melt_jax.training.objectives import alignment_loss, transition_loss

__version__ = "0.1.0"

__all__ = [
    "LoopedTransformer",
    "ModelConfig",
    "alignment_loss",
    "exit_loop",
    "generate_tokens",
    "init_model",
    "load_model",
    "parameter_count",
    "run_chunk",
    "run_sequence",
    "to_hf_tensors",
    "transition_loss",
]

# Imported on first use: the plugin for vLLM is in this package and runs without JAX.
_MODULES = {
    "LoopedTransformer": "model.model",
    "ModelConfig": "config",
    "alignment_loss": "training.objectives",
    "exit_loop": "model.model",
    "generate_tokens": "inference.generation",
    "init_model": "model.model",
    "load_model": "checkpoints.published",
    "parameter_count": "model.model",
    "run_chunk": "model.loops",
    "run_sequence": "model.sequence",
    "to_hf_tensors": "checkpoints.published",
    "transition_loss": "training.objectives",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
