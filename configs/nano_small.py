"""Distils the embedded LoopLM by the paper's method on a small, fixed budget, to compare variants of the method.

    python -m melt_jax.train --config=configs/nano_small.py --workdir=runs/nano_small

Chunks of 16 tokens, no window, 60 + 100 steps of 16 sequences: about two minutes on one CPU core. The result is well
below the teacher, so that differences show.
"""

from ml_collections import ConfigDict

from configs import nano


def get_config() -> ConfigDict:
    """The recipe."""
    config = nano.get_config()
    config.student.window = 0
    config.chunk_size = 16
    config.data.batch = 16
    config.transition.steps = 60
    config.alignment.steps = 100
    config.evaluation.seed = 100
    config.evaluation.sample = False
    return config
