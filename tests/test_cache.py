"""The cache and the attention mask: sizes, writes, causality, independence of sequences, documents and padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from melt_jax import ModelConfig, run_chunk
from melt_jax.config import InputError
from melt_jax.model.attention import AttentionMask
from melt_jax.model.cache import KV, ChunkKV, blend, bytes_per_token, create_cache
from melt_jax.model.gate import VARIANTS
from melt_jax.model.model import reconfigure
from tests.helpers.marks import slow
from tests.helpers.tiny import TINY, jit_run, make_model, random_tokens, run

change = dataclasses.replace
KINDS = {"LoopLM": ("none", None), "MELT": ("elementwise", None), "transition": ("elementwise", 0.4)}
B, S, CHUNK = 2, 11, 4

float64 = pytest.mark.usefixtures("float64")
by_kind = pytest.mark.parametrize("gate, alpha", KINDS.values(), ids=KINDS)
# The fast tier checks the kind with most parts; the others have no code of their own.
transition_first = pytest.mark.parametrize(
    "gate, alpha", [(slow if kind != "transition" else pytest.param)(*KINDS[kind], id=kind) for kind in KINDS]
)


def cache_bytes(cache):
    return sum(x.nbytes for x in jax.tree.leaves(cache.entries))


def test_shared_bytes_do_not_depend_on_the_loops():
    for loops in (1, 2, 4, 9):
        for gate in VARIANTS:
            melt = change(TINY, gate=gate, loops=loops)
            assert bytes_per_token(melt) == bytes_per_token(TINY) == 2 * 2 * 2 * 6 * 2
            assert cache_bytes(create_cache(melt, 3, 7)) == 3 * 7 * bytes_per_token(TINY)
        looplm = change(TINY, gate="none", loops=loops)
        assert cache_bytes(create_cache(looplm, 3, 7)) == 3 * 7 * bytes_per_token(looplm)
        assert bytes_per_token(looplm) == loops * bytes_per_token(TINY)
        blends = create_cache(change(TINY, loops=loops), 3, 7, transition=True)
        assert cache_bytes(blends) == cache_bytes(create_cache(looplm, 3, 7))


def test_bytes_per_token_match_the_paper():
    assert bytes_per_token(ModelConfig(gate="elementwise")) == 196_608
    assert bytes_per_token(ModelConfig(gate="none")) == 786_432


def test_transition_needs_a_gate():
    with pytest.raises(InputError, match="gate"):
        create_cache(change(TINY, gate="none"), 1, 4, transition=True)


def random_kv(config, length, seed, lead=()):
    rng = np.random.default_rng(seed)
    shape = (*lead, config.layers, B, length, config.kv_heads, config.head_width)
    return KV(*(rng.standard_normal(shape, np.float32) for _ in range(2)))


@pytest.mark.parametrize("per_loop", [False, True], ids=["shared", "per-loop"])
@pytest.mark.parametrize("start", [3, (0, 5)], ids=["one start", "a start per sequence"])
def test_write_changes_its_own_slots_only(start, per_loop):
    lead = (TINY.loops,) if per_loop else ()
    cache = create_cache(TINY, B, S, jnp.float32, transition=per_loop)
    old = ChunkKV(random_kv(TINY, S, 0, lead))
    cache = cache.write(jax.tree.map(jnp.asarray, old), jnp.full((B, S), 7), 0)
    new = ChunkKV(random_kv(TINY, CHUNK, 2, lead))
    write = jax.jit(lambda cache, *args: cache.write(*args))
    written = jax.device_get(write(cache, new, np.full((B, CHUNK), 9, np.int32), np.asarray(start, np.int32)))
    for b, first in enumerate(np.broadcast_to(start, B)):
        inside = (np.arange(S) >= first) & (np.arange(S) < first + CHUNK)
        np.testing.assert_array_equal(written.segments[b], np.where(inside, 9, 7))
        for got, before, chunk in zip(written.entries, old.entries, new.entries):
            take = lambda x, b=b: np.moveaxis(x[..., b, :, :, :], -3, 0)
            np.testing.assert_array_equal(take(got)[inside], take(chunk))
            np.testing.assert_array_equal(take(got)[~inside], take(before)[~inside])


@float64
def test_blend_is_linear_in_alpha():
    shared, per_loop = (jax.tree.map(np.float64, random_kv(TINY, 3, *kv)) for kv in ((0,), (1, (TINY.loops,))))
    for got, s, b in zip(blend(shared, per_loop, 0.25), shared, per_loop):
        np.testing.assert_allclose(got, 0.25 * s + 0.75 * b, rtol=1e-14)
    assert blend(shared, None, None) is shared and blend(None, per_loop, None) is per_loop


@jax.jit
def one_chunk(model, tokens, cache, start, alpha):
    out = run_chunk(model, tokens, cache, start, alpha=alpha)
    return cache.write(out.kv, out.segments, start), out.hidden


@by_kind
def test_entries_of_finished_chunks_never_change(gate, alpha):
    """A chunk writes only its own slots and reads no later slot."""
    config = change(TINY, gate=gate)
    model, tokens = make_model(config), random_tokens(B, 12)
    cache = create_cache(config, B, 12, jnp.float32, transition=alpha is not None)
    cache = jax.device_get(cache)
    dirty = jax.tree.map(lambda x: x + x.dtype.type(1), cache)
    for start in range(0, 12, CHUNK):
        piece = tokens[:, start : start + CHUNK]
        before = cache.entries
        cache, hidden = jax.device_get(one_chunk(model, piece, cache, start, alpha))
        dirty, dirty_hidden = one_chunk(model, piece, dirty, start, alpha)
        np.testing.assert_array_equal(hidden, dirty_hidden)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache.entries), strict=True):
            changed = np.abs(np.moveaxis(new - old, -3, 0)).reshape(12, -1).max(1) > 0
            np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(start, start + CHUNK))


def outputs(model, tokens, alpha, segments=None, chunk=CHUNK):
    """All outputs of a run, tokens first: {name: [B, S, …]}."""
    out = run(model, tokens, chunk_size=chunk, alpha=alpha, segments=segments)
    found = {"hidden": np.moveaxis(out.hidden, (1, 2), (0, 1))}
    found |= {"attention_output": np.moveaxis(out.attention_output, (2, 3), (0, 1))}
    found |= {"gate_openness": np.moveaxis(out.gate_openness, (2, 3), (0, 1))}
    entries = out.cache.entries._asdict().items()
    return found | {name: np.moveaxis(x, (-4, -3), (0, 1)) for name, x in entries}


def assert_equal_where(same, one, other, alpha=None):
    """Bitwise equal at the tokens of the mask [B, S], and different at some others, so that the comparison can fail."""
    for name in one:
        np.testing.assert_array_equal(one[name][same], other[name][same], err_msg=name)
    assert np.abs(one["hidden"] - other["hidden"])[~same].max() > 1e-3


def test_attention_mask_is_causal_within_documents():
    """A token sees its document's cached slots and the earlier tokens of the chunk; padding sees itself."""
    rng = np.random.default_rng(0)
    segments, cached = (jnp.asarray(rng.integers(3, size=(B, n)), jnp.int32) for n in (CHUNK, S))
    for start in (0, 5, np.array([2, 7])):
        mask = AttentionMask(segments, cached, jnp.asarray(start, jnp.int32))
        earlier, own = jax.device_get((mask.over_cache(0, 0, S), mask.near()))
        for b, q in np.ndindex(B, CHUNK):
            mine, first = segments[b, q], np.broadcast_to(start, B)[b]
            assert earlier[b, q].tolist() == [mine != 0 and mine == cached[b, s] and s < first for s in range(S)]
            seen = [c == q or (mine != 0 and mine == segments[b, c] and c < q) for c in range(CHUNK)]
            assert own[b, q].tolist() == seen


