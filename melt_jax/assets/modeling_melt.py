"""Ouro (a LoopLM, arXiv 2510.25741) and MELT (arXiv 2605.07721) in PyTorch, for transformers 5.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A token runs through the same layers T times before its successor is predicted. A LoopLM keeps the KV entries of every
loop. A MELT keeps one entry per token and layer: each loop updates a latent h from the layer's normed input u,

    z  = σ(u W_z + hᵗ⁻¹ U_z + b_z)
    hᵗ = z ⊙ hᵗ⁻¹ + (1 − z) ⊙ u

projects key and value from h and *overwrites* the token's entry. Prompts run in chunks of `config.chunk_size` tokens:
in loop t a query reads the entries of its own chunk as they are in loop t, and final entries of earlier chunks. With a
window of W tokens it reads the W tokens before it through their entries of loop t. With several sweeps the loops of a
chunk run again, and tokens of the chunk further back than W are read through the final entries of the sweep before.

Letters in shapes: B batch, S new tokens, C chunk length, T loops, L layers, D width, H heads, K key/value heads, E head
width, N entries.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_melt import ChunkEntries, MeltCache
from .configuration_melt import MeltConfig, OuroConfig

EMA_KEEP = 0.8  # z of the gate "ema"
# The name of an output's cache: "cache" from transformers 5.20 on.
CACHE = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if "hidden" not in field.name)
Rope = tuple[Tensor, Tensor]


def upcast(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Softmax attention in plain operations; the mask is boolean."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = upcast(query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    weights = scores.softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class MeltNorm(nn.Module):
    """weight · x / sqrt(mean(x²) + eps), computed in at least float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = upcast(x)
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (normed * upcast(self.weight)).to(x.dtype)


def rope_table(config: OuroConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position · theta^(−2j/E), [B, 1, C, E/2], in at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=dtype) / config.head_dim
    angles = positions[:, None, :, None].to(dtype) * config.rope_parameters["rope_theta"] ** -exponents
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates component j of each head with component j + E/2; x is [B, heads, C, E]."""
    cos, sin = rope
    first, second = upcast(x).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class MeltGate(nn.Module):
    """The weights of a learned gate; one set per layer, shared by all loops."""

    def __init__(self, width: int):
        super().__init__()
        self.w_z = nn.Linear(width, width)
        self.u_z = nn.Linear(width, width, bias=False)

    def forward(self, u: Tensor, latent: Tensor) -> Tensor:
        """z = σ(u W_z + h U_z + b_z), at least float32."""
        return torch.sigmoid(upcast(self.w_z(u)) + upcast(self.u_z(latent)))


class LoopAttention(nn.Module):
    """Attention over one set of KV entries: those that the T loops of a MELT's layer share, or of one loop of a LoopLM.

    An inference engine such as vLLM keeps the entries of each of these modules, by `layer_idx`. A MELT's T calls write
    to the same slots, and the last call's entries stay.
    """

    def __init__(self, config: OuroConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, loop: int, entries: ChunkEntries | None) -> Tensor:
        """The heads' results, [B, C, H · E]; without `entries`, an engine keeps them."""
        count, mask = query.shape[2], None
        if entries is not None:
            key, value, mask = entries(self.layer_idx, loop, key, value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        heads, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        return heads.reshape(-1, count, query.shape[1] * query.shape[3])


class MeltAttention(nn.Module):
    """Attention of one layer; queries come from u, keys and values from the latent (a LoopLM's: from u)."""

    def __init__(self, config: OuroConfig, layer_idx: int):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=False)
        if config.gate in ("elementwise", "scalar"):
            self.kv_gate = MeltGate(width)
        self.loops = nn.ModuleDict()
        for loop in range(config.total_ut_steps if config.gate == "none" else 1):
            self.loops[f"loop_{loop + 1}"] = LoopAttention(config, loop * config.decoder_layers + layer_idx)

    def forward(
        self, u: Tensor, latent: Tensor | None, loop: int, rope: Rope, entries: ChunkEntries | None
    ) -> tuple[Tensor, Tensor]:
        """(attention output [B, C, D], hᵗ)."""
        latent = self.update_latent(u, latent, loop)
        split = lambda x: x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        query = apply_rope(split(self.q_proj(u)), rope)
        key, value = apply_rope(split(self.k_proj(latent)), rope), split(self.v_proj(latent))
        attention = self.loops[f"loop_{loop if self.config.gate == 'none' else 1}"]
        return self.o_proj(attention(query, key, value, loop, entries)), latent

    def update_latent(self, u: Tensor, latent: Tensor | None, loop: int) -> Tensor:
        """hᵗ from u and hᵗ⁻¹; u itself for a LoopLM."""
        gate = self.config.gate
        if gate in ("none", "last") or (loop == 1 and self.config.first_loop == "copy"):
            return u
        latent = torch.zeros_like(u) if latent is None else latent
        if gate == "mean":
            z = (loop - 1) / loop
        elif gate == "ema":
            z = EMA_KEEP
        else:
            z = self.kv_gate(u, latent)
            z = z[..., :1] if gate == "scalar" else z
        return (z * upcast(latent) + (1 - z) * upcast(u)).to(u.dtype)


