"""Every key of a run, with its meaning and unit. The other files of this folder change some of them.

The defaults are the paper's recipe (MELT, arXiv 2605.07721) where it states one. Override any key on the command line:

    python -m melt_jax.train --config=configs/nano.py --config.alignment.beta=0.01 --workdir=runs/beta
"""

from ml_collections import ConfigDict


def get_config():
    """The base configuration."""
    config = ConfigDict()
    config.seed = 0  # of fresh weights and of the data; the batch of step n is a function of (seed, n)
    config.phases = ("transition", "alignment")  # what the run does, in this order; or ("pretraining",)
    config.teacher = ""  # folder of the LoopLM checkpoint, published or Orbax form; where the student starts too
    config.tokenizer = ""  # folder of the tokenizer files to keep beside the weights; "" takes the teacher's

    config.student = ConfigDict()
    config.student.gate = "elementwise"  # how a row is rewritten: elementwise (MELT), scalar, mean, ema, last
    config.student.first_loop = (
        "copy"  # "copy": the first latent is the first input; "gated": the gate acts at loop 1 too
    )
    config.student.gate_std = 0.02  # standard deviation of fresh gate matrices

    config.chunk_size = 500  # tokens that run in parallel; final rows pass from chunk to chunk
    config.dtype = "bfloat16"  # of computation and of the teacher; masters and moments are float32
    config.remat = "products"  # what a chunk's backward pass recomputes: none, all but "products" with weights, "layer"
    config.attention_block = 512  # cached slots whose attention scores exist at a time
    # The next three say where a step runs, and may change when a run is resumed.
    config.micro_batches = 1  # parts of a batch whose gradients are added up, one after the other

    config.mesh = ConfigDict()  # devices along each axis of a slice (ICI); 0: what is left
    config.mesh.replica = 1  # whole copies of masters and moments; the batch is split over them
    config.mesh.fsdp = 0  # pieces of masters, moments and stored weights; the batch is split over them too
    config.mesh.tensor = 1  # pieces of heads, feed-forward, vocabulary, latents and rows
    config.mesh.replica_slices = 1  # slices (DCN) along replica,
    config.mesh.fsdp_slices = 1  # and along fsdp
    config.gather = "step"  # when weights are gathered over fsdp: once a "step", or by "layer", at each use

    config.data = ConfigDict()
    config.data.source = "tokens"  # "tokens", a file; "records", from melt_jax.prepare; "arithmetic", made on the fly
    config.data.path = ""  # tokens: .npy, or .npz with tokens, segments and loss_mask; records: the prepared folder
    config.data.length = 10_000  # tokens of a sequence
    config.data.batch = 32  # sequences of a step, over all devices
    config.data.low = 2  # arithmetic: the fewest definitions of a problem
    config.data.high = 5  # arithmetic: the most
    config.data.score = "completion"  # arithmetic: which predictions are scored, the "completion"'s or "all"

    config.transition = ConfigDict()  # phase 1: rows go from the loop cache's to the shared cache's; loss L_KD
    config.transition.steps = 1500  # optimizer updates
    config.transition.learning_rate = 8e-6  # peak, of the backbone weights
    config.transition.gate_learning_rate = 5e-4  # peak, of the gates
    config.transition.warmup_steps = 20  # updates of linear warm-up; then a cosine
    config.transition.final_fraction = 0.1  # the last learning rate, as a fraction of the peak
    config.transition.ramp = 1.0  # fraction of the phase over which α goes from 0 to 1, linearly

    config.alignment = ConfigDict()  # phase 2: shared rows alone; loss L_KD + β·L_align
    config.alignment.steps = 300
    config.alignment.learning_rate = 8e-6
    config.alignment.gate_learning_rate = 5e-4
    config.alignment.warmup_steps = 20
    config.alignment.final_fraction = 0.1
    config.alignment.beta = 0.1  # weight of the attention alignment

    config.pretraining = ConfigDict()  # a LoopLM from scratch: expected cross-entropy − bonus × exit entropy
    config.pretraining.steps = 1000
    config.pretraining.learning_rate = 3e-4
    config.pretraining.gate_learning_rate = 0.0  # a LoopLM has no cache gate
    config.pretraining.warmup_steps = 100
    config.pretraining.final_fraction = 0.1
    config.pretraining.entropy_bonus = 0.05  # nats of loss per nat of exit entropy
    config.pretraining.init_std = 0.02  # standard deviation of fresh weights,
    config.pretraining.embedding_std = 0.02  # and of fresh embeddings

    config.model = ConfigDict()  # of a LoopLM from scratch; a run with a teacher takes the teacher's
    config.model.vocab = 49152  # token ids
    config.model.width = 2048  # D
    config.model.layers = 24  # L
    config.model.loops = 4  # T, passes over the layers
    config.model.heads = 16  # H, query heads
    config.model.kv_heads = 16  # K, key/value heads; divides heads
    config.model.head_width = 128  # E, even
    config.model.feed_forward = 5632  # F
    config.model.rope_theta = 1e6  # base of the rotary frequencies
    config.model.rms_eps = 1e-6  # added to mean squares in norms
    config.model.max_positions = 65536  # longest document, in tokens
    config.model.tied = False  # the head is the embedding
    config.model.bos = 1  # token ids that config.json states: of a sequence's begin,
    config.model.eos = 2  # its end,
    config.model.pad = 0  # and padding

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.1  # on matrices alone, times the learning rate
    config.optimizer.clip = 1.0  # largest global norm of a gradient

    config.log_every = 10  # steps to a line of the log
    config.checkpoint_every = 100  # steps to a checkpoint; a phase's last step is always saved
    config.checkpoints_kept = 2

    config.run = ConfigDict()  # how a run is watched; it may go on with other values than it began with
    config.run.skipped_limit = 10  # updates in a row, skipped for a loss or gradient not finite, that stop the run
    config.run.stall_seconds = 0.0  # without a finished step, until the stacks of all threads are logged; 0: never
    config.run.stall_first_seconds = 3600.0  # the same for the first step, which is compiled
    config.run.stall_exits = True  # after that leave with status 76, so that a launcher starts the run again
    config.run.profile_start = 0  # first step of each phase to profile, from 1; 0: none
    config.run.profile_steps = 3  # how many steps are profiled

    config.evaluation = ConfigDict()  # at the end of each phase
    config.evaluation.problems = 0  # arithmetic problems to answer; 0: none
    config.evaluation.sequences = 0  # sequences on which the KL to the teacher is measured; 0: none
    config.evaluation.path = ""  # tokens, records: sequences that training does not see, of data's form and length
    config.evaluation.seed = 1  # of both; not a training seed
    config.evaluation.sample = False  # print one worked answer

    return config.lock()
