"""Tokenizers: the arithmetic one has exactly the task's vocabulary; streaming returns whole characters."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import melt_jax
from melt_jax.config import InputError
from melt_jax.data import arithmetic
from melt_jax.data.arithmetic_tokenizer import tokenizer_errors, tokenizer_files, write_tokenizer
from melt_jax.data.text import Tokenizer

PROPERTY = settings(deadline=None, derandomize=True, database=None)
NANO = pathlib.Path(melt_jax.__file__).parent / "assets/ouro_nano"


@pytest.fixture(scope="module")
def nano():
    return Tokenizer(NANO)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE tokenizer like Ouro's, with few merges: most non-ASCII characters take several tokens."""
    folder = tmp_path_factory.mktemp("byte_level")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the looped transformer keeps one entry for each token and layer"] * 4, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def make_problem(seed, definitions=3):
    return arithmetic.make_problem(np.random.default_rng(seed), definitions)


# The arithmetic tokenizer


@pytest.mark.parametrize("name", tokenizer_files())
def test_committed_files_match_the_generator(name):
    assert json.loads((NANO / name).read_text()) == json.loads(tokenizer_files()[name])


def test_written_tokenizer_opens(tmp_path):
    write_tokenizer(tmp_path / "new")
    assert Tokenizer(tmp_path / "new").encode("a=4") == arithmetic.encode("a=4")


def test_one_token_per_character(nano):
    assert nano.vocab == len(arithmetic.VOCABULARY)
    for token, i in arithmetic.VOCABULARY.items():
        assert nano.encode(token) == [i] and nano.decode([i]) == token
    assert nano.encode(arithmetic.CHARACTERS) == arithmetic.encode(arithmetic.CHARACTERS)


@PROPERTY
@given(st.lists(st.sampled_from(list(arithmetic.VOCABULARY)), max_size=30))
def test_arithmetic_text_round_trips(nano, pieces):
    ids = [arithmetic.VOCABULARY[piece] for piece in pieces]
    assert nano.encode("".join(pieces)) == ids and nano.decode(ids) == "".join(pieces)


def test_other_tokenizers_are_refused_for_arithmetic(nano, byte_level, tmp_path):
    assert tokenizer_errors(NANO) == tokenizer_errors(tmp_path) == []
    (message,) = tokenizer_errors(byte_level.folder)
    assert message.startswith(f"{byte_level.folder}: expected the tokenizer of the arithmetic task")
    (tmp_path / "tokenizer.json").write_text("{")
    (message,) = tokenizer_errors(tmp_path)
    assert message.startswith(f"{tmp_path}/tokenizer.json: expected a tokenizer, found")


def test_special_tokens_can_be_skipped(nano):
    problem = make_problem(0)
    assert nano.decode(problem.prompt, skip_special=True) == problem.question


def test_characters_without_a_token_are_named(nano):
    with pytest.raises(ValueError, match="no token for 'Aé'"):
        nano.encode("éa=A")


# Chat


@pytest.mark.parametrize("definitions", [1, 2, 5])
def test_chat_renders_the_prompt_of_the_task(nano, definitions):
    problem = make_problem(definitions, definitions)
    user = {"role": "user", "content": problem.question}
    assert nano.chat([user]) == problem.prompt
    assistant = {"role": "assistant", "content": f"{problem.steps}</think>{problem.answer}"}
    assert nano.chat([user, assistant]) == problem.prompt + problem.completion
    assert nano.chat([user, assistant, user]) == problem.prompt + problem.completion + problem.prompt


def test_docstring_example_of_chat_holds(nano):
    ids = nano.chat([{"role": "user", "content": "c=b*3;a=4;b=a+2;c?"}])
    assert nano.decode(ids) == "<|im_start|>c=b*3;a=4;b=a+2;c?<think>"