@by_kind
def test_later_tokens_do_not_affect_earlier_ones(gate, alpha):
    model, tokens = make_model(change(TINY, gate=gate)), random_tokens(B, S)
    before = outputs(model, tokens, alpha)
    for changed in (0, 3, 4, 6, 10):
        other = tokens.copy()
        other[:, changed] = (other[:, changed] + 1) % TINY.vocab
        same = np.broadcast_to(np.arange(S) < changed, (B, S))
        assert_equal_where(same, before, outputs(model, other, alpha))


@transition_first
def test_gradient_of_a_token_is_causal(gate, alpha):
    """All tokens differ, so the gradient of an embedding is that of one token's input."""
    model, tokens = make_model(change(TINY, gate=gate)), np.arange(S)[None]
    weight = np.random.default_rng(0).standard_normal((TINY.loops, 1, S, TINY.width), np.float32)

    @jax.jit
    def gradients(model):
        """[S, S, D]: gradients of the loss at each token with respect to each token's embedding."""
        hidden = lambda model: jit_run(model, tokens, chunk_size=CHUNK, alpha=alpha).hidden
        _, pull_back = jax.vjp(hidden, model)
        at = jnp.eye(S)[:, None, None, :, None] * weight[None]
        return jax.vmap(lambda bar: pull_back(bar)[0].embed_tokens[...][:S])(at)

    size = np.abs(np.asarray(gradients(model))).max(-1)
    np.testing.assert_array_equal(np.triu(size, 1), 0)
    assert size[np.tril_indices(S)].min() > 0


