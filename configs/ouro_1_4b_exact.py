"""Trains Ouro-1.4B-Thinking into MELT-1.6B in chunks that are exactly decoding, on 16 TPU v6e chips.

As `ouro_1_4b.py`, the recipe of the MELT paper (arXiv 2605.07721), with three changes: the relative reduction of the
alignment, whose β does not depend on the model's width; chunks of C = 128 tokens instead of 500; a window of W = 128.
A chunk of at most W + 1 tokens computes what decoding token by token does, so the model is trained on the function
that generates. 129 would be exact too; 128 suits the tiles of a TPU.

    python -m melt_jax.train --config=configs/ouro_1_4b_exact.py --workdir=runs/melt_1_6b_exact

Beside the cache of 196 608 bytes per token, a sequence keeps its window: 75 MB in bfloat16, whatever its length.
vLLM does not serve a window; transformers and `melt_jax.generate` do.

A step has been compiled for these chips; the recipe has never been run. The price by the compiler, beside the paper's
chunks: GB per chip, FLOPs / necessary, and the chip-hours of the phase at the slowest of products, memory and links, to
those at their sum (launch/README.md has the whole table):

                              this recipe                   chunks of 500
    v6e:4x4   transition      22.6 GB  1.10  32 to 48 h     21.4 GB  1.08  10 to 20 h
    v6e:4x4   alignment       16.3 GB  1.10  19 to 28 h     14.7 GB  1.09   7 to 12 h

FLOPs are the same, but products with 128 rows run at half rate on v6e, and short chunks move more in memory, because
every chunk reads the weights and adds to the sums of their gradients. Several sequences at once reduce both: with
`mesh.tensor` 4 and `micro_batches` 2 the alignment runs four, in 24.2 GB and 11 to 21 chip-hours. A run may change both
when it resumes.
"""

from ml_collections import ConfigDict

from configs import ouro_1_4b


def get_config() -> ConfigDict:
    """The recipe."""
    config = ouro_1_4b.get_config()
    config.student.window = 128
    config.student.sweeps = 1
    config.chunk_size = 128
    config.alignment.reduction = "relative"
    return config
