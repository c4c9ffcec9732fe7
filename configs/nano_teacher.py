"""Trains the embedded LoopLM, `melt_jax/assets/ouro_nano`, from scratch on worked arithmetic with Ouro's objective.

    python -m melt_jax.train --config=configs/nano_teacher.py --workdir=runs/nano_teacher

Paper: Ouro (arXiv 2510.25741). Expected: it answers 100 % of 256 arithmetic problems.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The recipe."""
    config = base.get_config()
    config.phases = ("pretraining",)
    config.tokenizer = "melt_jax/assets/ouro_nano"
    config.chunk_size = 128
    config.dtype = "float32"
    config.remat = "none"

    config.model.vocab = 64
    config.model.width = 128
    config.model.layers = 1
    config.model.loops = 4
    config.model.heads = 4
    config.model.kv_heads = 4
    config.model.head_width = 32
    config.model.feed_forward = 384
    config.model.rope_theta = 1e4
    config.model.max_positions = 512

    config.data.source = "arithmetic"
    config.data.length = 128
    config.data.batch = 16

    config.pretraining.steps = 4000
    config.pretraining.learning_rate = 3e-3
    config.pretraining.warmup_steps = 200
    config.pretraining.final_fraction = 0.02
    config.pretraining.init_std = 0.05
    config.pretraining.embedding_std = 1.0

    config.log_every = 50
    config.checkpoint_every = 500
    config.evaluation.problems = 512
    config.evaluation.sequences = 0
    config.evaluation.sample = True
    return config
