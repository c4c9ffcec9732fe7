"""Every configuration key with its type, range, unit and meaning, and the frozen dataclasses that hold the values.

A key is declared once, below, as `name: Annotated[type, limit, "meaning"]`; `melt_jax/README.md` explains the letters
T, L, D, …. `configs/base.py` gives each key a value and repeats its meaning in a comment; a test compares the two.
`freeze` checks a ConfigDict and reports all its errors at once: first those of each key, then the contradictions
between keys.
"""

import contextlib
import dataclasses
import difflib
import typing
from typing import Annotated, Any

from melt_jax.config_keys import WORDS, Key, OneOf, Range, keys_of

if typing.TYPE_CHECKING:
    from ml_collections import ConfigDict

PHASES = ("pretraining", "warm_start", "transition", "alignment")
GATES = ("none", "elementwise", "scalar", "mean", "ema", "last")
TRAINED_GATES = ("elementwise", "scalar")
CHOICES = {
    "gate": GATES,
    "first_loop": ("copy", "gated"),
    "remat": ("none", "products", "layer"),
    "attention": ("blocks", "pallas"),
    "dtype": ("float32", "bfloat16"),
    "gather": ("step", "layer"),
    "compiler_options": ("default", "overlap", "vmem", "overlap_vmem"),
    "reduction": ("sum", "relative"),
    "distilled": ("all", "last"),
    "divergence": ("forward", "reverse"),
    "gradient": ("full", "chunk"),
}

# The sizes of a model are far below these; larger ones are typing errors, refused before anything is allocated.
Layers = Annotated[int, Range(1, 4096)]
Loops = Annotated[int, Range(1, 1024)]
Width = Annotated[int, Range(1, 2**20)]
Vocab = Annotated[int, Range(1, 2**24)]
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(above=0)]
PositiveOrZero = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]


class InputError(ValueError):
    """Unusable input; the message names it and states what was expected, what was found and what to do."""


