"""Stands in for tpu-inference: its modules, its loading of a model, its scheduling of requests, and paged attention.

The names, signatures and arrays are those of tpu-inference 0.32.0, as far as `melt_jax.inference.tpu_inference` and
this file need them. `python -m tests.long.tpu_inference` checks them against the wheel.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from melt_jax.inference.vllm_plugin import SCHEDULER

FIELDS = ["input_positions", "block_tables", "seq_lens", "query_start_loc", "request_distribution"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=[])
@dataclasses.dataclass
class AttentionMetadata:
    """The tokens of a step. R requests, the rest padding; the first of them have one token in the step.

    Attributes:
      input_positions: [N].
      block_tables: [R · P], the pages of each request.
      seq_lens: [R], tokens of each request in the cache, with those of the step.
      query_start_loc: [R + 1], the first token of each request in the step.
      request_distribution: [3]: requests of one token, the same number again, all requests.
    """

    input_positions: jax.Array
    block_tables: jax.Array
    seq_lens: jax.Array
    query_start_loc: jax.Array
    request_distribution: jax.Array


def attention(
    kv_cache: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    attention_metadata: AttentionMetadata,
    mesh: Any,
    head_dim_original: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes keys and values [N, K, E] into a cache [pages, page size, 2, K, E] and attends causally to it.

    The results of padding are NaN, since those of the kernel are undefined.
    """
    md, width = attention_metadata, q.shape[-1]
    assert head_dim_original == width
    requests, size = md.seq_lens.shape[0], kv_cache.shape[1]
    token = jnp.arange(len(q))
    request = jnp.searchsorted(md.query_start_loc[1:], token, side="right")
    real = request < md.request_distribution[2]
    request = jnp.minimum(request, requests - 1)
    lengths, starts, ends = md.seq_lens[request], md.query_start_loc[request], md.query_start_loc[request + 1]
    place = lengths - (ends - starts) + token - starts
    tables = md.block_tables.reshape(requests, -1)
    page = jnp.where(real, tables[request, place // size], len(kv_cache))  # an update outside of the cache is dropped
    kv_cache = kv_cache.at[page, place % size].set(jnp.stack([k, v], 1).astype(kv_cache.dtype), mode="drop")
    entries = kv_cache[tables].reshape(requests, -1, *kv_cache.shape[2:])[request]
    query = q.reshape(len(q), k.shape[1], -1, width)
    scores = jnp.einsum("nkge,nske->nkgs", query, entries[:, :, 0]) * width**-0.5
    visible = jnp.arange(entries.shape[1])[None] <= place[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    heads = jnp.einsum("nkgs,nske->nkge", weights, entries[:, :, 1]).reshape(q.shape)
    return kv_cache, jnp.where(real[:, None, None], heads, jnp.nan).astype(q.dtype)


def modules(attend: Callable[..., Any] = attention, registered: dict[str, Any] | None = None) -> dict[str, Any]:
    """{name: module} of tpu-inference, for `sys.modules`; `register_model` adds to `registered`."""
    axes = SimpleNamespace(VOCAB=("data", "model"), ATTN_HEAD="model", MLP_TENSOR="model")
    register = {} if registered is None else registered
    contents = {
        "layers.common.attention_interface": {"attention": attend},
        "layers.common.sharding": {"ShardingAxisName": axes},
        "models.common.model_loader": {"register_model": register.__setitem__},
    }
    names = {".".join(name.split(".")[:end]) for name in contents for end in range(1, 4)}
    found: dict[str, Any] = {f"tpu_inference.{name}": ModuleType(name) for name in names}
    for name, values in contents.items():
        vars(found[f"tpu_inference.{name}"]).update(values)
    return found | {"tpu_inference": ModuleType("tpu_inference")}


def vllm_config(folder: Any, dtype: Any = "float32", loops: int = 4, threshold: float = 1.0, **changes: Any) -> Any:
    """The parts of a `VllmConfig` that the model reads; `changes` replace values."""
    values = {"scheduler_cls": SCHEDULER, "pipeline_parallel_size": 1, "cache_dtype": "auto"} | changes
    pick = lambda name: SimpleNamespace(**{name: values[name]})
    hf_config = SimpleNamespace(total_ut_steps=loops, early_exit_threshold=threshold)
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), revision=None, dtype=jnp.dtype(dtype), hf_config=hf_config),
        scheduler_config=pick("scheduler_cls"),
        parallel_config=pick("pipeline_parallel_size"),
        cache_config=pick("cache_dtype"),
    )


