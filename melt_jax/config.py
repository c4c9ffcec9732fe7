"""Frozen configurations, made from a ConfigDict once, at the door, and checked there."""

import dataclasses
import difflib
import math


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A looped transformer: Ouro's LoopLM when `gate` is "none", MELT otherwise. Defaults are Ouro-1.4B's.

    Attributes:
      vocab: V.
      width: D, the model width.
      layers: L.
      loops: T, passes over all layers.
      heads: H, query heads.
      kv_heads: K; divides H.
      head_width: E; need not be D/H.
      feed_forward: F.
      rope_theta: the base of RoPE's frequencies.
      rms_eps: added to the mean square in every norm.
      max_positions: the longest sequence, in tokens.
      tied: the head is the embedding.
      gate: "none", or a gate variant: elementwise, scalar, mean, ema, last.
      first_loop: "copy" (h¹ = u) or "gated" (h⁰ = 0, the gate applied at loop 1 too).
      exit_threshold: cumulative exit probability at which generation takes a loop's output; 1 is the last loop.
      bos, eos, pad: token ids, None where there is none.
      remat: what the backward pass recomputes of a layer. "none": attention scores alone; "products": all but products
        with weights and the outcome of attention; "layer": all but the outcome of attention.
      attention_block: cached slots whose attention scores exist at a time.
    """

    vocab: int = 49152
    width: int = 2048
    layers: int = 24
    loops: int = 4
    heads: int = 16
    kv_heads: int = 16
    head_width: int = 128
    feed_forward: int = 5632
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    max_positions: int = 65536
    tied: bool = False
    gate: str = "none"
    first_loop: str = "copy"
    exit_threshold: float = 1.0
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    remat: str = "none"
    attention_block: int = 512

    @property
    def group(self):
        """G = H/K, the query heads that share a key/value head."""
        return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where training sequences come from (`configs/base.py`, data)."""

    source: str = "arithmetic"
    path: str = ""
    length: int = 128
    batch: int = 16
    low: int = 2
    high: int = 5
    score: str = "completion"


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """What every phase has (`configs/base.py`)."""

    steps: int
    learning_rate: float
    gate_learning_rate: float
    warmup_steps: int
    final_fraction: float


@dataclasses.dataclass(frozen=True)
class PretrainingConfig(PhaseConfig):
    """Ouro's objective from scratch."""

    entropy_bonus: float
    init_std: float
    embedding_std: float


@dataclasses.dataclass(frozen=True)
class TransitionConfig(PhaseConfig):
    """Phase 1."""

    ramp: float


@dataclasses.dataclass(frozen=True)
class AlignmentConfig(PhaseConfig):
    """Phase 2."""

    beta: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """How a LoopLM becomes a MELT."""

    gate: str
    first_loop: str
    gate_std: float


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out: factors within a slice (ICI), and over slices (DCN). 0: what is left."""

    replica: int = 1
    fsdp: int = 0
    tensor: int = 1
    replica_slices: int = 1
    fsdp_slices: int = 1


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured at the end of a phase."""

    problems: int
    sequences: int
    path: str
    seed: int
    sample: bool


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a run is watched: nothing that it computes depends on it."""

    skipped_limit: int
    stall_seconds: float
    stall_first_seconds: float
    stall_exits: bool
    profile_start: int
    profile_steps: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run; every key is explained in `configs/base.py`."""

    seed: int
    phases: tuple
    teacher: str
    tokenizer: str
    model: ModelConfig
    student: StudentConfig
    chunk_size: int
    dtype: str
    remat: str
    attention_block: int
    micro_batches: int
    gather: str
    mesh: MeshConfig
    data: DataConfig
    pretraining: PretrainingConfig
    transition: TransitionConfig
    alignment: AlignmentConfig
    optimizer: OptimizerConfig
    log_every: int
    checkpoint_every: int
    checkpoints_kept: int
    run: RunConfig
    evaluation: EvaluationConfig

    def phase(self, name):
        """The settings of a phase."""
        return getattr(self, name)


