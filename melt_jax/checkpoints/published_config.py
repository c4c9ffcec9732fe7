"""config.json: what a published checkpoint says of its model, read strictly and written back.

Every key is accounted for: it becomes a field of `ModelConfig`, must have the only value that this model computes, or
is known to change nothing. Whatever else stands in the file is an error: ignoring it could compute something else.
"""

import dataclasses
import json
import math
import pathlib

from melt_jax.config import CHOICES, GATES, ModelConfig

STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of weights, by their names in safetensors
DTYPES = tuple(STORED_DTYPES.values())
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
MELT_KEYS = ("gate", "first_loop", "chunk_size")  # a MELT's own; chunk_size: tokens of the chunk of its training

# Keys with the values that this model computes; an absent key means the first.
ONLY_VALUES = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
    "use_sliding_window": (False, None),
}

# Keys that say something of a file, of a library or of training, and nothing of what is computed.
HARMLESS = frozenset(
    "model_type architectures auto_map torch_dtype dtype transformers_version _name_or_path initializer_range "
    "use_cache max_window_layers sliding_window layer_types output_attentions output_hidden_states return_dict "
    "id2label label2id chunk_size_feed_forward is_encoder_decoder problem_type unk_token_id "
    "_attn_implementation_autoset".split()
)


def fail(subject, errors):
    """Raises one ValueError that lists every problem of `subject`; does nothing when there is none."""
    if errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise ValueError(f"{subject}: {count}\n" + "\n".join(f"  - {error}" for error in errors))


def read_raw_config(folder):
    """The dict in a folder's config.json, key order kept. ValueError: it is absent or is no JSON object."""
    file = pathlib.Path(folder) / "config.json"
    if not file.is_file():
        fail(folder, ["config.json is missing: expected a model checkpoint, published or made by melt_jax.convert"])
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        fail(file, [f"not JSON: {error}"])
    if not isinstance(raw, dict):
        fail(file, [f"expected an object, found {type(raw).__name__}"])
    return raw


def read_config(folder):
    """`ModelConfig` from a folder's config.json; ValueError lists everything in it that this model does not have."""
    return parse_config(read_raw_config(folder), pathlib.Path(folder) / "config.json")