@float64
@transition_first
def test_sequences_do_not_influence_each_other(gate, alpha):
    model, tokens = make_model(change(TINY, gate=gate)), random_tokens(B, S)
    other = tokens.copy()
    other[1] = (other[1] + 1) % TINY.vocab
    same = np.broadcast_to(np.array([[True], [False]]), (B, S))
    assert_equal_where(same, outputs(model, tokens, alpha), outputs(model, other, alpha))
    alone = outputs(model, tokens[:1], alpha)
    for name, x in outputs(model, tokens, alpha).items():
        np.testing.assert_allclose(x[:1], alone[name], rtol=1e-11, atol=1e-11, err_msg=name)


@float64
@transition_first
def test_packed_documents_do_not_influence_each_other(gate, alpha):
    """Results are bitwise equal if another document changes, and equal to rounding if the document is alone."""
    model, tokens = make_model(change(TINY, gate=gate)), random_tokens(B, S)
    segments = np.broadcast_to(np.repeat([1, 2, 0], [4, 5, 2]), (B, S)).astype(np.int32)
    packed = outputs(model, tokens, alpha, segments)
    for document in (1, 2):
        other = np.where(segments == document, (tokens + 1) % TINY.vocab, tokens)
        assert_equal_where(segments != document, packed, outputs(model, other, alpha, segments))
    # The second document starts at a chunk boundary, so that it has the same chunks if it is alone.
    alone = outputs(model, tokens[:, 4:9], alpha)
    for name, x in alone.items():
        np.testing.assert_allclose(packed[name][:, 4:9], x, rtol=1e-11, atol=1e-11, err_msg=name)


@transition_first
def test_no_token_attends_to_padding(gate, alpha):
    """Padding before, between and after documents affects no document and receives no gradient."""
    model = make_model(change(TINY, gate=gate))
    tokens = np.arange(S)[None]
    segments = np.array([[0, 0, 1, 1, 1, 0, 2, 2, 2, 0, 0]], np.int32)
    padding = segments == 0
    other = np.where(padding, TINY.vocab - 1, tokens)
    assert_equal_where(~padding, outputs(model, tokens, alpha, segments), outputs(model, other, alpha, segments))

    @jax.jit
    @jax.grad
    def gradient(model):
        hidden = jit_run(model, tokens, chunk_size=CHUNK, alpha=alpha, segments=segments).hidden
        return jnp.sum(jnp.sin(hidden) * ~padding[None, ..., None])

    size = np.abs(np.asarray(gradient(model).embed_tokens[...]))[:S].max(-1)
    np.testing.assert_array_equal(size > 0, ~padding[0])


def test_equal_segment_ids_are_one_document():
    """This holds even if they are not adjacent, so a packer must not use an id twice in a sequence."""
    model, tokens = make_model(TINY), random_tokens(1, 6)
    twice, apart = (
        outputs(model, tokens, None, np.array([ids], np.int32)) for ids in ([1, 1, 2, 2, 1, 1], [1, 1, 2, 2, 3, 3])
    )
    np.testing.assert_array_equal(twice["hidden"][:, :4], apart["hidden"][:, :4])
    assert np.abs(twice["hidden"] - apart["hidden"])[:, 4:].max() > 1e-3


@pytest.mark.parametrize("changes", [{"gate": "none"}, {"window": 2, "sweeps": 2}], ids=str)
def test_reading_in_place_changes_nothing(changes):
    """Views of the stacked entries give the same hidden states and entries as slices of them."""
    model, tokens = reconfigure(make_model(), **changes), random_tokens(2, 3)
    empty = create_cache(model.config, 2, 12, model.dtype)
    random = lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype)
    cache = jax.tree.map(random, empty)._replace(segments=jnp.ones_like(empty.segments))
    if cache.window is not None:
        cache = cache._replace(window=cache.window._replace(segments=jnp.ones_like(empty.window.segments)))
    want, got = (jax.jit(run_chunk)(model, tokens, read, 7) for read in (cache, cache.in_place()))
    jax.tree.map(np.testing.assert_array_equal, got, want)
