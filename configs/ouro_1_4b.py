"""Trains Ouro-1.4B-Thinking into MELT-1.6B by the recipe of the MELT paper (arXiv 2605.07721), on 16 TPU v6e chips.

Sequences of 10 000 tokens in chunks of 500, 320 000 tokens per step, 500 + 300 steps: 256M tokens of reasoning traces.
The paper used 1 040 H100-hours. Convert the published folder, prepare the traces, then train:

    python -m melt_jax.convert --input=Ouro-1.4B-Thinking --output=checkpoints/ouro_1_4b --to=orbax
    python -m melt_jax.prepare --tokenizer=Ouro-1.4B-Thinking --input='traces/*.jsonl|traces/*.parquet' \\
        --output=data/train --long=drop
    python -m melt_jax.train --config=configs/ouro_1_4b.py --workdir=runs/melt_1_6b

Expected: 1 636 028 417 parameters, and a cache of 196 608 bytes per token in bfloat16; the LoopLM's takes 786 432.
A step of the recipe has been compiled for these chips; the recipe has never been run. To check whether a step fits
other chips:

    python -m melt_jax.compile --config=configs/ouro_1_4b.py --topology=v6e:4x4 --phase=transition
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The recipe."""
    config = base.get_config()
    config.teacher = "checkpoints/ouro_1_4b"
    config.data.source = "records"
    config.data.path = "data/train"
    config.mesh.tensor = 2
    config.micro_batches = 4  # each of the eight groups of two chips runs one sequence at a time
    return config