def parse_config(raw, subject="config.json"):
    """`ModelConfig` of a published config.

    Args:
      raw: the dict.
      subject: names it in errors.

    Raises:
      ValueError: all missing keys, unknown keys, impossible values and values that this model does not compute.
    """
    raw = _with_rope_theta(raw)
    fields = {ours: raw[theirs] for theirs, ours in CONFIG_KEYS.items() if raw.get(theirs) is not None}
    missing = [key for key in CONFIG_KEYS if key not in OPTIONAL and raw.get(key) is None]
    errors = [f"{key} is missing" for key in missing]
    for find in (_type_errors, _only_value_errors, _rope_errors, _melt_key_errors, _unknown_key_errors):
        errors += find(raw)
    if not errors:
        fields.setdefault("kv_heads", fields["heads"])
        fields.setdefault("head_width", fields["width"] // fields["heads"])
        errors += _size_errors(fields)
    fail(subject, errors)
    if raw["model_type"] == "melt":
        fields |= {"gate": raw.get("gate", "elementwise"), "first_loop": raw.get("first_loop", "copy")}
    else:
        fields["gate"] = "none"
    return ModelConfig(**fields)


def published_config(config, dtype, source=None, chunk_size=None):
    """The dict to write as config.json.

    Args:
      config: `ModelConfig`.
      dtype: of the stored weights, a name.
      source: the config.json that the model came from. Where it already describes `config` it stays as it is; otherwise
        its harmless keys do.
      chunk_size: tokens of the chunk that a MELT was trained with; None: what `source` says of it.
    """
    raw = dict(source or {})
    config = dataclasses.replace(config, remat=ModelConfig.remat, attention_block=ModelConfig.attention_block)
    if source is None or parse_config(source) != config:
        kind = "ouro" if config.gate == "none" else "melt"
        if raw.get("model_type") != kind:
            raw.pop("auto_map", None)  # names the code of the other kind
            raw |= {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
        raw |= {key: getattr(config, field) for key, field in CONFIG_KEYS.items()}
        stale = ("rope_parameters", *(MELT_KEYS if kind == "ouro" else ()))
        raw = {key: value for key, value in raw.items() if key not in stale}
        raw |= {"hidden_act": "silu"}
        if raw.get("layer_types") is not None:
            raw["layer_types"] = ["full_attention"] * config.layers
        if kind == "melt":
            raw |= {"gate": config.gate, "first_loop": config.first_loop}
    if chunk_size is not None and config.gate != "none":
        raw["chunk_size"] = chunk_size
    for key in [key for key in ("torch_dtype", "dtype") if key in raw] or ["torch_dtype"]:
        raw[key] = str(dtype)
    return raw


def write_config(folder, raw):
    """Writes config.json."""
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _with_rope_theta(raw):
    """The config with the `rope_theta` that newer libraries write in `rope_parameters`, if it has no other."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_theta") is None:
        return raw
    return {**raw, "rope_theta": rope["rope_theta"]} if raw.get("rope_theta") is None else raw


def _rope_errors(raw):
    """What `rope_parameters` says that this model does not compute, or otherwise than `rope_theta`."""
    rope = raw.get("rope_parameters")
    if rope is None:
        return []
    default = isinstance(rope, dict) and set(rope) <= {"rope_theta", "rope_type"}
    if not default or rope.get("rope_type", "default") != "default":
        return [f"rope_parameters is {rope!r}: this model computes {{'rope_type': 'default', 'rope_theta': …}} only"]
    if rope.get("rope_theta", raw.get("rope_theta")) != raw.get("rope_theta"):
        return [f"rope_parameters is {rope!r}, but rope_theta is {raw['rope_theta']!r}"]
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
        if not good:
            errors.append(f"{key} is {value!r}: expected {expected}")
    return errors


def _only_value_errors(raw):
    errors = []
    for key, values in ONLY_VALUES.items():
        if raw.get(key, values[0]) not in values:
            errors.append(f"{key} is {raw[key]!r}: this model computes {values[0]!r} only")
    if raw.get("sliding_window") is not None and "use_sliding_window" not in raw:
        errors.append(f"sliding_window is {raw['sliding_window']!r}: this model attends to all tokens (null)")
    types, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    full = isinstance(types, list) and all(kind == "full_attention" for kind in types)
    if types is not None and not (full and (len(types) == layers or not isinstance(layers, int))):
        errors.append(f"layer_types is {types!r}: expected full_attention for each of the num_hidden_layers")
    dtypes = {key: raw[key] for key in ("torch_dtype", "dtype") if raw.get(key) is not None}
    errors += [f"{key} is {d!r}: expected one of {', '.join(DTYPES)}" for key, d in dtypes.items() if d not in DTYPES]
    if len(set(map(str, dtypes.values()))) > 1:
        errors.append(f"torch_dtype is {dtypes['torch_dtype']!r}, but dtype is {dtypes['dtype']!r}")
    kind = raw.get("model_type")
    if kind not in tuple(ARCHITECTURES):  # a list, say, has no hash
        errors.append(f"model_type is {kind!r}: expected 'ouro' or 'melt'")
    return errors


def _melt_key_errors(raw):
    own = [key for key in MELT_KEYS if key in raw]
    if raw.get("model_type") == "ouro":
        return [f"{key} is {raw[key]!r}, but model_type 'ouro' has no gates: expected no such key" for key in own]
    errors = []
    for key, values in (("gate", GATES[1:]), ("first_loop", CHOICES["first_loop"])):
        if key in own and raw[key] not in values:
            errors.append(f"{key} is {raw[key]!r}: expected one of {', '.join(values)}")
    if "chunk_size" in own and (type(raw["chunk_size"]) is not int or raw["chunk_size"] < 1):
        errors.append(f"chunk_size is {raw['chunk_size']!r}: expected an integer, 1 or more")
    return errors


def _unknown_key_errors(raw):
    known = {*CONFIG_KEYS, *ONLY_VALUES, *HARMLESS, *MELT_KEYS, "rope_parameters"}
    return [f"{key} is {raw[key]!r}: a key that melt_jax does not know" for key in raw if key not in known]


def _size_errors(fields):
    errors = []
    heads, kv_heads = fields["heads"], fields["kv_heads"]
    if heads % kv_heads:
        errors.append(f"num_key_value_heads is {kv_heads}: expected a divisor of num_attention_heads, {heads}")
    if fields["head_width"] % 2 or fields["head_width"] == 0:
        errors.append(f"head_dim is {fields['head_width']}: rotary embedding needs an even width")
    for name in ("bos", "eos", "pad"):
        if fields.get(name, 0) >= fields["vocab"]:
            errors.append(f"{name}_token_id is {fields[name]}: outside the vocabulary of {fields['vocab']}")
    return errors
