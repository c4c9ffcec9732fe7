"""The recipe of `nano.py` with several times its steps.

    python -m melt_jax.train --config=configs/nano_hour.py --workdir=runs/nano_hour
"""

from configs import nano


def get_config():
    """The recipe."""
    config = nano.get_config()
    config.transition.steps = 1000
    config.alignment.steps = 2000
    config.log_every = 100
    config.checkpoint_every = 500
    return config
