"""Text and token ids: a model folder's own tokenizer and chat template, read only from its files."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import tokenizers

from melt_jax.config import InputError
from melt_jax.data.markers import ESCAPE, Markers
from melt_jax.files import COMPANIONS, PathLike, as_path, read_json, read_on_disk

CHAT_END = "<|im_end|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer:
    """The tokenizer of a model folder.

    Attributes:
      folder: the model folder.
      vocab: one more than the largest token id.
      stop_ids: sorted ids that end a text: the eos of generation_config.json and of the tokenizer, and the chat's end.
      eos, bos: ids of the tokenizer's own end and begin tokens, or None.
      special_tokens: the texts of the tokens that `decode` can skip.
      template: the chat template's source, or None.
      has_thinking: the chat template depends on `enable_thinking`.
      sha256, template_sha256: hex digests of tokenizer.json and of the chat template (None without one), which identify
        them in prepared data.
    """

    def __init__(self, folder: PathLike):
        """Opens the tokenizer in a folder, without network access.

        Raises:
          FileNotFoundError: lists the tokenizer files missing from the folder.
          InputError: the files cannot be read.
        """
        self.folder = as_path(folder)
        missing = [name for name in TOKENIZER_FILES if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: expected {' and '.join(missing)}, found none; copy the tokenizer files from the"
                " published checkpoint"
            )
        try:
            self._read()
        except InputError:
            raise
        except Exception as error:  # the libraries raise almost anything for files that are not a tokenizer's
            for name in TOKENIZER_FILES:
                read_json(self.folder / name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(
                f"{self.folder}: expected the tokenizer of a published checkpoint, found files that cannot be read"
                f" ({reason}); copy the tokenizer files again"
            ) from error

    def _read(self):
        with read_on_disk(self.folder, COMPANIONS) as on_disk:
            self._tokenizer = _load(on_disk)
        # Set once: a backend must not be changed while another thread encodes with it.
        self._tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer.backend_tokenizer.no_padding()
        self.sha256 = hashlib.sha256((self.folder / "tokenizer.json").read_bytes()).hexdigest()
        self.vocab: int = max(self._tokenizer.get_vocab().values()) + 1
        self.stop_ids = self._find_stop_ids()
        self.eos: int | None = self._tokenizer.eos_token_id
        self.bos: int | None = self._tokenizer.bos_token_id
        added = list(self._tokenizer.added_tokens_decoder.values())
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        self._markers = Markers(added, normalizer.normalize_str if normalizer else None)
        self.special_tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self.template = self._tokenizer.chat_template
        self.template_sha256 = hashlib.sha256(str(self.template).encode()).hexdigest() if self.template else None
        self.has_thinking = "enable_thinking" in str(self.template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens in the text become their ids, unless protected; none are added.

        Raises:
          InputError: the tokenizer has no token for some characters.
        """
        try:
            return self._encode(text)
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises no narrower class
            missing = "".join(sorted(c for c in self._characters(text) if not self._knows(c)))
            if not missing:
                raise
            raise InputError(f"{self.folder}: the tokenizer has no token for {missing!r}; rewrite the text") from error

    def encode_many(self, texts: Sequence[str]) -> list[list[int] | InputError]:
        """`encode` of each text, on all cores, with the InputError in place of the ids of a text that fails."""
        backend = self._tokenizer.backend_tokenizer
        if any(ESCAPE in text for text in texts):
            return [self._encode_or_error(text) for text in texts]
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:  # as in `encode`; only trying each text shows which one failed
            return [self._encode_or_error(text) for text in texts]

    def last_boundary(self, text: str, limit: int) -> int:
        """The last token boundary within a text's first `limit` characters, as the number of characters before it.

        Raises:
          InputError: as `encode`.
        """
        try:
            offsets = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
        except Exception:  # as in `encode`, which names the characters
            self.encode(text)
            raise
        starts = [start for start, _ in offsets[1:]] + [len(text)]
        # Several tokens may share a character: only the last of them ends before the next one starts.
        ends = [end for (_, end), start in zip(offsets, starts) if end <= min(start, limit)]
        return ends[-1] if ends else 0

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of token ids, with special tokens written out unless skipped."""
        ids = [int(i) for i in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def protect(self, value: Any) -> Any:
        """A text or messages, changed so that `encode` reads markers of special tokens in them as ordinary text.

        Raises:
          InputError: see `Markers.protect`.
        """
        return self._markers.protect(value)

    def chat(self, messages: list[dict], thinking: bool = True, allow_special_tokens: bool = False) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template.

        Args:
          messages: [{"role": "user" or another role of the template, "content": text}, …]. Unless the last message is
            the assistant's, the ids end with the generation prompt.
          thinking: passed to the template as `enable_thinking`; the generation prompt of a Thinking model then ends
            with `<think>`, which the model does not write itself.
          allow_special_tokens: special tokens in messages become their ids; otherwise they are ordinary text.

        Raises:
          InputError: no messages, no chat template, or one that rejects the messages.
        """
        if not messages:
            raise InputError("chat: expected at least one message, found none")
        if not self._tokenizer.chat_template:
            raise InputError(
                f"{self.folder}: expected a chat template in tokenizer_config.json, found none; give the prompt as"
                " plain text"
            )
        unfinished = messages[-1]["role"] != "assistant"
        try:
            text = self.render(messages if allow_special_tokens else self.protect(messages), unfinished, thinking)
        except InputError:
            raise
        except Exception as error:  # a template may raise anything
            raise InputError(f"{self.folder}: the chat template rejects the messages: {error}") from error
        return self.encode(text)

    def render(
        self, messages: list[dict], generation_prompt: bool, thinking: bool = True, unfinished: bool = False
    ) -> str:
        """The text of a conversation in the chat template, with or without a generation prompt at its end.

        Messages from others must be protected before. Templates run in a sandbox of the transformers library.
        `unfinished` leaves the last message open, so that a model can continue it.
        """
        return self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            continue_final_message=unfinished,
            enable_thinking=thinking,
        )

    def stream(self, skip_special: bool = False) -> "Streamer":
        """A `Streamer` for one text."""
        return Streamer(self, skip_special)

    def _characters(self, text):
        """The characters of a text outside its special tokens."""
        characters = set()
        for part, is_marker in self._markers.split(text):
            for special in () if is_marker else self.special_tokens:
                part = part.replace(special, "")
            characters |= set(part)
        return characters

    def _encode(self, text):
        if ESCAPE not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        ids = []
        for part, is_marker in self._markers.split(text):
            ids += self._encode_marker(part) if is_marker else self._tokenizer.encode(part, add_special_tokens=False)
        return ids

    def _encode_marker(self, text):
        """The ids of a marker as ordinary text."""
        ids = self._without_added_tokens.encode(text, add_special_tokens=False).ids
        if any(i in self._tokenizer.added_tokens_decoder for i in ids):
            raise InputError(f"{self.folder}: the tokenizer cannot encode {text!r} as ordinary text; rewrite the text")
        return ids

    @functools.cached_property
    def _without_added_tokens(self):
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))

    def _encode_or_error(self, text):
        try:
            return self.encode(text)
        except InputError as error:
            return error

    def _knows(self, character):
        try:
            return bool(self._encode(character))
        except Exception:  # as in `encode`
            return False

    def _find_stop_ids(self) -> tuple[int, ...]:
        file = self.folder / "generation_config.json"
        declared = read_json(file).get("eos_token_id") if file.is_file() else None
        stops = set(declared if isinstance(declared, list) else [declared])
        if not all(stop is None or (type(stop) is int and 0 <= stop < 2**31) for stop in stops):
            raise InputError(f"{file}: expected ids in eos_token_id, found {declared!r:.100}")
        stops |= {self._tokenizer.eos_token_id, self._tokenizer.get_vocab().get(CHAT_END)}
        return tuple(sorted(stop for stop in stops if stop is not None))


class Streamer:
    """Converts tokens to text as they arrive, in whole characters.

    A token of a byte-level tokenizer may hold part of a character; it is held back until the rest arrives. The pieces
    and the result of `finish`, joined, equal `decode` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._context, self._pending = [], []

    def push(self, token: int) -> str:
        """The text completed by a token; may be empty."""
        self._pending.append(int(token))
        text = self._pending_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """The text still held back; incomplete characters become replacement characters."""
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self):
        # Decoded after the tokens before them: some tokenizers treat a text's first token differently.
        decode = lambda ids: self._tokenizer.decode(ids, self._skip_special)
        return decode(self._context + self._pending)[len(decode(self._context)) :]


def _load(folder):
    # Imported here because it takes seconds and training on arithmetic does not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # no advice to install PyTorch
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
