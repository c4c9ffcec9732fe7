"""config.json of published checkpoints, read strictly and written back.

Every key is accounted for: it becomes a field of `ModelConfig`, must have the only value that this model supports, or
is known not to affect the computation. Any other key is an error, because ignoring it could change what is computed.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from melt_jax.config import CHOICES, GATES, InputError, ModelConfig
from melt_jax.config_keys import keys_of
from melt_jax.files import PathLike, as_path, completeness_errors, copy_file, read_json, write_text

STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors code: name
DTYPES = tuple(STORED_DTYPES.values())
ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
MODEL_CODE = ("configuration_melt.py", "cache_melt.py", "modeling_melt.py")  # of a published folder
ARCHITECTURES = {"ouro": "OuroForCausalLM", "melt": "MeltForCausalLM"}

CONFIG_KEYS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "total_ut_steps": "loops",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "feed_forward",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_eps",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tied",
    "early_exit_threshold": "exit_threshold",
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
}
OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "early_exit_threshold")
OPTIONAL += ("bos_token_id", "eos_token_id", "pad_token_id")
MODEL_KEYS = {"gate": "elementwise", "first_loop": "copy", "window": 0, "sweeps": 1}  # of a MELT, and the defaults
MELT_KEYS = (*MODEL_KEYS, "chunk_size")  # only in a MELT's config; chunk_size: tokens of a training chunk

# Keys and the values that this model supports; an absent key means the first.
ONLY_VALUES = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
    "use_sliding_window": (False, None),
}

# Keys that describe files, libraries or training and do not affect the computation.
HARMLESS = frozenset(
    "model_type architectures auto_map torch_dtype dtype transformers_version _name_or_path initializer_range "
    "use_cache max_window_layers sliding_window layer_types output_attentions output_hidden_states return_dict "
    "id2label label2id chunk_size_feed_forward is_encoder_decoder problem_type unk_token_id "
    "_attn_implementation_autoset".split()
)


def raise_errors(subject: object, errors: Iterable[str]) -> None:
    """Raises one `InputError` that lists all errors of `subject`; does nothing if there are none."""
    if errors := list(errors):
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise InputError(f"{subject}: {count}\n" + "\n".join(f"  - {error}" for error in errors))


def read_raw_config(folder: PathLike) -> dict[str, Any]:
    """The dict in a folder's config.json, in its key order.

    Raises:
      InputError: the file is missing or holds no JSON object.
    """
    file = as_path(folder) / "config.json"
    raise_errors(folder, completeness_errors(file.parent))
    if not file.is_file():
        raise InputError(
            f"{file}: expected a model checkpoint, published or written by melt_jax.convert, found no such file"
        )
    return read_json(file)


def read_config(folder: PathLike) -> ModelConfig:
    """The model's config from a folder's config.json.

    Raises:
      InputError: as in `read_raw_config` and `parse_config`.
    """
    return parse_config(read_raw_config(folder), as_path(folder) / "config.json")


def parse_config(raw: dict[str, Any], subject: object = "config.json") -> ModelConfig:
    """The model's config from the dict of a published config.json.

    Args:
      raw: the dict.
      subject: its name in errors.

    Raises:
      InputError: lists all missing keys, unknown keys, invalid values and values that this model does not support.
    """
    raw = _with_rope_theta(raw)
    fields = {ours: raw[theirs] for theirs, ours in CONFIG_KEYS.items() if raw.get(theirs) is not None}
    missing = [key for key in CONFIG_KEYS if key not in OPTIONAL and raw.get(key) is None]
    errors = [f"{key}: expected a value, found none" for key in missing]
    for find in (_type_errors, _only_value_errors, _dtype_errors, _rope_errors, _melt_key_errors, _unknown_key_errors):
        errors += find(raw)
    if not errors:
        fields.setdefault("kv_heads", fields["heads"])
        fields.setdefault("head_width", fields["width"] // fields["heads"])
        errors += _size_errors(fields)
    raise_errors(subject, errors)
    if raw["model_type"] == "melt":
        fields |= {key: raw.get(key, default) for key, default in MODEL_KEYS.items()}
    else:
        fields["gate"] = "none"
    return ModelConfig(**fields)


def published_config(
    config: ModelConfig, dtype: str, source: dict[str, Any] | None = None, chunk_size: int | None = None
) -> dict[str, Any]:
    """The dict to write as config.json.

    Args:
      config: the model's config.
      dtype: name of the stored weights' dtype.
      source: the config.json that the model came from. If it already describes `config`, it is kept; otherwise only its
        harmless keys are.
      chunk_size: tokens of the chunk that a MELT was trained with; None: as in `source`.
    """
    raw = dict(source or {})
    of_a_run = ("remat", "attention", "attention_block", "unroll", "guidance")  # not stored
    config = dataclasses.replace(config, **{name: getattr(ModelConfig, name) for name in of_a_run})
    if source is None or parse_config(source) != config:
        raw = _describe(raw, config)
    if chunk_size is not None and config.gate != "none":
        raw["chunk_size"] = chunk_size
    for key in [key for key in ("torch_dtype", "dtype") if key in raw] or ["torch_dtype"]:
        raw[key] = str(dtype)
    raw.pop("auto_map", None)  # `add_model_code` names the code of a published folder
    return raw


def add_model_code(folder: PathLike, raw: dict[str, Any]) -> dict[str, Any]:
    """Copies the PyTorch code of the model into a published folder; returns config.json's dict with its `auto_map`."""
    for name in MODEL_CODE:
        copy_file(ASSETS / name, as_path(folder) / name)
    name = {"ouro": "Ouro", "melt": "Melt"}[raw["model_type"]]
    auto_map = {
        "AutoConfig": f"configuration_melt.{name}Config",
        "AutoModel": f"modeling_melt.{name}Model",
        "AutoModelForCausalLM": f"modeling_melt.{name}ForCausalLM",
    }
    return {**raw, "auto_map": auto_map}


