"""Ouro-1.4B-Thinking becomes MELT-1.6B: the paper's recipe (arXiv 2605.07721).

Reasoning traces, 320 000 tokens a step, one sequence at a time; the paper took 1 040 H100-hours. Convert the published
folder and prepare your data first:

    python -m melt_jax.convert --input=Ouro-1.4B-Thinking --output=checkpoints/ouro_1_4b --to=orbax
    python -m melt_jax.prepare --tokenizer=Ouro-1.4B-Thinking --input='traces/*.jsonl|traces/*.parquet' \\
        --output=data/train --long=drop
    python -m melt_jax.train --config=configs/ouro_1_4b.py --workdir=runs/melt_1_6b

As it stands it is for 16 chips of TPU v6e; what it needs elsewhere, before renting:

    python -m melt_jax.compile --config=configs/ouro_1_4b.py --topology=v6e:4x4 --phase=transition
"""

from configs import base


def get_config():
    """The recipe: sequences of 10 000 tokens in chunks of 500, 320 000 tokens a step, 1500 + 300 steps."""
    config = base.get_config()
    config.teacher = "checkpoints/ouro_1_4b"
    config.data.source = "records"
    config.data.path = "data/train"
    config.mesh.tensor = 4
    config.micro_batches = 8  # four groups of four chips, one sequence at a time each
    return config
