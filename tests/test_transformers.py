"""An exported folder in transformers: the same logits, tokens and answers as by JAX, from a cache that overwrites."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import dynamic_module_utils

from melt_jax.checkpoints.orbax import open_model
from melt_jax.checkpoints.published import save_published, to_hf_tensors
from melt_jax.convert import Changes, convert
from melt_jax.data import arithmetic
from melt_jax.inference.answers import exact_answers, fresh_problems
from tests.helpers.hf import completions, generated, generated_by_jax, left_padded, open_exported
from tests.helpers.marks import slow
from tests.helpers.tiny import TINY, make_model

GOLDEN = pathlib.Path(__file__).parent / "golden"
NANO = "melt_jax/assets/ouro_nano"
BOUND = 2e-4  # of logits that JAX and PyTorch compute in float32
NEW = 64


def read_json(name):
    return json.loads((GOLDEN / name).read_text())


# config changes of a golden MELT, and the golden array [T, B, S, D] of its hidden states
VARIANTS = {
    "melt_tiny": [
        *(({"chunk_size": chunk}, f"chunk{chunk}_hidden") for chunk in (1, 4, 24)),
        *(({"chunk_size": 4, "gate": gate}, f"gate_{gate}_hidden") for gate in ("scalar", "mean", "ema", "last")),
        ({"chunk_size": 4, "first_loop": "gated"}, "first_gated_hidden"),
    ],
    "melt_tiny_gqa": [
        ({"chunk_size": 6}, "chunk6_hidden"),
        ({"chunk_size": 6, "gate": "scalar"}, "gate_scalar_hidden"),
    ],
    "window_tiny": [
        ({"chunk_size": chunk, "window": window, "sweeps": sweeps}, f"case{i}_hidden")
        for i, (chunk, window, sweeps, alpha) in enumerate(read_json("window_tiny/golden.json")["cases"])
        if alpha is None
    ],
    **{name: [({}, "hidden")] for name in ("ouro_tiny", "ouro_tiny_gqa", "ouro_tiny_sharded")},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_module_cache(tmp_path_factory):
    """Keeps the code of exported folders out of the user's cache, and PyTorch to one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.syspath_prepend(dynamic_module_utils.HF_MODULES_CACHE)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folders of the goldens and of the embedded LoopLM, exported."""
    folder = tmp_path_factory.mktemp("exported")
    for name in VARIANTS:
        convert(GOLDEN / name, folder / name, "published")
    convert(NANO, folder / "nano", "published")
    convert(NANO, folder / "nano_melt", "published", Changes(gate="elementwise"))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "array"),
    [(name, changes, array) for name, cases in VARIANTS.items() for changes, array in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hidden_states_equal_reference(exported, name, changes, array):
    """Every loop's, for every gate variant, chunk, window and sweep; of a LoopLM, as the public implementation's."""
    golden = np.load(GOLDEN / name / "golden.npz")
    model = open_exported(exported / name, **changes)
    assert type(model).__name__ == ("OuroForCausalLM" if name.startswith("ouro") else "MeltForCausalLM")
    with torch.no_grad():
        out = model(torch.tensor(golden["input_ids"]), output_hidden_states=True)
    np.testing.assert_allclose(torch.stack(out.hidden_states[1:]), golden[array], atol=BOUND, rtol=0)


@pytest.mark.parametrize(
    "name", ["ouro_tiny_gqa", "melt_tiny", "window_tiny", slow("ouro_tiny"), slow("melt_tiny_gqa")]
)
def test_greedy_tokens_equal_reference(exported, name):
    golden, changes = np.load(GOLDEN / name / "golden.npz"), {}
    if not name.startswith("ouro"):
        settings = read_json(f"{name}/golden.json")
        values = settings["greedy"] if name == "window_tiny" else [settings["prefill"]]
        changes = dict(zip(("chunk_size", "window", "sweeps"), values))
    tokens, logits = generated(
        open_exported(exported / name, **changes), golden["prompt_ids"].tolist(), golden["gen_ids"].shape[1]
    )
    assert tokens.tolist() == golden["gen_ids"].tolist()
    if "gen_logits" in golden:
        np.testing.assert_allclose(logits, golden["gen_logits"], atol=BOUND, rtol=0)


@pytest.mark.parametrize(
    ("changes", "chunk"),
    [
        ({"window": 3, "sweeps": 2}, 7),
        ({"gate": "none", "exit_threshold": 0.6}, 5),
        slow({"gate": "scalar", "first_loop": "gated"}, 5),
        slow({"tied": True, "exit_threshold": 0.6}, 3),
        slow({"window": 5, "first_loop": "gated", "kv_heads": 4}, 6),
        slow({"gate": "mean", "window": 2}, 4),
    ],
)  # fmt: skip
def test_padded_batches_generate_as_jax(float64, tmp_path, changes, chunk):
    """Prompts of several lengths, one longer than two chunks and the window; logits of prefill and decoding.

    In float64, of weights that float32 holds: rounding would grow over 64 tokens of a random model. transformers
    rounds the logits to float32.
    """
    model = make_model(dataclasses.replace(TINY, **{"max_positions": 128, **changes}))
    model = jax.tree.map(lambda x: x.astype(np.float32).astype(np.float64), model)
    save_published(tmp_path / "model", model, dtype="float32")
    prompts = [[5, 1, 7], list(range(1, 18)), [9], list(range(20, 9, -1))]
    replaced = {} if "none" in changes.values() else {"chunk_size": chunk}
    tokens, logits = generated(open_exported(tmp_path / "model", torch.float64, **replaced), prompts, NEW)
    want_tokens, want_logits = generated_by_jax(model, prompts, NEW, chunk)
    np.testing.assert_allclose(logits, want_logits, atol=1e-9, rtol=2**-23)
    assert tokens.tolist() == want_tokens.tolist()


@pytest.mark.parametrize("name", ["nano", "nano_melt"])
def test_answers_equal_those_of_jax(exported, name):
    """Every token of every completion; the LoopLM solves the problems."""
    problems = fresh_problems(3, 12)
    want = exact_answers(open_model(exported / name), problems, 16)
    changes = {} if name == "nano" else {"chunk_size": 16}
    found = completions(open_exported(exported / name, **changes), problems, arithmetic.STOP)
    assert found == want.completions
    if name == "nano":
        assert want.answer_exact.mean() > 0.9


def test_the_cache_overwrites_entries(exported):
    """A MELT keeps one entry per token and layer, a LoopLM one per loop."""
    for name, layers in (("melt_tiny", 3), ("ouro_tiny", 3 * 4)):
        model = open_exported(exported / name)
        with torch.no_grad():
            out = model(torch.arange(3, 13)[None], use_cache=True)
            out = model(torch.tensor([[5]]), **{_cache_name(): out[_cache_name()]}, use_cache=True)
        cache = out[_cache_name()]
        assert len(cache.layers) == layers
        assert {tuple(layer.keys.shape) for layer in cache.layers} == {(1, 4, 11, 16)}


def test_cut_prompts_continue(exported):
    """With a window of the whole sequence a model does not depend on chunks, so a prompt may be cut anywhere."""
    model = open_exported(exported / "window_tiny", window=63, chunk_size=4)
    inputs = left_padded([list(range(3, 20)), [7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        whole = model(**inputs).logits
        first = model(inputs["input_ids"][:, :13], attention_mask=inputs["attention_mask"][:, :13], use_cache=True)
        cache = {_cache_name(): first[_cache_name()]}
        second = model(inputs["input_ids"][:, 13:], attention_mask=inputs["attention_mask"], **cache)
    both = torch.cat([first.logits, second.logits], 1)
    real = inputs["attention_mask"].bool()
    np.testing.assert_allclose(both[real], whole[real], atol=BOUND, rtol=0)


def test_beams_keep_their_own_entries(exported):
    """The scores of beam search, which reorders the cache, are those of the sequences that it returns."""
    model = open_exported(exported / "window_tiny", window=63, chunk_size=4)
    inputs = left_padded([[3, 4, 5, 6, 7, 8], [9, 10]])
    out = model.generate(
        **inputs, max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=-1, pad_token_id=0, length_penalty=0.0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = model(out.sequences, attention_mask=mask).logits[:, -13:-1].log_softmax(-1)
    scores = logits.gather(2, out.sequences[:, -12:, None])[..., 0].sum(1)
    np.testing.assert_allclose(out.sequences_scores, scores, atol=1e-3, rtol=0)


def test_sampling_follows_its_seed(exported):
    model = open_exported(exported / "window_tiny", chunk_size=4, window=3)
    draw = lambda seed: (
        transformers.set_seed(seed),
        model.generate(
            **left_padded([[3, 4, 5], [6]]), max_new_tokens=8, do_sample=True, temperature=1.0, top_p=0.9,
            num_return_sequences=3, eos_token_id=-1, pad_token_id=0,
        ),
    )[1]  # fmt: skip
    first = draw(1)
    assert first.shape == (6, 11) and torch.equal(first, draw(1)) and not torch.equal(first, draw(2))
    assert len({tuple(row) for row in first[:3].tolist()}) > 1


@pytest.mark.parametrize("name", ["window_tiny", "ouro_tiny_gqa"])
def test_saved_folders_open_everywhere(exported, tmp_path, name):
    """`save_pretrained` writes the code too, and melt_jax reads the folder: the same weights and config."""
    changes = {} if name.startswith("ouro") else {"window": 3, "chunk_size": 4}
    model = open_exported(exported / name, **changes)
    model.save_pretrained(tmp_path / "saved")
    again = open_exported(tmp_path / "saved")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    read = open_model(tmp_path / "saved", dtype="float32")
    want = open_model(exported / name, window=changes.get("window"))
    assert read.config == want.config
    ours, theirs = to_hf_tensors(want), to_hf_tensors(read)
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_gradients_reach_earlier_chunks(exported):
    """The derivative of the loss along random weights is the difference quotient."""
    model = open_exported(exported / "window_tiny", window=2, sweeps=2, chunk_size=5).double()
    tokens = torch.arange(3, 19)[None]
    torch.manual_seed(0)
    directions = [torch.randn_like(weight) for weight in model.parameters()]

    def loss(step):
        with torch.no_grad():
            for weight, direction in zip(model.parameters(), directions):
                weight += step * direction
        return model(tokens, labels=tokens).loss

    loss(0.0).backward()
    slope = sum((w.grad * d).sum() for w, d in zip(model.parameters(), directions) if w.grad is not None)
    with torch.no_grad():
        quotient = (loss(1e-4) - loss(-2e-4)) / 2e-4
    np.testing.assert_allclose(slope, quotient, rtol=1e-3)


def test_loss_is_divided_by_the_trainers_count(exported):
    """`Trainer` gives the number of labels of all micro-batches of a step."""
    model, tokens = open_exported(exported / "melt_tiny"), torch.arange(3, 9)[None]
    mean = model(tokens, labels=tokens).loss
    total = model(tokens, labels=tokens, num_items_in_batch=20).loss
    np.testing.assert_allclose(total.detach(), mean.detach() * 5 / 20, rtol=1e-6)


def test_bad_input_is_refused(exported):
    """Each error says what was expected and found."""
    model, tokens = open_exported(exported / "melt_tiny"), torch.arange(3, 9)[None]
    foreign = {_cache_name(): transformers.DynamicCache()}
    wrong = {_cache_name(): type(model(tokens, use_cache=True)[_cache_name()])(window=3)}
    opened = lambda **changes: lambda: open_exported(exported / "melt_tiny", **changes)
    for error, call in (
        ("attention_mask: expected", lambda: model(tokens, attention_mask=torch.ones(1, 1, 6, 6))),
        ("expected increasing positions", lambda: model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))),
        ("expected a MeltCache or None, found DynamicCache", lambda: model(tokens, **foreign)),
        ("cache: expected the model's window 0, found 3", lambda: model(tokens, **wrong)),
        ("gate: expected one of .*, found 'x'", opened(gate="x")),
        ("window: expected an integer, 0 or more, found -1", opened(window=-1)),
    ):
        with pytest.raises(ValueError, match=error):
            call()


def _cache_name():
    """`cache` or, before transformers 5.20, `past_key_values`."""
    fields = {field.name for field in dataclasses.fields(transformers.modeling_outputs.CausalLMOutputWithPast)}
    return "cache" if "cache" in fields else "past_key_values"