def write_config(folder: PathLike, raw: dict[str, Any]) -> None:
    """Writes config.json. It comes last: without it a folder is not a model folder."""
    write_text(as_path(folder) / "config.json", json.dumps(raw, indent=2) + "\n")


def _describe(raw, config):
    """The dict, changed so that it describes `config`."""
    kind = "ouro" if config.gate == "none" else "melt"
    if raw.get("model_type") != kind:
        raw |= {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    raw |= {key: getattr(config, field) for key, field in CONFIG_KEYS.items()}
    stale = ("rope_parameters", *(MELT_KEYS if kind == "ouro" else ()))
    raw = {key: value for key, value in raw.items() if key not in stale}
    raw |= {"hidden_act": "silu"}
    if raw.get("layer_types") is not None:
        raw["layer_types"] = ["full_attention"] * config.layers
    if kind == "melt":
        raw |= {key: getattr(config, key) for key in MODEL_KEYS}
    return raw


def _with_rope_theta(raw):
    """The dict with `rope_theta` copied from `rope_parameters` (where newer libraries write it) if it is missing."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_theta") is None:
        return raw
    return {**raw, "rope_theta": rope["rope_theta"]} if raw.get("rope_theta") is None else raw


def _rope_errors(raw):
    rope = raw.get("rope_parameters")
    if rope is None:
        return []
    default = isinstance(rope, dict) and set(rope) <= {"rope_theta", "rope_type"}
    if not default or rope.get("rope_type", "default") != "default":
        return [f"rope_parameters: expected {{'rope_type': 'default', 'rope_theta': …}}, found {rope!r}"]
    if rope.get("rope_theta", raw.get("rope_theta")) != raw.get("rope_theta"):
        return [f"rope_parameters: expected rope_theta as in the key rope_theta, {raw['rope_theta']!r}, found {rope!r}"]
    return []


def _type_errors(raw):
    errors = []
    for key, field in CONFIG_KEYS.items():
        value = raw.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if field == "tied":
            good, expected = isinstance(value, bool), "true or false"
        elif field in ("rope_theta", "rms_eps", "exit_threshold"):
            low = "0 or more" if field == "exit_threshold" else "above 0"
            good = number and math.isfinite(value) and (value > 0 or (value == 0 and field == "exit_threshold"))
            expected = f"a number, {low}"
        else:
            low = 0 if field in ("bos", "eos", "pad") else 1
            good, expected = number and isinstance(value, int) and value >= low, f"an integer, {low} or more"
        limit: Any = keys_of(ModelConfig)[field].limit
        if not good:
            errors.append(f"{key}: expected {expected}, found {value!r:.100}")
        elif limit and (expected := limit.expected(value)):
            errors.append(f"{key}: expected {expected}, found {value!r:.100}")
    return errors


def _only_value_errors(raw):
    errors = []
    for key, values in ONLY_VALUES.items():
        if raw.get(key, values[0]) not in values:
            errors.append(f"{key}: expected {values[0]!r}, the only value supported, found {raw[key]!r}")
    if raw.get("sliding_window") is not None and "use_sliding_window" not in raw:
        errors.append(f"sliding_window: expected null, the only value supported, found {raw['sliding_window']!r}")
    types, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    full = isinstance(types, list) and all(kind == "full_attention" for kind in types)
    if types is not None and not (full and (len(types) == layers or not isinstance(layers, int))):
        errors.append(f"layer_types: expected full_attention for each of the num_hidden_layers, found {types!r}")
    kind = raw.get("model_type")
    if kind not in tuple(ARCHITECTURES):  # a tuple: a list, for example, is not hashable
        errors.append(f"model_type: expected 'ouro' or 'melt', found {kind!r}")
    return errors


def _dtype_errors(raw):
    dtypes = {key: raw[key] for key in ("torch_dtype", "dtype") if raw.get(key) is not None}
    errors = [
        f"{key}: expected one of {', '.join(DTYPES)}, found {value!r}"
        for key, value in dtypes.items()
        if value not in DTYPES
    ]
    if len(set(map(str, dtypes.values()))) > 1:
        errors.append(f"dtype: expected that of torch_dtype, {dtypes['torch_dtype']!r}, found {dtypes['dtype']!r}")
    return errors


def _melt_key_errors(raw):
    own = [key for key in MELT_KEYS if key in raw]
    if raw.get("model_type") == "ouro":
        return [f"{key}: expected no such key with model_type 'ouro', found {raw[key]!r}" for key in own]
    errors = []
    for key, values in (("gate", GATES[1:]), ("first_loop", CHOICES["first_loop"])):
        if key in own and raw[key] not in values:
            errors.append(f"{key}: expected one of {', '.join(values)}, found {raw[key]!r}")
    for key, least in (("window", 0), ("sweeps", 1), ("chunk_size", 1)):
        if key in own and (type(raw[key]) is not int or raw[key] < least):
            errors.append(f"{key}: expected an integer, {least} or more, found {raw[key]!r}")
    return errors


def _unknown_key_errors(raw):
    known = {*CONFIG_KEYS, *ONLY_VALUES, *HARMLESS, *MELT_KEYS, "rope_parameters"}
    return [
        f"{key}: expected only keys that melt_jax supports, found {value!r}"
        for key, value in raw.items()
        if key not in known
    ]


def _size_errors(fields):
    errors = []
    heads, kv_heads = fields["heads"], fields["kv_heads"]
    if heads % kv_heads:
        errors.append(f"num_key_value_heads: expected a divisor of num_attention_heads, {heads}, found {kv_heads}")
    if fields["head_width"] % 2 or fields["head_width"] == 0:
        errors.append(f"head_dim: expected an even number, because RoPE pairs components, found {fields['head_width']}")
    for name in ("bos", "eos", "pad"):
        if fields.get(name, 0) >= fields["vocab"]:
            errors.append(f"{name}_token_id: expected an id below vocab_size, {fields['vocab']}, found {fields[name]}")
    return errors
