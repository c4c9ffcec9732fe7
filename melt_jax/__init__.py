"""melt_jax: the Memory-Efficient Looped Transformer in JAX."""

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