class Runner:
    """A model as tpu-inference loads and calls it: traced, filled with weights, split, compiled with donated caches."""

    def __init__(self, model_class: Any, config: Any, tensor: int = 1):
        """`tensor`: devices of the mesh, whose axes are not explicit."""
        key = jax.random.key(0)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:tensor]).reshape(1, tensor), ("data", "model"))
        with jax.set_mesh(mesh):
            model = nnx.eval_shape(lambda: model_class(config, key, mesh))
            model.load_weights(key)
            model = nnx.jit(lambda model: model, donate_argnums=0)(model)
        graph, state = nnx.split(model)
        self.mesh, self.model = mesh, model
        self.leaves, structure = jax.tree.flatten(state)
        merge = lambda leaves: nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        self._step = jax.jit(lambda leaves, *args: merge(leaves)(*args), donate_argnums=1, static_argnums=(6, 9, 10))
        self._logits = jax.jit(lambda leaves, hidden: merge(leaves).compute_logits(hidden))

    def step(self, caches: list[jax.Array], tokens: Any, metadata: Any) -> tuple[list[jax.Array], jax.Array]:
        """(the caches, the hidden states); the given caches are deleted."""
        others = (None, metadata.input_positions, (("layer.0", 0),), None, None, True, True)
        with jax.set_mesh(self.mesh):
            caches, hidden, auxiliary, experts = self._step(self.leaves, caches, tokens, metadata, *others)
        assert auxiliary == [] and experts is None
        return caches, hidden

    def logits(self, hidden: jax.Array) -> np.ndarray:
        """[N, V]."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._logits(self.leaves, hidden))


@dataclasses.dataclass
class Request:
    """A request: its tokens so far, how many of them are in the cache, its pages, and the logits of its new tokens."""

    tokens: list[int]
    prompt: int
    pages: np.ndarray
    computed: int = 0
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)


def pages_per_request(prompts: Sequence[Sequence[int]], new_tokens: int, page_size: int) -> int:
    """Enough for the longest."""
    return -(-(max(map(len, prompts)) + new_tokens) // page_size)


def make_caches(runner: Runner, prompts: Sequence[Sequence[int]], new_tokens: int, page_size: int) -> list[jax.Array]:
    """Caches for `attention`, with pages for all requests and a spare one; they are not zero."""
    config = runner.model.model.config
    pages = 1 + len(prompts) * pages_per_request(prompts, new_tokens, page_size)
    shape = (pages, page_size, 2, config.kv_heads, config.head_width)
    count = config.layers * (config.loops if config.gate == "none" else 1)
    return [jnp.full(shape, 1e3, runner.model.model.dtype) for _ in range(count)]


def serve(
    runner: Runner,
    caches: list[jax.Array],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    chunk: int,
    page_size: int,
    make_metadata: Callable[..., Any] = AttentionMetadata,
) -> tuple[list[list[int]], list[np.ndarray], list[tuple[int, int]]]:
    """Continues prompts greedily; a request arrives in each step, and all that have arrived run in every step.

    Args:
      runner: the model.
      caches: of `make_caches`, or of the same pages in another layout; donated.
      prompts: token ids.
      new_tokens: of each request.
      chunk: tokens of a prompt that run in a step.
      page_size: tokens of a page.
      make_metadata: `AttentionMetadata`, or that of tpu-inference.

    Returns:
      (the new tokens, the logits that selected them, and of each step the requests with one token and with more).
    """
    each = pages_per_request(prompts, new_tokens, page_size)
    pages = np.random.default_rng(0).permutation(np.arange(1, 1 + each * len(prompts), dtype=np.int32))
    requests = [Request(list(prompt), len(prompt), at) for prompt, at in zip(prompts, pages.reshape(-1, each))]
    size, steps = 1 << (len(prompts) * chunk - 1).bit_length(), []
    while waiting := [r for r in requests[: len(steps) + 1] if len(r.logits) < new_tokens]:
        count = lambda r: min(chunk, r.prompt - r.computed) if r.computed < r.prompt else 1
        waiting.sort(key=lambda r: count(r) > 1)
        counts = [count(r) for r in waiting]
        tokens, metadata = _step_arrays(waiting, counts, size, len(requests), make_metadata)
        caches, hidden = runner.step(caches, tokens, metadata)
        logits = runner.logits(hidden)
        ends = np.cumsum(counts)
        for request, n, end in zip(waiting, counts, ends):
            request.computed += n
            if request.computed >= request.prompt:
                request.logits.append(logits[end - 1])
                request.tokens.append(int(logits[end - 1].argmax()))
        steps.append((counts.count(1), len(counts) - counts.count(1)))
    return [r.tokens[r.prompt :] for r in requests], [np.stack(r.logits) for r in requests], steps


def _step_arrays(waiting, counts, size, most, make_metadata):
    """(token ids [size], metadata of `most` requests) of a step."""
    pad = lambda values, length: jnp.asarray([*values, *[0] * (length - len(values))], jnp.int32)
    tokens, positions = [], []
    for request, n in zip(waiting, counts):
        tokens += request.tokens[request.computed : request.computed + n]
        positions += range(request.computed, request.computed + n)
    total, ones = len(tokens), counts.count(1)
    starts = np.concatenate([[0], np.cumsum(counts), [total] * (most - len(counts))])
    tables = np.concatenate([r.pages for r in waiting])
    return pad(tokens, size), make_metadata(
        input_positions=pad(positions, size),
        block_tables=pad(tables, most * len(waiting[0].pages)),
        seq_lens=pad([r.computed + n for r, n in zip(waiting, counts)], most),
        query_start_loc=jnp.asarray(starts, jnp.int32),
        request_distribution=jnp.asarray([ones, ones, len(counts)], jnp.int32),
    )


def compare_devices() -> None:
    """Exits with status 1 if a model split over two devices computes something else than on one."""
    sys.modules.update(modules())
    from melt_jax.inference.tpu_inference import LoopedForCausalLM

    folder = pathlib.Path(__file__).parents[1] / "golden/melt_tiny"
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    found = []
    for tensor in (1, 2):
        runner = Runner(LoopedForCausalLM, vllm_config(folder), tensor)
        split = {weight.sharding.spec for weight in jax.tree.leaves(runner.model)}
        found.append(serve(runner, make_caches(runner, prompts, 2, 4), prompts, 2, 4, 4)[1])
    print("shardings:", *split)
    sys.exit(not np.allclose(*found, rtol=0, atol=1e-4) or jax.P(None, "model") not in split)


if __name__ == "__main__":
    compare_devices()
