"""Ouro-2.6B-Thinking becomes a MELT: the recipe of `ouro_1_4b.py` on 48 layers.

    python -m melt_jax.convert --input=Ouro-2.6B-Thinking --output=checkpoints/ouro_2_6b --to=orbax
    python -m melt_jax.prepare --tokenizer=Ouro-2.6B-Thinking --input='traces/*.jsonl|traces/*.parquet' \\
        --output=data/train --long=drop
    python -m melt_jax.train --config=configs/ouro_2_6b.py --workdir=runs/melt_2_6b
"""

from configs import ouro_1_4b


def get_config():
    """The recipe."""
    config = ouro_1_4b.get_config()
    config.teacher = "checkpoints/ouro_2_6b"
    config.model.layers = 48
    return config