def test_invalid_chats_are_errors(nano, byte_level):
    with pytest.raises(ValueError, match="at least one message"):
        nano.chat([])
    with pytest.raises(ValueError, match="expected a chat template"):
        byte_level.chat([{"role": "user", "content": "a"}])
    with pytest.raises(Exception, match="expected the role user or assistant, found system"):
        nano.chat([{"role": "system", "content": "a"}])


# Any tokenizer


def test_stop_ids_come_from_all_files(nano, byte_level, tmp_path):
    assert nano.stop_ids == (arithmetic.STOP,)
    assert byte_level.stop_ids == (0, 2)
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    assert Tokenizer(tmp_path).stop_ids == (0, 2, 7)


class ReadOnly:
    """A tokenizer, or its backend, that fails on calls that would change it."""

    def __init__(self, part):
        self._part = part

    @property
    def backend_tokenizer(self):
        return ReadOnly(self._part.backend_tokenizer)

    def __getattr__(self, name):
        assert name not in ("no_truncation", "no_padding", "enable_truncation", "enable_padding"), name
        return getattr(self._part, name)


def test_truncation_and_padding_are_disabled(tmp_path):
    write_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    # Changing a backend while another thread encodes raises "Already borrowed".
    tokenizer._tokenizer = ReadOnly(tokenizer._tokenizer)
    texts = ["a=4;b=a+2;b?", "a"]
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many(texts) == [arithmetic.encode(text) for text in texts]


def test_sha256_is_that_of_the_file(nano):
    assert nano.sha256 == hashlib.sha256((NANO / "tokenizer.json").read_bytes()).hexdigest()


def test_missing_files_are_all_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json and tokenizer_config.json, found none; copy"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_files_are_named(tmp_path, name):
    write_tokenizer(tmp_path)
    for content in (b"", b"[]", b"{", b"null", b"\xe9", b"[" * 100_000):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: expected a JSON object, found "):
            Tokenizer(tmp_path)


def test_wrong_objects_are_refused(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match=r"generation_config\.json: expected ids in eos_token_id, found 'x'"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="expected the tokenizer of a published checkpoint, found files that cannot"):
        Tokenizer(tmp_path)


def test_opening_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network access")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert Tokenizer(NANO).encode("a") == [17]


TEXTS = ["the looped transformer", "naïve — 日本語 🙂🙃 ok", "🙂", " leading and trailing ", "a <|im_end|> é"]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_whole_characters(byte_level, text):
    ids = byte_level.encode(text)
    streamer = byte_level.stream()
    pieces = [streamer.push(i) for i in ids]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert streamer.finish() == ""
    if "🙂" in text:
        assert "" in pieces


@pytest.mark.parametrize("text", ["the looped transformer", "naïve — 日本語 🙂🙃 ok", "a<|im_end|>\n\n🙂 é"])
def test_boundaries_separate_whole_characters(byte_level, text):
    ids = byte_level.encode(text)
    texts = [byte_level.decode(ids[:n]) for n in range(len(ids) + 1)]
    boundaries = {len(part) for part in texts if text.startswith(part)}
    for limit in range(len(text) + 1):
        assert byte_level.last_boundary(text, limit) == max(n for n in boundaries if n <= limit)


def test_boundary_needs_tokens_for_all_characters(nano):
    with pytest.raises(ValueError, match="no token for 'é'"):
        nano.last_boundary("aé", 1)


@PROPERTY
@given(st.data())
def test_streaming_equals_decoding(byte_level, data):
    """This holds for any ids, even those of incomplete characters."""
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab - 1), max_size=12))
    streamer = byte_level.stream()
    assert "".join(map(streamer.push, ids)) + streamer.finish() == byte_level.decode(ids)


def test_incomplete_character_is_replaced(byte_level):
    ids = byte_level.encode("a🙂")[:-1]
    streamer = byte_level.stream()
    assert "".join(map(streamer.push, ids)) == "a"
    assert streamer.finish() == "\ufffd"
