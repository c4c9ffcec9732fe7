"""Trains the embedded LoopLM into a MELT in phases of 60 and 180 steps, in about four minutes on two CPU cores.

    python -m melt_jax.train --config=configs/nano.py --workdir=runs/nano

Expected: the MELT answers about 70 % of 256 arithmetic problems after the transition and 99 to 100 % after the
alignment (five seeds). The teacher answers 100 %; the teacher with a single shared KV entry that every loop overwrites,
untrained, answers 1 %.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The recipe."""
    config = base.get_config()
    config.teacher = "melt_jax/assets/ouro_nano"
    config.student.window = 8
    config.chunk_size = 9  # window + 1: training computes what decoding computes
    config.dtype = "float32"
    config.remat = "none"

    config.data.source = "arithmetic"
    config.data.length = 72
    config.data.batch = 32

    config.transition.steps = 60
    config.transition.learning_rate = 1e-3
    config.transition.gate_learning_rate = 1e-2
    config.alignment.steps = 180
    config.alignment.learning_rate = 1e-3
    config.alignment.gate_learning_rate = 1e-2
    config.alignment.reduction = "relative"

    config.log_every = 20
    config.evaluation.problems = 256
    config.evaluation.sequences = 16
    config.evaluation.sample = True
    return config
