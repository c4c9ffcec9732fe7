"""Trains Ouro-2.6B-Thinking, which has 48 layers, into a MELT by the recipe of `ouro_1_4b.py` (arXiv 2605.07721).

    python -m melt_jax.convert --input=Ouro-2.6B-Thinking --output=checkpoints/ouro_2_6b --to=orbax
    python -m melt_jax.prepare --tokenizer=Ouro-2.6B-Thinking --input='traces/*.jsonl|traces/*.parquet' \\
        --output=data/train --long=drop
    python -m melt_jax.train --config=configs/ouro_2_6b.py --workdir=runs/melt_2_6b

Expected: a cache of 393 216 bytes per token in bfloat16; the LoopLM's takes 1 572 864. The recipe has not been run.
"""

from ml_collections import ConfigDict

from configs import ouro_1_4b


def get_config() -> ConfigDict:
    """The recipe."""
    config = ouro_1_4b.get_config()
    config.teacher = "checkpoints/ouro_2_6b"
    config.model.layers = 48
    config.mesh.tensor = 4
    config.micro_batches = 8
    return config
