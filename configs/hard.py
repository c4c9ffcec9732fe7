"""`nano_small.py` on the harder arithmetic task: the paper's method on a small, fixed budget.

    python -m melt_jax.train --config=configs/hard.py --workdir=runs/hard

The steps of a problem leave out every second value (`data.hops`), which the loops must compute. Expected: the MELT
answers 66 to 75 % of 256 problems after the alignment (three seeds) and 16 to 23 % after the transition. The teacher
answers 100 %; the teacher with a single shared KV entry that every loop overwrites, untrained, answers none.
"""

from ml_collections import ConfigDict

from configs import nano_small


def get_config() -> ConfigDict:
    """The recipe."""
    config = nano_small.get_config()
    config.teacher = "melt_jax/assets/ouro_hard"
    config.data.hops = 2
    config.data.high = 6
    config.data.length = 128
    config.data.batch = 12
    return config
