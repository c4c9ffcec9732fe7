"""Configurations of Ouro (a LoopLM, arXiv 2510.25741) and MELT (arXiv 2605.07721) for transformers 5.

This file and `modeling_melt.py` belong to a published model folder; `auto_map` in its config.json names them.
"""

from transformers import PreTrainedConfig

GATES = ("elementwise", "scalar", "mean", "ema", "last")
FIRST_LOOPS = ("copy", "gated")


class OuroConfig(PreTrainedConfig):
    """The configuration of a LoopLM. The defaults are those of Ouro-1.4B.

    Args:
      total_ut_steps: T, the loops.
      early_exit_threshold: cumulative exit probability at which a loop's output is used; 1: the last loop's.
      chunk_size: None, because the result of a LoopLM does not depend on the chunk.
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # A LoopLM's; a MELT's are in its config.json.
    gate, first_loop, window, sweeps, chunk_size = "none", "copy", 0, 1, None

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        total_ut_steps: int = 4,
        early_exit_threshold: float = 1.0,
        rope_theta: float = 1e6,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 65536,
        tie_word_embeddings: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        rope_parameters: dict | None = None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.total_ut_steps = total_ut_steps
        self.early_exit_threshold = early_exit_threshold
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": rope_theta}
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    @property
    def decoder_layers(self) -> int:
        """L. An inference engine may count more `num_hidden_layers`, one for each of a LoopLM's caches."""
        return self.__dict__.get("_decoder_layers", self.num_hidden_layers)

    def check(self) -> None:
        """Raises ValueError for the first invalid value; a model's constructor calls it."""
        for name, values in (("gate", ("none", *GATES)), ("first_loop", FIRST_LOOPS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, found {getattr(self, name)!r}")
        for name, least in (("total_ut_steps", 1), ("window", 0), ("sweeps", 1), ("chunk_size", 1)):
            value = getattr(self, name)
            if name == "chunk_size" and value is None and self.gate == "none":
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer, {least} or more, found {value!r}")


class MeltConfig(OuroConfig):
    """The configuration of a MELT: a LoopLM's and five more fields.

    Args:
      gate: one of `GATES`.
      first_loop: "copy": h¹ = u; "gated": the gate is applied at loop 1 too, to h⁰ = 0.
      window: W; the W tokens before a query are read through their entries of its own loop.
      sweeps: how often the loops of a chunk run.
      chunk_size: tokens of a prompt that run in parallel: the training chunk. The result depends on it.
    """

    model_type = "melt"

    def __init__(
        self,
        gate: str = "elementwise",
        first_loop: str = "copy",
        window: int = 0,
        sweeps: int = 1,
        chunk_size: int = 512,
        **kwargs,
    ):
        self.gate = gate
        self.first_loop = first_loop
        self.window = window
        self.sweeps = sweeps
        self.chunk_size = chunk_size
        super().__init__(**kwargs)


__all__ = ["MeltConfig", "OuroConfig"]
