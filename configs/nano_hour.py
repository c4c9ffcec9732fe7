"""The recipe of `nano.py` with several times its steps: 1 000 + 2 000, 45 minutes of one core's time.

    python -m melt_jax.train --config=configs/nano_hour.py --workdir=runs/nano_hour

Of 256 fresh problems the MELT answers 95.7 % after the transition and 100.0 % after the alignment, like its teacher.
"""

from configs import nano


def get_config():
    """The recipe."""
    config = nano.get_config()
    config.transition.steps = 1000
    config.alignment.steps = 2000
    config.alignment.beta = 0.005
    config.log_every = 100
    config.checkpoint_every = 500
    return config