PHASES = ("pretraining", "transition", "alignment")
GATES = ("none", "elementwise", "scalar", "mean", "ema", "last")
CHOICES = {
    "gate": GATES,
    "first_loop": ("copy", "gated"),
    "remat": ("none", "products", "layer"),
    "dtype": ("float32", "bfloat16"),
    "gather": ("step", "layer"),
}


class InputError(ValueError):
    """Input that cannot be used: the message names it, what was expected, what was found and what to do."""


class ConfigError(InputError):
    """A configuration that cannot be run; the message lists every problem found."""


def freeze(config):
    """A `TrainConfig` from a ConfigDict, checked.

    Raises:
      ConfigError: lists every unknown key, impossible value and contradiction; where a key is missing or has a value
        of another type, those instead of the values.
    """
    found = []
    frozen = _convert(TrainConfig, config.to_dict(), "", found)
    if frozen is not None:  # every key has a value of its type
        found += config_errors(frozen)
    if found:
        raise ConfigError("the configuration has problems:\n" + "\n".join(f"  - {line}" for line in found))
    return frozen


def config_errors(config):
    """Every impossible value and contradiction of a `TrainConfig`: a list of messages."""
    found = []

    def need(ok, key, expected, value):
        if not ok:
            found.append(f"{key}: expected {expected}, found {value!r}")

    unknown = [name for name in config.phases if name not in PHASES]
    need(config.phases and not unknown, "phases", f"some of {PHASES}", config.phases)
    order = [PHASES.index(name) for name in config.phases if name in PHASES]
    need(order == sorted(set(order)), "phases", "each once, in the order transition, alignment", config.phases)
    if "pretraining" in config.phases:
        need(len(config.phases) == 1, "phases", "pretraining alone: it makes a teacher from scratch", config.phases)
        found += model_errors(config.model, "model.")
        need(config.model.gate == "none", "model.gate", "'none': pre-training makes a LoopLM", config.model.gate)
    else:
        need(config.teacher, "teacher", "the folder of a LoopLM checkpoint", config.teacher)
        need(
            config.student.gate != "none", "student.gate", "a gate variant: the student is a MELT", config.student.gate
        )
    for key in ("gate", "first_loop"):
        value = getattr(config.student, key)
        need(value in CHOICES[key], f"student.{key}", f"one of {CHOICES[key]}", value)
    found += first_loop_errors(config.student.gate, config.student.first_loop, "student.")
    for key in ("dtype", "remat", "gather"):
        need(getattr(config, key) in CHOICES[key], key, f"one of {CHOICES[key]}", getattr(config, key))
    for key in ("chunk_size", "attention_block", "micro_batches", "log_every", "checkpoint_every", "checkpoints_kept"):
        need(getattr(config, key) >= 1, key, "at least 1", getattr(config, key))
    need((config.gather, config.remat) != ("layer", "none"), "remat",
         "'products' or 'layer' with gather 'layer': 'none' keeps every gathered weight", config.remat)  # fmt: skip
    for key, factor in dataclasses.asdict(config.mesh).items():
        need(factor >= (1 if key.endswith("_slices") else 0), f"mesh.{key}", "a number of devices", factor)
    for key, seed in (("seed", config.seed), ("evaluation.seed", config.evaluation.seed)):
        need(0 <= seed < 2**32, key, "in [0, 2³²)", seed)
    need(0 <= config.student.gate_std < math.inf, "student.gate_std", "at least 0", config.student.gate_std)
    need(config.data.batch % max(config.micro_batches, 1) == 0, "micro_batches",
         f"a divisor of data.batch, {config.data.batch}", config.micro_batches)  # fmt: skip
    for name in config.phases:
        if name in PHASES:
            _phase_errors(name, config.phase(name), need)
    optimizer = config.optimizer
    for key in ("b1", "b2"):
        need(0 <= getattr(optimizer, key) < 1, f"optimizer.{key}", "in [0, 1)", getattr(optimizer, key))
    need(0 < optimizer.eps < math.inf, "optimizer.eps", "above 0", optimizer.eps)
    need(optimizer.clip > 0, "optimizer.clip", "above 0", optimizer.clip)
    need(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", "at least 0", optimizer.weight_decay)
    for key, least in (("skipped_limit", 1), ("stall_seconds", 0), ("stall_first_seconds", 0), ("profile_start", 0),
                       ("profile_steps", 1)):  # fmt: skip
        need(getattr(config.run, key) >= least, f"run.{key}", f"at least {least}", getattr(config.run, key))
    need(config.evaluation.problems >= 0, "evaluation.problems", "at least 0", config.evaluation.problems)
    need(config.evaluation.sequences >= 0, "evaluation.sequences", "at least 0", config.evaluation.sequences)
    need(config.evaluation.seed != config.seed, "evaluation.seed", "other than seed, which training uses", config.seed)
    return found


def first_loop_errors(gate, first_loop, prefix=""):
    """Why a MELT of that gate is not made with that first loop: a list of messages."""
    if first_loop == "copy" or gate == "elementwise":
        return []
    return [f"{prefix}first_loop: expected 'copy', unless the gate is elementwise, found {first_loop!r}"]


def model_errors(model, prefix=""):
    """Every impossible value of a `ModelConfig`: a list of messages."""
    found = []
    for key in (
        "vocab",
        "width",
        "layers",
        "loops",
        "heads",
        "kv_heads",
        "head_width",
        "feed_forward",
        "max_positions",
        "attention_block",
    ):
        if getattr(model, key) < 1:
            found.append(f"{prefix}{key}: expected at least 1, found {getattr(model, key)}")
    if model.kv_heads >= 1 and model.heads % model.kv_heads:
        found.append(f"{prefix}kv_heads: expected a divisor of heads, {model.heads}, found {model.kv_heads}")
    if model.head_width % 2:
        found.append(f"{prefix}head_width: expected an even number (RoPE pairs components), found {model.head_width}")
    for key in ("rope_theta", "rms_eps"):
        if getattr(model, key) <= 0:
            found.append(f"{prefix}{key}: expected above 0, found {getattr(model, key)}")
    for key in ("gate", "first_loop", "remat"):
        if getattr(model, key) not in CHOICES[key]:
            found.append(f"{prefix}{key}: expected one of {CHOICES[key]}, found {getattr(model, key)!r}")
    return found


def _phase_errors(name, phase, need):
    need(phase.steps >= 1, f"{name}.steps", "at least 1", phase.steps)
    need(
        0 <= phase.warmup_steps <= phase.steps,
        f"{name}.warmup_steps",
        f"between 0 and steps, {phase.steps}",
        phase.warmup_steps,
    )
    for key in ("learning_rate", "gate_learning_rate"):
        need(0 <= getattr(phase, key) < math.inf, f"{name}.{key}", "at least 0", getattr(phase, key))
    need(0 <= phase.final_fraction <= 1, f"{name}.final_fraction", "in [0, 1]", phase.final_fraction)
    if name == "transition":
        need(0 < phase.ramp <= 1, "transition.ramp", "in (0, 1]", phase.ramp)
    if name == "alignment":
        need(0 <= phase.beta < math.inf, "alignment.beta", "at least 0", phase.beta)
    if name == "pretraining":
        for key in ("init_std", "embedding_std", "entropy_bonus"):
            need(0 <= getattr(phase, key) < math.inf, f"{name}.{key}", "at least 0", getattr(phase, key))


def _convert(cls, values, prefix, found):
    """A dataclass from a dict; appends what is wrong to `found`. None where a field has no value of its type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            found.append(f"{prefix}{key}: unknown key" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
    out = {}
    for key, field in fields.items():
        name = f"{prefix}{key}"
        if key not in values:
            if field.default is dataclasses.MISSING:
                found.append(f"{name}: missing")
            else:
                out[key] = field.default
        elif not dataclasses.is_dataclass(field.type):
            try:
                out[key] = _typed(field.type, values[key])
            except TypeError as error:
                found.append(f"{name}: {error}")
        elif not isinstance(values[key], dict):
            found.append(f"{name}: expected a group of keys, found {values[key]!r}")
        elif (group := _convert(field.type, values[key], f"{name}.", found)) is not None:
            out[key] = group
    return cls(**out) if len(out) == len(fields) else None


def _typed(kind, value):
    """The value as that type, where nothing is lost; else TypeError."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise TypeError(f"expected {getattr(kind, '__name__', kind)}, found {value!r}")
    return value
