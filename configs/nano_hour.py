"""`nano.py` with phases of 1 000 and 2 000 steps and β = 0.005, in 45 minutes on one CPU core.

    python -m melt_jax.train --config=configs/nano_hour.py --workdir=runs/nano_hour

Expected: the MELT answers 95.7 % of 256 arithmetic problems after the transition and 100 % after the alignment, like
its teacher.
"""

from ml_collections import ConfigDict

from configs import nano


def get_config() -> ConfigDict:
    """The recipe."""
    config = nano.get_config()
    config.transition.steps = 1000
    config.alignment.steps = 2000
    config.alignment.beta = 0.005
    config.log_every = 100
    config.checkpoint_every = 500
    return config