class MeltMLP(nn.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, config: OuroConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MeltDecoderLayer(nn.Module):
    """One layer, with a norm before and after attention and feed-forward."""

    def __init__(self, config: OuroConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MeltAttention(config, layer_idx)
        self.mlp = MeltMLP(config)
        norm = lambda: MeltNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm, self.input_layernorm_2 = norm(), norm()
        self.post_attention_layernorm, self.post_attention_layernorm_2 = norm(), norm()

    def forward(
        self, y: Tensor, latent: Tensor | None, loop: int, rope: Rope, entries: ChunkEntries | None
    ) -> tuple[Tensor, Tensor]:
        """(the stream after the layer, hᵗ)."""
        a, latent = self.self_attn(self.input_layernorm(y), latent, loop, rope, entries)
        y = y + self.input_layernorm_2(a)
        return y + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(y))), latent


class OuroPreTrainedModel(PreTrainedModel):
    """Loading and saving. Masks are boolean and depend on the loop, which `sdpa` and `eager` support."""

    config_class = OuroConfig
    base_model_prefix = "model"
    _no_split_modules = ("MeltDecoderLayer",)
    _skip_keys_device_placement = ("cache", "past_key_values")
    _supports_sdpa = True
    _supports_attention_backend = True


class OuroModel(OuroPreTrainedModel):
    """The loops; the output is the hidden state of the last loop, or of the one that the exit gate selects."""

    def __init__(self, config: OuroConfig):
        config.check()
        if config._attn_implementation == "vllm":
            prepare_for_engine(config)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MeltDecoderLayer(config, i) for i in range(config.decoder_layers))
        self.norm = MeltNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MeltCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: MeltCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Runs S new tokens after those in the cache.

        Args:
          attention_mask: [B, tokens in the cache + S]; 0 for padding, at the beginning or the end of a sequence.
          position_ids: [B, S]; by default counted from each sequence's first token.
          cache, past_key_values: two names of one argument.
          output_hidden_states: also returns the embeddings and the output of each loop, T + 1 tensors.

        Raises:
          ValueError: the mask has heads or queries, the cache is of another class or window, or sequences are packed.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config._attn_implementation == "vllm":
            return (self.exit_hidden(self.run_loops(x, rope_table(self.config, position_ids, x.dtype), None)),)
        cache = past_key_values if cache is None else cache
        cache = MeltCache(self.config.window) if cache is None else cache
        if not isinstance(cache, MeltCache):
            raise ValueError(f"cache: expected a MeltCache or None, found {type(cache).__name__}; leave it out")
        if cache.window != self.config.window:
            raise ValueError(
                f"cache: expected the model's window {self.config.window}, found {cache.window}; create it by"
                f" MeltCache({self.config.window})"
            )
        loops = self.run_sequence(x, attention_mask, position_ids, cache)
        default = lambda value, name: getattr(self.config, name) if value is None else value
        output = BaseModelOutputWithPast(
            last_hidden_state=self.exit_hidden(loops),
            hidden_states=(x, *loops) if default(output_hidden_states, "output_hidden_states") else None,
            **{CACHE: cache if default(use_cache, "use_cache") else None},
        )
        return output if default(return_dict, "return_dict") else output.to_tuple()

    def run_sequence(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: MeltCache
    ) -> list[Tensor]:
        """The outputs of the loops, T tensors [B, S, D].

        Sequences run without their padding, so that the borders of a sequence's chunks do not depend on it.
        """
        columns, real = unpadded_columns(x, attention_mask)
        ordinals = cache.ordinals_after(real)
        cache.columns += x.shape[1]
        cache.padded |= attention_mask is not None and not bool(real.all())
        positions = ordinals.clamp(min=0)
        if position_ids is not None:
            positions = position_ids.expand(len(x), -1).gather(1, columns)
            if bool(((positions.diff() <= 0) & real[:, 1:]).any()):
                raise ValueError("position_ids: expected increasing positions, found others; do not pack sequences")
        columns = columns[..., None].expand(-1, -1, x.shape[2])
        packed = x.gather(1, columns)
        size = self.config.chunk_size or packed.shape[1]
        parts = []
        for first in range(0, packed.shape[1], size):
            chunk, at, indices = (tensor[:, first : first + size] for tensor in (packed, positions, ordinals))
            parts.append(self.run_chunk(chunk, rope_table(self.config, at, chunk.dtype), indices, cache))
        return [torch.zeros_like(x).scatter(1, columns, torch.cat(loop, 1).to(x.device)) for loop in zip(*parts)]

    def run_chunk(self, x: Tensor, rope: Rope, ordinals: Tensor, cache: MeltCache) -> list[Tensor]:
        """The outputs of the loops of one chunk; its final entries are added to the cache."""
        cache.begin_chunk(ordinals)
        entries = ChunkEntries(self.config, cache)
        loops = self.run_loops(x, rope, entries)
        # From ⌈C/(W + 1)⌉ sweeps on, a sweep changes nothing.
        for _ in range(1, min(self.config.sweeps, -(-x.shape[1] // (self.config.window + 1)))):
            entries = ChunkEntries(self.config, cache, entries.final())
            loops = self.run_loops(x, rope, entries)
        if cache.window and self.config.total_ut_steps > 1:
            cache.advance_window(entries.recent)
        return loops

    def run_loops(self, x: Tensor, rope: Rope, entries: ChunkEntries | None) -> list[Tensor]:
        """T loops over all layers; the final norm closes every loop."""
        latents: list[Tensor | None] = [None] * len(self.layers)
        loops = []
        for loop in range(1, self.config.total_ut_steps + 1):
            for i, layer in enumerate(self.layers):
                x, latents[i] = layer(x, latents[i], loop, rope, entries)
            x = self.norm(x)
            loops.append(x)
        return loops

    def exit_hidden(self, loops: list[Tensor]) -> Tensor:
        """Each token's output of the first loop at which the cumulative exit probability reaches the threshold."""
        hidden, threshold = loops[-1], self.config.early_exit_threshold
        if threshold >= 1:
            return hidden
        stay, cumulative, reached = 1.0, 0.0, []
        for x in loops[:-1]:
            leave = torch.sigmoid(upcast(self.early_exit_gate(x))).to(x.device)
            cumulative, stay = cumulative + stay * leave, stay * (1 - leave)
            reached.append(cumulative >= threshold)
        for x, here in zip(reversed(loops[:-1]), reversed(reached)):
            hidden = torch.where(here, x, hidden)
        return hidden


def prepare_for_engine(config: OuroConfig) -> None:
    """Makes vLLM allocate T · L caches for a LoopLM: one for each of the `num_hidden_layers`, as it counts them.

    Raises:
      ValueError: the model has a window or sweeps.
    """
    if config.window or config.sweeps > 1:
        raise ValueError(
            f"window, sweeps: expected 0 and 1 for vLLM, which keeps one KV entry per token and layer, found"
            f" {config.window} and {config.sweeps}; generate with transformers or melt_jax, or train without a window"
        )
    if config.gate == "none":
        config._decoder_layers = config.decoder_layers
        config.num_hidden_layers = config.total_ut_steps * config.decoder_layers


def unpadded_columns(x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The columns of each sequence's tokens, in order, then some padding; and which are tokens: both [B, longest]."""
    batch, count, _ = x.shape
    columns = torch.arange(count, device=x.device).expand(batch, -1)
    if attention_mask is None:
        return columns, torch.ones_like(columns, dtype=torch.bool)
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, tokens], found shape {tuple(attention_mask.shape)}")
    real = attention_mask[:, -count:].bool()
    if bool(real.all()):
        return columns, real
    columns = real.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(real.sum(1).max()))]
    return columns, real.gather(1, columns)


class OuroForCausalLM(OuroPreTrainedModel, GenerationMixin):
    """A LoopLM with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    base_class = OuroModel

    def __init__(self, config: OuroConfig):
        super().__init__(config)
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates the cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MeltCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the last `logits_to_keep` tokens (0: of all), and the loss if there are labels.

        The loss is the mean over the labels, or their sum divided by `num_items_in_batch`, which `Trainer` gives.
        """
        count = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, return_dict=True, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            sizes = {"vocab_size": self.config.vocab_size, "num_items_in_batch": count}
            loss = self.loss_function(logits=logits, labels=labels, **sizes)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()


class MeltModel(OuroModel):
    """The loops of a MELT."""

    config_class = MeltConfig


class MeltForCausalLM(OuroForCausalLM):
    """A MELT with its head."""

    config_class = MeltConfig
    base_class = MeltModel


__all__ = ["MeltCache", "MeltForCausalLM", "MeltModel", "OuroForCausalLM", "OuroModel"]
