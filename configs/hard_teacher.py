"""Trains `melt_jax/assets/ouro_hard`, the LoopLM of the harder arithmetic task, from scratch with Ouro's objective.

    python -m melt_jax.train --config=configs/hard_teacher.py --workdir=runs/hard_teacher

The steps of a problem leave out every second value (`data.hops`), which the loops must compute. Paper: Ouro
(arXiv 2510.25741). Expected: it answers 100 % of 256 problems.
"""

from ml_collections import ConfigDict

from configs import nano_teacher


def get_config() -> ConfigDict:
    """The recipe."""
    config = nano_teacher.get_config()
    config.data.hops = 2
    config.data.high = 6
    return config
