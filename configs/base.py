"""All keys of a run, with the values of the MELT paper (arXiv 2605.07721) if it states them.

The recipes in this folder change some of the values. Any key can be overridden on the command line:

    python -m melt_jax.train --config=configs/nano.py --config.alignment.beta=0.01 --workdir=runs/beta

The comments on keys are copies of their meanings in `melt_jax/config.py`, which also declares types and ranges. After a
change there, `python -m tests.helpers.recipes` rewrites them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The base configuration. It is not locked: `freeze` reports unknown keys together with all other errors."""
    config = ConfigDict()
    config.seed = 0  # of new weights and data; step n's batch is a function of (seed, n)
    config.phases = ("transition", "alignment")  # run in this order, or pretraining alone
    config.teacher = ""  # the LoopLM: a folder in either form, or a model of the hub; the student starts from it too
    config.tokenizer = ""  # whose files to save with the weights, a folder or a model of the hub; empty: the teacher's

    # The MELT that the LoopLM becomes.
    config.student = ConfigDict()
    config.student.gate = "elementwise"  # gate variant; one of elementwise, scalar, mean, ema, last
    config.student.first_loop = "copy"  # copy: h¹ = u; gated: h⁰ = 0, gated at loop 1 too; one of copy, gated
    config.student.window = 0  # W, tokens before a query that it sees through entries of its own loop
    config.student.sweeps = 1  # times that a chunk's loops run; from the second on they see final entries
    config.student.gate_std = 0.02  # standard deviation of new gate matrices
    config.student.gate_bias = 0.0  # b_z of new gates; a positive bias keeps the old latent

    # The computation of a step.
    config.chunk_size = 500  # C, tokens that run in parallel
    config.dtype = "bfloat16"  # of computation and teacher; optimizer state is float32; one of float32, bfloat16
    config.remat = "products"  # backward keeps all but scores, products, or layer inputs; one of none, products, layer
    config.attention = "blocks"  # attention is compiled by XLA or runs in kernels for TPUs; one of blocks, pallas
    config.attention_block = 512  # cached slots whose attention scores are in memory at a time
    config.unroll = False  # separate code for each of the T loops: less memory traffic, slower to compile
    config.micro_batches = 1  # sequential parts of a batch, whose gradients are summed; divides data.batch
    config.compiler_options = "default"  # TPU compiler options of a step; one of default, overlap, vmem, overlap_vmem
    config.gather = "step"  # when weights are gathered over fsdp: once a step or at each use; one of step, layer

    # Devices along each mesh axis: within a slice (ICI), and slices (DCN). One axis may be 0: all remaining devices.
    config.mesh = ConfigDict()
    config.mesh.replica = 1  # copies of weights and optimizer state; they split the batch; 0: the rest
    config.mesh.fsdp = 0  # parts of weights and optimizer state; they split the batch too; 0: the rest
    config.mesh.tensor = 1  # parts of heads, feed-forward, vocabulary, latents and KV; 0: the rest
    config.mesh.replica_slices = 1  # slices (DCN) along replica
    config.mesh.fsdp_slices = 1  # slices (DCN) along fsdp

    # Training sequences.
    config.data = ConfigDict()
    config.data.source = "tokens"  # a token file, prepared data, or problems; one of tokens, records, arithmetic
    config.data.path = ""  # tokens: a .npy or .npz file; records: a folder written by melt_jax.prepare
    config.data.length = 10_000  # tokens per sequence
    config.data.batch = 32  # sequences per step, over all devices
    config.data.low = 2  # arithmetic: fewest definitions per problem
    config.data.high = 5  # arithmetic: most definitions per problem
    config.data.hops = 1  # arithmetic: definitions per value that the steps state
    config.data.score = "completion"  # arithmetic: scored predictions; one of completion, all

    # Optional, before phase 1: trains the gates alone, with the teacher's stream as the input of every layer.
    config.warm_start = ConfigDict()
    config.warm_start.steps = 100  # optimizer updates
    config.warm_start.learning_rate = 0.0  # peak, of the backbone weights
    config.warm_start.gate_learning_rate = 5e-4  # peak, of the gates
    config.warm_start.warmup_steps = 20  # updates of linear warm-up, before the cosine decay
    config.warm_start.final_fraction = 0.1  # last learning rate, as a fraction of the peak

    # Phase 1: KV entries are blended from those of the per-loop cache to those of the shared cache; loss L_KD.
    config.transition = ConfigDict()
    config.transition.steps = 500  # optimizer updates
    config.transition.learning_rate = 8e-6  # peak, of the backbone weights
    config.transition.gate_learning_rate = 5e-4  # peak, of the gates
    config.transition.warmup_steps = 20  # updates of linear warm-up, before the cosine decay
    config.transition.final_fraction = 0.1  # last learning rate, as a fraction of the peak
    config.transition.ramp = 1.0  # α rises linearly from 0 at step 0 to 1 at step ramp · (steps − 1)

    # Phase 2: only the shared cache; loss L_KD + β·L_align.
    config.alignment = ConfigDict()
    config.alignment.steps = 300  # optimizer updates
    config.alignment.learning_rate = 8e-6  # peak, of the backbone weights
    config.alignment.gate_learning_rate = 5e-4  # peak, of the gates
    config.alignment.warmup_steps = 20  # updates of linear warm-up, before the cosine decay
    config.alignment.final_fraction = 0.1  # last learning rate, as a fraction of the peak
    config.alignment.beta = 0.1  # β, weight of the attention alignment
    config.alignment.reduction = "sum"  # ‖o − o_teacher‖², or divided by the mean of ‖o_teacher‖²; one of sum, relative

    # L_KD of both phases.
    config.distillation = ConfigDict()
    config.distillation.loops = "all"  # L_KD is the mean over all loops, or the last loop's KL; one of all, last
    config.distillation.divergence = "forward"  # KL(teacher ‖ student), or the reverse; one of forward, reverse
    config.distillation.gradient = "full"  # flows through all chunks, or stops at the chunk's start; one of full, chunk

    # Pretraining of a LoopLM; loss: expected cross-entropy − bonus · exit entropy. A LoopLM has no cache gate.
    config.pretraining = ConfigDict()
    config.pretraining.steps = 1000  # optimizer updates
    config.pretraining.learning_rate = 3e-4  # peak, of the backbone weights
    config.pretraining.gate_learning_rate = 0.0  # peak, of the gates
    config.pretraining.warmup_steps = 100  # updates of linear warm-up, before the cosine decay
    config.pretraining.final_fraction = 0.1  # last learning rate, as a fraction of the peak
    config.pretraining.entropy_bonus = 0.05  # nats of loss per nat of exit entropy
    config.pretraining.init_std = 0.02  # standard deviation of new weights
    config.pretraining.embedding_std = 0.02  # standard deviation of new embeddings

    # The LoopLM that is pretrained. A run with a teacher uses the teacher's values instead.
    config.model = ConfigDict()
    config.model.vocab = 49152  # V, size of the vocabulary
    config.model.width = 2048  # D, the model width
    config.model.layers = 24  # L, layers
    config.model.loops = 4  # T, passes over all layers
    config.model.heads = 16  # H, query heads
    config.model.kv_heads = 16  # K, key/value heads; a divisor of heads
    config.model.head_width = 128  # E, the width of a head; even
    config.model.feed_forward = 5632  # F, the feed-forward width
    config.model.rope_theta = 1e6  # base of the rotary frequencies
    config.model.rms_eps = 1e-6  # added to the mean square in every norm
    config.model.max_positions = 65536  # longest sequence, in tokens
    config.model.tied = False  # the output head is the embedding matrix
    config.model.bos = 1  # token id that begins a sequence, for config.json
    config.model.eos = 2  # token id that ends a sequence, for config.json
    config.model.pad = 0  # token id of padding, for config.json

    # AdamW.
    config.optimizer = ConfigDict()
    config.optimizer.b1 = 0.9  # decay of the first moment
    config.optimizer.b2 = 0.95  # decay of the second moment
    config.optimizer.eps = 1e-8  # added to the root of the second moment
    config.optimizer.weight_decay = 0.1  # applied to matrices only, times the learning rate
    config.optimizer.clip = 1.0  # global norm to which gradients are clipped

    config.log_every = 10  # steps between log lines; the first step is logged too
    config.checkpoint_every = 100  # steps between checkpoints; a phase's last step is always saved
    config.checkpoints_kept = 2  # newest checkpoints of a phase to keep

    # Monitoring, which does not affect results.
    config.run = ConfigDict()
    config.run.skipped_limit = 10  # consecutive skipped (non-finite) steps that stop the run
    config.run.stall_seconds = 0.0  # seconds without a finished step before all stacks are logged; 0: never
    config.run.stall_first_seconds = 3600.0  # the same for the first step, which compiles; 0: never
    config.run.stall_exits = True  # exit with status 76 after a stall, so that a launcher restarts the run
    config.run.lost_seconds = 100  # seconds without a sign of life of a process after which JAX ends the others
    config.run.profile_start = 0  # first step of each phase to profile, from 1; 0: none
    config.run.profile_steps = 3  # steps to profile
    config.run.wandb = ""  # Weights & Biases project, or entity/project, that gets the log too; empty: none

    # Measurements at the end of each phase.
    config.evaluation = ConfigDict()
    config.evaluation.problems = 0  # arithmetic problems to answer; 0: none
    config.evaluation.sequences = 0  # sequences on which the KL to the teacher is measured; 0: none
    config.evaluation.decoding_tokens = 512  # leading tokens of each sequence on which decoding is measured; 0: none
    config.evaluation.path = ""  # tokens, records: held-out sequences, with the source and length of data
    config.evaluation.seed = 1  # of the problems and the sequences
    config.evaluation.baselines = True  # also measure the teacher, and the teacher with one shared KV entry, untrained
    config.evaluation.sample = False  # print one worked answer

    return config