class ConfigError(InputError):
    """An unusable configuration; the message lists every error."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A looped transformer: a LoopLM if `gate` is "none", else a MELT. The defaults are Ouro-1.4B's."""

    vocab: Annotated[Vocab, "V, size of the vocabulary"] = 49152
    width: Annotated[Width, "D, the model width"] = 2048
    layers: Annotated[Layers, "L, layers"] = 24
    loops: Annotated[Loops, "T, passes over all layers"] = 4
    heads: Annotated[Width, "H, query heads"] = 16
    kv_heads: Annotated[Width, "K, key/value heads; a divisor of heads"] = 16
    head_width: Annotated[Width, "E, the width of a head; even"] = 128
    feed_forward: Annotated[Width, "F, the feed-forward width"] = 5632
    rope_theta: Annotated[Positive, "base of the rotary frequencies"] = 1e6
    rms_eps: Annotated[Positive, "added to the mean square in every norm"] = 1e-6
    max_positions: Annotated[Count, "longest sequence, in tokens"] = 65536
    tied: Annotated[bool, "the output head is the embedding matrix"] = False
    gate: Annotated[str, OneOf(GATES), "gate variant; none: a LoopLM"] = "none"
    first_loop: Annotated[str, OneOf(CHOICES["first_loop"]), "the first latent, as in student.first_loop"] = "copy"
    window: Annotated[CountOrZero, "W, tokens before a query that it sees through entries of its own loop"] = 0
    sweeps: Annotated[Count, "times that a chunk's loops run; from the second on they see final entries"] = 1
    exit_threshold: Annotated[PositiveOrZero, "cumulative exit probability that ends the loops; 1: loop T"] = 1.0
    guidance: Annotated[
        PositiveOrZero, "w of LoopCD: generation takes z_T + w (z_T − z_1), logits of loops; 0: off"
    ] = 0.0
    bos: Annotated[int | None, Range(0), "token id that begins a sequence, for config.json"] = None
    eos: Annotated[int | None, Range(0), "token id that ends a sequence, for config.json"] = None
    pad: Annotated[int | None, Range(0), "token id of padding, for config.json"] = None
    remat: Annotated[str, OneOf(CHOICES["remat"]), "what the backward pass recomputes, as in the run's remat"] = "none"
    attention: Annotated[str, OneOf(CHOICES["attention"]), "how cached entries are read, as in the run's attention"] = (
        "blocks"
    )
    attention_block: Annotated[Count, "cached slots whose attention scores are in memory at a time"] = 512
    unroll: Annotated[bool, "separate code for each loop, as in the run's unroll"] = False

    @property
    def group(self) -> int:
        """G = H/K, the query heads that share a key/value head."""
        return self.heads // self.kv_heads

    def sweeps_of(self, chunk: int) -> int:
        """The sweeps of a chunk of C tokens: from ⌈C/(W + 1)⌉ on a sweep changes nothing; a LoopLM needs one."""
        return 1 if self.gate == "none" else min(self.sweeps, -(-chunk // (self.window + 1)))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of the training sequences. The defaults suit the arithmetic task."""

    source: Annotated[str, OneOf(("tokens", "records", "arithmetic")), "a token file, prepared data, or problems"] = (
        "arithmetic"
    )
    path: Annotated[str, "tokens: a .npy or .npz file; records: a folder written by melt_jax.prepare"] = ""
    length: Annotated[int, Range(2), "tokens per sequence"] = 128
    batch: Annotated[Count, "sequences per step, over all devices"] = 16
    low: Annotated[Count, "arithmetic: fewest definitions per problem"] = 2
    high: Annotated[Count, "arithmetic: most definitions per problem"] = 5
    hops: Annotated[Count, "arithmetic: definitions per value that the steps state"] = 1
    score: Annotated[str, OneOf(("completion", "all")), "arithmetic: scored predictions"] = "completion"


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """The keys common to all phases."""

    steps: Annotated[Count, "optimizer updates"]
    learning_rate: Annotated[PositiveOrZero, "peak, of the backbone weights"]
    gate_learning_rate: Annotated[PositiveOrZero, "peak, of the gates"]
    warmup_steps: Annotated[CountOrZero, "updates of linear warm-up, before the cosine decay"]
    final_fraction: Annotated[Fraction, "last learning rate, as a fraction of the peak"]


@dataclasses.dataclass(frozen=True)
class PretrainingConfig(PhaseConfig):
    """A LoopLM from scratch: expected cross-entropy − bonus × exit entropy."""

    entropy_bonus: Annotated[PositiveOrZero, "nats of loss per nat of exit entropy"]
    init_std: Annotated[PositiveOrZero, "standard deviation of new weights"]
    embedding_std: Annotated[PositiveOrZero, "standard deviation of new embeddings"]


@dataclasses.dataclass(frozen=True)
class WarmStartConfig(PhaseConfig):
    """Before phase 1: each layer reads the teacher's stream; loss L_align, relative. Only the gates can be trained."""


@dataclasses.dataclass(frozen=True)
class TransitionConfig(PhaseConfig):
    """Phase 1: attention reads a blend of per-loop and shared KV entries; loss L_KD."""

    ramp: Annotated[float, Range(above=0, most=1), "α rises linearly from 0 at step 0 to 1 at step ramp · (steps − 1)"]


@dataclasses.dataclass(frozen=True)
class AlignmentConfig(PhaseConfig):
    """Phase 2: the shared cache alone; loss L_KD + β·L_align."""

    beta: Annotated[PositiveOrZero, "β, weight of the attention alignment"]
    reduction: Annotated[str, OneOf(CHOICES["reduction"]), "‖o − o_teacher‖², or divided by the mean of ‖o_teacher‖²"]


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """L_KD of both phases."""

    loops: Annotated[str, OneOf(CHOICES["distilled"]), "L_KD is the mean over all loops, or the last loop's KL"]
    divergence: Annotated[str, OneOf(CHOICES["divergence"]), "KL(teacher ‖ student), or the reverse"]
    gradient: Annotated[str, OneOf(CHOICES["gradient"]), "flows through all chunks, or stops at the chunk's start"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    b1: Annotated[Decay, "decay of the first moment"]
    b2: Annotated[Decay, "decay of the second moment"]
    eps: Annotated[Positive, "added to the root of the second moment"]
    weight_decay: Annotated[PositiveOrZero, "applied to matrices only, times the learning rate"]
    clip: Annotated[Positive, "global norm to which gradients are clipped"]


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """The MELT that the LoopLM becomes."""

    gate: Annotated[str, OneOf(GATES[1:]), "gate variant"]
    first_loop: Annotated[str, OneOf(CHOICES["first_loop"]), "copy: h¹ = u; gated: h⁰ = 0, gated at loop 1 too"]
    window: Annotated[CountOrZero, "W, tokens before a query that it sees through entries of its own loop"]
    sweeps: Annotated[Count, "times that a chunk's loops run; from the second on they see final entries"]
    gate_std: Annotated[PositiveOrZero, "standard deviation of new gate matrices"]
    gate_bias: Annotated[float, Range(-20, 20), "b_z of new gates; a positive bias keeps the old latent"]

    @property
    def changes(self) -> dict[str, Any]:
        """The fields of the student's `ModelConfig` that differ from the LoopLM's."""
        return {name: getattr(self, name) for name in ("gate", "first_loop", "window", "sweeps")}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis: factors within a slice (ICI) and over slices (DCN)."""

    replica: Annotated[CountOrZero, "copies of weights and optimizer state; they split the batch; 0: the rest"] = 1
    fsdp: Annotated[CountOrZero, "parts of weights and optimizer state; they split the batch too; 0: the rest"] = 0
    tensor: Annotated[CountOrZero, "parts of heads, feed-forward, vocabulary, latents and KV; 0: the rest"] = 1
    replica_slices: Annotated[Count, "slices (DCN) along replica"] = 1
    fsdp_slices: Annotated[Count, "slices (DCN) along fsdp"] = 1


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Measurements at the end of each phase."""

    problems: Annotated[CountOrZero, "arithmetic problems to answer; 0: none"]
    sequences: Annotated[CountOrZero, "sequences on which the KL to the teacher is measured; 0: none"]
    decoding_tokens: Annotated[CountOrZero, "leading tokens of each sequence on which decoding is measured; 0: none"]
    path: Annotated[str, "tokens, records: held-out sequences, with the source and length of data"]
    seed: Annotated[Seed, "of the problems and the sequences"]
    baselines: Annotated[bool, "also measure the teacher, and the teacher with one shared KV entry, untrained"]
    sample: Annotated[bool, "print one worked answer"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Monitoring, which does not affect results."""

    skipped_limit: Annotated[Count, "consecutive skipped (non-finite) steps that stop the run"]
    stall_seconds: Annotated[PositiveOrZero, "seconds without a finished step before all stacks are logged; 0: never"]
    stall_first_seconds: Annotated[PositiveOrZero, "the same for the first step, which compiles; 0: never"]
    stall_exits: Annotated[bool, "exit with status 76 after a stall, so that a launcher restarts the run"]
    lost_seconds: Annotated[Count, "seconds without a sign of life of a process after which JAX ends the others"]
    profile_start: Annotated[CountOrZero, "first step of each phase to profile, from 1; 0: none"]
    profile_steps: Annotated[Count, "steps to profile"]
    wandb: Annotated[str, "Weights & Biases project, or entity/project, that gets the log too; empty: none"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run."""

    seed: Annotated[Seed, "of new weights and data; step n's batch is a function of (seed, n)"]
    phases: Annotated[WORDS, OneOf(PHASES), "run in this order, or pretraining alone"]
    teacher: Annotated[
        str, "the LoopLM: a folder in either form, or a model of the hub; the student starts from it too"
    ]
    tokenizer: Annotated[
        str, "whose files to save with the weights, a folder or a model of the hub; empty: the teacher's"
    ]
    model: ModelConfig
    student: StudentConfig
    chunk_size: Annotated[Count, "C, tokens that run in parallel"]
    dtype: Annotated[str, OneOf(CHOICES["dtype"]), "of computation and teacher; optimizer state is float32"]
    remat: Annotated[str, OneOf(CHOICES["remat"]), "backward keeps all but scores, products, or layer inputs"]
    attention: Annotated[str, OneOf(CHOICES["attention"]), "attention is compiled by XLA or runs in kernels for TPUs"]
    attention_block: Annotated[Count, "cached slots whose attention scores are in memory at a time"]
    unroll: Annotated[bool, "separate code for each of the T loops: less memory traffic, slower to compile"]
    micro_batches: Annotated[Count, "sequential parts of a batch, whose gradients are summed; divides data.batch"]
    gather: Annotated[str, OneOf(CHOICES["gather"]), "when weights are gathered over fsdp: once a step or at each use"]
    compiler_options: Annotated[str, OneOf(CHOICES["compiler_options"]), "TPU compiler options of a step"]
    mesh: MeshConfig
    data: DataConfig
    pretraining: PretrainingConfig
    warm_start: WarmStartConfig
    transition: TransitionConfig
    alignment: AlignmentConfig
    distillation: DistillationConfig
    optimizer: OptimizerConfig
    log_every: Annotated[Count, "steps between log lines; the first step is logged too"]
    checkpoint_every: Annotated[Count, "steps between checkpoints; a phase's last step is always saved"]
    checkpoints_kept: Annotated[Count, "newest checkpoints of a phase to keep"]
    run: RunConfig
    evaluation: EvaluationConfig

    @property
    def computation(self) -> dict[str, Any]:
        """The fields of a `ModelConfig` that select how teacher and student are computed, not what."""
        return {name: getattr(self, name) for name in ("attention", "attention_block", "unroll")}

    def phase(self, name: str) -> Any:
        """The `PhaseConfig` of a phase."""
        return getattr(self, name)


KEYS: dict[str, Key] = keys_of(TrainConfig)


# ---- contradictions between keys: generators of messages, from {key: value} without the keys that have an error


def _phases_are_in_order(values):
    order = [PHASES.index(name) for name in values["phases"]]
    if not order or order != sorted(set(order)) or (order[0] == 0 and len(order) > 1):
        wanted = "some of warm_start, transition, alignment in this order, or pretraining alone"
        yield f"phases: expected {wanted}, found {values['phases']}"


def _teacher_is_given(values):
    if values["phases"] != ("pretraining",) and not values["teacher"]:
        yield "teacher: expected the folder of a LoopLM checkpoint, or a model of the hub, found ''"


def _pretraining_makes_a_looplm(values):
    if values["phases"] == ("pretraining",) and values["model.gate"] != "none":
        yield f"model.gate: expected 'none', because pretraining trains a LoopLM, found {values['model.gate']!r}"


def _run_sets_the_computation(values):
    for name in ("remat", "attention", "attention_block", "unroll"):
        default = KEYS[f"model.{name}"].default
        if name in values and (value := values[f"model.{name}"]) != default:
            yield f"model.{name}: expected {default!r}, because the key {name} sets it, found {value!r}"


def _first_loop_fits_the_gate(values):
    yield from first_loop_errors(values["student.gate"], values["student.first_loop"], "student.")


def _gathered_weights_are_recomputed(values):
    if (values["gather"], values["remat"]) == ("layer", "none"):
        yield "remat: expected 'products' or 'layer' with gather 'layer', to free gathered weights, found 'none'"


def _micro_batches_divide_the_batch(values):
    batch, parts = values["data.batch"], values["micro_batches"]
    if batch % parts:
        yield f"micro_batches: expected a divisor of data.batch, {batch}, found {parts}"


def _warmup_ends_within_the_phase(values):
    for name in values["phases"]:
        warmup, steps = values[f"{name}.warmup_steps"], values[f"{name}.steps"]
        if warmup > steps:
            yield f"{name}.warmup_steps: expected at most {name}.steps, {steps}, found {warmup}"


def _kv_heads_divide_heads(values):
    heads, kv_heads = values["model.heads"], values["model.kv_heads"]
    if heads % kv_heads:
        yield f"model.kv_heads: expected a divisor of heads, {heads}, found {kv_heads}"


def _head_width_is_even(values):
    if values["model.head_width"] % 2:
        found = values["model.head_width"]
        yield f"model.head_width: expected an even number, because RoPE pairs components, found {found}"


def _warm_start_trains_gates(values):
    if "warm_start" not in values["phases"]:
        return
    if (gate := values["student.gate"]) not in TRAINED_GATES:
        yield f"phases: expected no warm_start with the gate {gate!r}, which has no weights, found {values['phases']}"
    if rate := values["warm_start.learning_rate"]:
        yield f"warm_start.learning_rate: expected 0.0, because only the gates are trained, found {rate}"


def _gate_with_a_bias_has_weights(values):
    gate, bias = values["student.gate"], values["student.gate_bias"]
    if bias and gate not in TRAINED_GATES:
        yield f"student.gate_bias: expected 0.0 with the gate {gate!r}, which has no weights, found {bias}"


def _guidance_has_two_loops(values):
    loops, threshold = values["model.loops"], values["model.exit_threshold"]
    if (guidance := values["model.guidance"]) and loops == 1:
        yield f"model.guidance: expected 0 with one loop, found {guidance}"
    if guidance and threshold < 1:
        yield f"model.guidance: expected 0 with an early exit (exit_threshold {threshold}), found {guidance}"


CHECKS = (
    _phases_are_in_order,
    _teacher_is_given,
    _pretraining_makes_a_looplm,
    _run_sets_the_computation,
    _first_loop_fits_the_gate,
    _gathered_weights_are_recomputed,
    _micro_batches_divide_the_batch,
    _warmup_ends_within_the_phase,
    _kv_heads_divide_heads,
    _head_width_is_even,
    _warm_start_trains_gates,
    _gate_with_a_bias_has_weights,
    _guidance_has_two_loops,
)


def first_loop_errors(gate: str, first_loop: str, prefix: str = "") -> list[str]:
    """Errors if a MELT with `gate` cannot use `first_loop`: a list of messages."""
    if first_loop == "copy" or gate == "elementwise":
        return []
    return [f"{prefix}first_loop: expected 'copy' unless the gate is elementwise, found {first_loop!r}"]


# ---- whole configurations


def freeze(config: "ConfigDict") -> TrainConfig:
    """The `TrainConfig` of a ConfigDict.

    Raises:
      ConfigError: lists every unknown or missing key, wrong type, invalid value and contradiction.
    """
    given, errors = _flatten(config.to_dict()), []
    groups = {name.split(".")[0] for name in KEYS if "." in name}
    for name, value in given.items():
        if name in groups:
            errors.append(f"{name}: expected a group of keys, found {value!r:.100}")
        elif name not in KEYS:
            errors.append(f"{name}: unknown key{_suggestion(name)}")
    keys = {name: key for name, key in KEYS.items() if name.split(".")[0] not in groups & given.keys()}
    values = {name: key.convert(given.get(name, key.default)) for name, key in keys.items()}
    errors += _errors(keys, values)
    if errors:
        raise ConfigError("the configuration has errors:\n" + "\n".join(f"  - {line}" for line in errors))
    return _assemble(TrainConfig, values)


def model_errors(model: ModelConfig, prefix: str = "") -> list[str]:
    """Every invalid value and contradiction of a `ModelConfig`: a list of messages."""
    keys = keys_of(ModelConfig, "model.")
    values = {name: getattr(model, name.removeprefix("model.")) for name in keys}
    return [prefix + line.removeprefix("model.") for line in _errors(keys, values)]


def _errors(keys, values):
    """The errors of each value, then the contradictions between the values that have none."""
    errors = {name: error for name, key in keys.items() if (error := key.error(values[name]))}
    usable = {name: value for name, value in values.items() if name not in errors}
    messages = [f"{name}: {error}" for name, error in errors.items()]
    for check in CHECKS:
        with contextlib.suppress(KeyError):  # a key that the check reads has an error, or is not in `keys`
            messages += check(usable)
    return messages


def _suggestion(name):
    """The end of an error about an unknown key: the keys that may have been meant."""
    last = name.split(".")[-1]
    near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.85)
    near = near or [key for key in KEYS if key.split(".")[-1] == last] or difflib.get_close_matches(name, KEYS, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _flatten(values, prefix=""):
    """{"group.key": value} of nested dicts."""
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _assemble(config_class, values, prefix=""):
    """A config class from {"group.key": value}."""
    arguments = {}
    for field in dataclasses.fields(config_class):
        name = f"{prefix}{field.name}"
        group = dataclasses.is_dataclass(field.type)
        arguments[field.name] = _assemble(field.type, values, f"{name}.") if group else values[name]
    return config_class(**arguments)
