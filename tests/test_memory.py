"""Memory of generation: the figures are those of the caches that generation allocates, and of the paper."""

import dataclasses
import functools

import jax
import pytest

from melt_jax import ModelConfig, memory
from melt_jax.analysis.memory import PAPER, PAPER_LENGTH, Model, published_models, weight_bytes
from melt_jax.inference.generation import cache_bytes, prepare_prefill
from melt_jax.model.model import abstract_model
from tests.helpers.tiny import TINY

MODELS = {model.name: model for model in published_models([50, 128])}
PROMPT, CHUNK = 512, 512


def allocated(config: ModelConfig, length: int, batch: int = 1):
    """The cache that generation allocates for `batch` sequences of `length` tokens, as shapes and dtypes."""
    prompts = [[0] * PROMPT] * batch
    prepare = functools.partial(prepare_prefill, prompts=prompts, max_new_tokens=length - PROMPT, chunk=CHUNK)
    return jax.eval_shape(prepare, abstract_model(config, "bfloat16")).cache


@pytest.mark.parametrize("length", [PROMPT + 1, 32_000, 128_000])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "Qwen3-1.7B"])
@pytest.mark.parametrize("loops", [1, 4, 16])
def test_cache_is_what_generation_allocates(name, length, loops):
    """Besides the entries there is one int32 per slot of the cache and of the window."""
    model = MODELS[name].with_loops(loops)
    cache = allocated(model.config, length)
    assert cache_bytes(cache) == model.cache(length)
    slots = length + (0 if cache.window is None else model.config.window)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert whole - cache_bytes(cache) == 4 * slots


@pytest.mark.parametrize("gate, window", [("none", 0), ("elementwise", 0), ("elementwise", 7), ("mean", 7)])
def test_batches_and_grouped_heads_are_counted(gate, window):
    config = dataclasses.replace(TINY, gate=gate, window=window)
    model = Model("tiny", config, 0)
    assert cache_bytes(allocated(config, 700, batch=3)) == 3 * model.cache(700)


@pytest.mark.parametrize("name", PAPER)
def test_figures_are_the_papers(name):
    """Cache per token, cache and weights agree to the digits printed; the paper's totals are not sums."""
    model, paper = MODELS[name], PAPER[name]
    assert model.per_token / 1e6 == pytest.approx(paper.per_token, abs=5e-4)
    assert model.cache(PAPER_LENGTH) / 1e9 == pytest.approx(paper.cache, abs=5e-3)
    assert model.weights / 1e9 == pytest.approx(paper.weights, abs=5e-4)
    assert model.total(PAPER_LENGTH) / 1e9 == pytest.approx(paper.total, abs=0.08)


def test_only_the_window_grows_with_loops():
    """A MELT's bytes per token do not depend on T; its window takes (T − 1)·W entries; Qwen3 has no loops."""
    for name, model in MODELS.items():
        one, four = model.with_loops(1), model.with_loops(4)
        assert (four.per_token == 4 * one.per_token) == name.startswith("Ouro")
        assert four.per_sequence == 3 * four.config.window * four.per_token and one.per_sequence == 0
    assert MODELS["Qwen3-1.7B"].with_loops(16) is MODELS["Qwen3-1.7B"]


def test_weights_are_those_of_the_published_files():
    """The tensors of the 1.4B's file; the file also has a header of a few kilobytes."""
    assert weight_bytes(ModelConfig()) == 2 * 1_434_652_673
    assert MODELS["Ouro-2.6B"].weights == 2 * 2_667_974_657
    assert MODELS["MELT-1.6B"].weights == MODELS["MELT-1.6B, W = 50"].weights == 2 * 1_636_028_417


def test_tables_have_a_row_per_model():
    models = memory.models_of(None, [128, 50])
    lines = memory.tables(models, 32_000, [1, 16], [1_000, 128_000]).splitlines()
    melt = next(line for line in lines if line.startswith("MELT-1.6B, W = 50"))
    assert melt.split()[4:10] == ["4", "196,608", "29,491,200", "6.32", "3.272", "9.59"]
    assert [line.split()[1:] for line in lines if line.startswith("Ouro-1.4B ")] == [
        ["4", "786,432", "0", "25.17", "2.869", "28.04", "0.786", "25.17", "2.869", "27.97"],
        ["9.16", "103.53"],
        ["3.66", "103.53"],
    ]
    assert sum(line.startswith("Qwen3") for line in lines) == 3


def test_folder_is_shown_as_looplm_and_melt():
    models = memory.models_of("tests/golden/melt_tiny_gqa", [5])
    assert [(model.name, model.config.gate, model.config.window) for model in models] == [
        ("LoopLM", "none", 0), ("MELT", "elementwise", 0), ("MELT, W = 5", "elementwise", 5)
    ]  # fmt: skip
    text = memory.tables(models, 100, [1, 2], [10])
    assert "cache, MB" in text and "paper" not in text


def test_figure_has_a_line_per_model():
    models = memory.models_of(None, [50])
    left, right = memory.draw(models, 1_000, [1, 4], [1_000, 2_000]).axes
    for axes in (left, right):
        assert [line.get_label() for line in axes.lines] == [model.name for model in models]
    looplm, melt = left.lines[:2]
    assert list(melt.get_ydata()) == [models[1].total(1_000) / 1e9] * 4
    assert list(looplm.get_ydata()) == [models[0].with_loops(t).total(1_000) / 1e9 for t in (1, 2, 3, 4)]
    assert list(right.lines[0].get_ydata()) == [models[0].total(n) / 1e9 for n in (0, 1_000, 2_000)]
