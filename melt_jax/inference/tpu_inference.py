"""MELT and Ouro for vLLM on TPUs, by tpu-inference; `vllm_plugin` registers them there.

tpu-inference owns the KV caches, one array for each layer, and computes attention over them: a call writes the keys and
values of the tokens of a step into their slots and attends to those and, in the cache, to all earlier tokens of each
request. Everything else is `melt_jax.model`.

In each of the T loops a layer calls attention once, with the keys and values of the current latents. So a query of loop
t reads the tokens of its own step as they are in loop t, loop t + 1 overwrites their slots, and the final entries
remain: a MELT's rule, if a step holds whole chunks, which the plugin makes vLLM schedule. The kernel (ragged paged
attention, version 3) takes the entries of the step from its arguments, not from the cache, and updates the cache in
place; so overwriting is safe and copies nothing, but T − 1 of T writes are in vain. Its switch `update_kv_cache=False`
does not avoid them, because it makes the kernel read the entries of the step from the cache, too.

A LoopLM has T · L caches, because the plugin makes vLLM count T · L layers.

Letters in shapes: N tokens of a step, of all requests and padding; H query heads; K, E, D, T as in `melt_jax.model`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from melt_jax.checkpoints.hub import PREFIX, local_folder, repository
from melt_jax.checkpoints.published import load_model, read_config
from melt_jax.checkpoints.published_config import ARCHITECTURES
from melt_jax.config import InputError, ModelConfig
from melt_jax.files import Path
from melt_jax.inference.sampling import exit_hidden
from melt_jax.inference.vllm_plugin import SCHEDULER
from melt_jax.model.gate import update_latent
from melt_jax.model.layers import DecoderLayer, RopeTable, rms_norm, rope_table
from melt_jax.model.layout import accumulation_dtype
from melt_jax.model.model import LoopedTransformer, abstract_model, init_model, reconfigure, unstack

# {logical axis of a weight: the attribute of tpu-inference's ShardingAxisName that splits it}; others are not split.
AXES = {"vocab": "VOCAB", "heads": "ATTN_HEAD", "mlp": "MLP_TENSOR", "latent": "MLP_TENSOR"}

# (cache of a layer, queries [N, H, E], keys and values [N, K, E]) → (the cache, results [N, H, E])
Attention = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


class LoopedForCausalLM(nnx.Module):
    """A model of tpu-inference: it creates one, calls `load_weights` once, then `__call__` for each step.

    Attributes:
      folder: the published folder.
      mesh: of tpu-inference.
      model: a MELT or a LoopLM, unstacked; abstract until `load_weights`.
    """

    def __init__(self, vllm_config: Any, rng_key: Key[Array, ""], mesh: jax.sharding.Mesh):
        """A model with random weights; tpu-inference only traces it, unless weights are to be random.

        Args:
          vllm_config: a `VllmConfig` with the dtype of a JAX array; T and the exit threshold are those of its
            `hf_config`, everything else is read from the folder.
          rng_key: of the weights.
          mesh: its axes have the names of tpu-inference.

        Raises:
          InputError: lists what cannot be served.
        """
        self.folder = str(published_folder(vllm_config.model_config))
        config, hf_config = read_config(self.folder), vllm_config.model_config.hf_config
        if errors := serving_errors(vllm_config, config):
            raise InputError("; ".join(errors))
        self.mesh = mesh
        model = init_model(config, rng_key, dtype=vllm_config.model_config.dtype)
        changes = {"loops": hf_config.total_ut_steps, "exit_threshold": hf_config.early_exit_threshold}
        self.model = unstack(reconfigure(model, **changes))

    def load_weights(self, rng_key: Any) -> None:
        """Reads the weights from the published folder onto the mesh; the key is not used.

        Raises:
          InputError: as `load_model`.
        """
        config, dtype = self.model.config, self.model.dtype.name
        shardings = weight_shardings(abstract_model(config, dtype), self.mesh)
        model = load_model(self.folder, dtype=dtype, shardings=shardings)
        self.model = unstack(reconfigure(model, loops=config.loops, exit_threshold=config.exit_threshold))

    def __call__(
        self, kv_caches: list[Array], input_ids: Int[Array, " N"], attention_metadata: Any, *_: Any
    ) -> tuple[list[Array], Float[Array, "N D"], list[Array], None]:
        """Runs T loops over the tokens of a step.

        Args:
          kv_caches: see `run_step`.
          input_ids: token ids.
          attention_metadata: an `AttentionMetadata`: positions, and the slots of each request.
          _: arguments for other kinds of models.

        Returns:
          (the caches with the final entries of the tokens, the hidden states that give the logits, [], None).
        """
        from tpu_inference.layers.common.attention_interface import (  # pyright: ignore[reportMissingImports]
            attention,
        )

        def attend(cache, query, keys, values):
            return attention(cache, query, keys, values, attention_metadata, self.mesh, self.model.config.head_width)

        caches, hidden = run_step(self.model, kv_caches, input_ids, attention_metadata.input_positions, attend)
        return caches, hidden, [], None

    def compute_logits(self, hidden_states: Float[Array, "N D"]) -> Float[Array, "N V"]:
        """Next-token logits, at least float32."""
        return self.model.logits(hidden_states)


def register_models() -> None:
    """Makes tpu-inference and vLLM run `LoopedForCausalLM` for a published config.json."""
    from tpu_inference.models.common.model_loader import register_model  # pyright: ignore[reportMissingImports]

    for architecture in ARCHITECTURES.values():
        register_model(architecture, LoopedForCausalLM)


def published_folder(model_config: Any) -> Path:
    """The folder of a `ModelConfig` of vLLM; a model of the hub is downloaded.

    Raises:
      InputError: as `local_folder`.
    """
    name, revision = model_config.model, model_config.revision
    return local_folder(f"{PREFIX}{name}@{revision}" if revision and repository(name) else name)


def serving_errors(vllm_config: Any, config: ModelConfig) -> list[str]:
    """What this model or tpu-inference cannot do, one text each."""
    errors, melt = [], config.gate != "none"
    if melt and (config.window or config.sweeps > 1):
        errors.append(
            "window, sweeps: expected 0 and 1, because vLLM keeps one KV entry per token and layer, found"
            f" {config.window} and {config.sweeps}; generate with melt_jax"
        )
    if melt and vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
        errors.append(
            f"scheduler: expected {SCHEDULER}, found {vllm_config.scheduler_config.scheduler_cls}; leave out data"
            " parallelism and --scheduler-cls"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        found = vllm_config.parallel_config.pipeline_parallel_size
        errors.append(f"--pipeline-parallel-size: expected 1, because each loop needs all layers, found {found}")
    if vllm_config.cache_config.cache_dtype != "auto":
        errors.append(f"--kv-cache-dtype: expected auto, found {vllm_config.cache_config.cache_dtype}")
    return errors


def weight_shardings(model: LoopedTransformer, mesh: jax.sharding.Mesh) -> LoopedTransformer:
    """The sharding of each weight, as a tree like the (abstract) model; a dimension is split if its axes divide it."""
    from tpu_inference.layers.common.sharding import ShardingAxisName  # pyright: ignore[reportMissingImports]

    def split(size, name):
        axes = getattr(ShardingAxisName, AXES[name]) if name in AXES else ()
        devices = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
        return axes if devices > 1 and size % devices == 0 else None

    def weight_sharding(weight):
        spec = jax.P(*(split(size, name) for size, name in zip(weight.get_value().shape, weight.axes, strict=True)))
        return weight.copy(jax.NamedSharding(mesh, spec))

    return jax.tree.map(weight_sharding, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def run_step(
    model: LoopedTransformer,
    caches: Sequence[Array],
    tokens: Int[Array, " N"],
    positions: Int[Array, " N"],
    attend: Attention,
) -> tuple[list[Array], Float[Array, "N D"]]:
    """T loops over the tokens of a step.

    Args:
      model: a MELT or a LoopLM, unstacked.
      caches: of each layer; of a LoopLM, of each layer in loop 1, then in loop 2, …
      tokens: token ids.
      positions: for RoPE.
      attend: writes keys and values into a cache and attends to it.

    Returns:
      (the caches with the final entries, the normed stream of the last loop or of the one that the exit gate selects).
    """
    config, layers = model.config, cast(Sequence[DecoderLayer], model.layers)
    rope = rope_table(positions[None], config.head_width, config.rope_theta, accumulation_dtype(model.dtype))
    run_layer = functools.partial(_run_layer, config, rope, attend)

    def run_loop(y, latents, caches, loop):
        latents, caches = list(latents), list(caches)
        for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            y, latents[i], caches[i] = run_layer(layer, y, latents[i], cache, loop)
        return rms_norm(y, model.norm[...], config.rms_eps), latents, caches

    def step(state, loop):
        y, latents, caches = state
        state = run_loop(y, latents, caches, loop)
        return state, state[0] if config.exit_threshold < 1 else None

    y, caches = model.embed(tokens[None]), list(caches)
    loops = jnp.arange(1, config.loops + 1, dtype=jnp.int32)
    if config.gate != "none":
        (y, _, caches), ends = jax.lax.scan(step, (y, [jnp.zeros_like(y)] * config.layers, caches), loops)
    else:
        ends, none = [], [None] * config.layers
        for i in range(config.loops):  # each loop has caches of its own
            part = slice(i * config.layers, (i + 1) * config.layers)
            y, _, caches[part] = run_loop(y, none, caches[part], loops[i])
            ends.append(y)
        ends = jnp.stack(ends) if config.exit_threshold < 1 else None
    return caches, (y if ends is None else exit_hidden(model, ends)[0])[0]


def _run_layer(
    config: ModelConfig,
    rope: RopeTable,
    attend: Attention,
    layer: DecoderLayer,
    y: Float[Array, "1 N D"],
    latent: Float[Array, "1 N D"] | None,
    cache: Array,
    loop: Int[Array, ""],
) -> tuple[Float[Array, "1 N D"], Float[Array, "1 N D"] | None, Array]:
    """One layer in one loop: (the stream, hᵗ or None, the cache)."""
    source = u = layer.norm(y, "input_layernorm")
    if latent is not None:
        source = latent = update_latent(config.gate, config.first_loop, layer.kv_gate, u, latent, loop)[0]
    kv, query = layer.project_kv(source, rope), layer.project_query(u, rope)
    cache, heads = attend(cache, query.reshape(-1, config.heads, config.head_width), kv.keys[0], kv.values[0])
    y, _ = layer.add_attention(y, heads.reshape(query.shape))
    return layer.add_mlp(y), latent, cache
