"""Text and token ids: a checkpoint folder's own tokenizer and chat template, read from its files alone."""

import hashlib
import json
import os
import pathlib

from melt_jax.config import InputError

CHAT_END = "<|im_end|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Attributes:
      folder: where its files stand.
      vocab: one more than the largest token id.
      stop_ids: the ids that end a text, sorted: the eos of generation_config.json and of the tokenizer, the chat's end.
      eos: the tokenizer's own end of a text, an id, or None.
      template: the chat template's source, or None.
      sha256, template_sha256: hex digests of tokenizer.json and of the chat template, by which prepared data says what
        it was written with; the second is None without a template.
    """

    def __init__(self, folder):
        """Opens the tokenizer in a folder; never asks the network.

        Raises:
          FileNotFoundError: the tokenizer files that the folder lacks.
        """
        self.folder = pathlib.Path(folder)
        missing = [name for name in TOKENIZER_FILES if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: no {' and no '.join(missing)}; copy the tokenizer files from the published checkpoint"
            )
        self._tokenizer = _load(self.folder)
        # Here, once: a backend is not changed while another thread encodes with it.
        self._tokenizer.backend_tokenizer.no_truncation()
        self._tokenizer.backend_tokenizer.no_padding()
        self.sha256 = hashlib.sha256((self.folder / "tokenizer.json").read_bytes()).hexdigest()
        self.vocab = max(self._tokenizer.get_vocab().values()) + 1
        self.stop_ids = self._find_stop_ids()
        self.eos = self._tokenizer.eos_token_id
        self.template = self._tokenizer.chat_template
        self.template_sha256 = hashlib.sha256(str(self.template).encode()).hexdigest() if self.template else None

    def encode(self, text):
        """Token ids of a text; special tokens written out in it become their ids, and none are added.

        Raises:
          InputError: characters for which the tokenizer has no token.
        """
        try:
            return self._encode(text)
        except Exception as error:  # the tokenizers library raises no narrower class
            missing = "".join(sorted({c for c in text if not self._knows(c)}))
            if not missing:
                raise
            raise InputError(f"{self.folder}: the tokenizer has no token for {missing!r}; rewrite the text") from error

    def encode_many(self, texts):
        """`encode` of each text, by all cores: a list of id lists, with the InputError in place of one that fails."""
        backend = self._tokenizer.backend_tokenizer
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:  # as in `encode`; which text it was is found by trying each
            return [self._encode_or_error(text) for text in texts]

    def last_boundary(self, text, limit):
        """The last place between tokens of a text within its first `limit` characters: characters before it.

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

    def decode(self, ids, skip_special=False):
        """The text of token ids; special tokens are written out unless skipped."""
        ids = [int(i) for i in ids]
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def chat(self, messages: list[dict], thinking: bool = True) -> list[int]:
        """Token ids of a conversation in the checkpoint's chat template.

        Args:
          messages: [{"role": "user" or another role of the template, "content": text}, …]. Unless the last message is
            the assistant's, the ids end with the generation prompt.
          thinking: passed to the template as `enable_thinking`; the generation prompt of a Thinking model then ends
            with `<think>`, which the model does not write itself.

        Raises:
          InputError: no messages, or no chat template.
        """
        if not messages:
            raise InputError("chat: expected at least one message, found none")
        if not self._tokenizer.chat_template:
            raise InputError(f"{self.folder}: no chat template in tokenizer_config.json; give the prompt as plain text")
        return self.encode(self.render(messages, messages[-1]["role"] != "assistant", thinking))

    def render(self, messages: list[dict], generation_prompt: bool, thinking: bool = True) -> str:
        """The text of a conversation in the chat template, with or without a generation prompt at its end."""
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, enable_thinking=thinking
        )

    def stream(self, skip_special=False):
        """A `Streamer` for one text."""
        return Streamer(self, skip_special)

    def _encode(self, text):
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode_or_error(self, text):
        try:
            return self.encode(text)
        except ValueError as error:
            return error

    def _knows(self, character):
        try:
            return bool(self._encode(character))
        except Exception:  # as in `encode`
            return False

    def _find_stop_ids(self):
        file = self.folder / "generation_config.json"
        declared = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        stops = set(declared if isinstance(declared, list) else [declared])
        stops |= {self._tokenizer.eos_token_id, self._tokenizer.get_vocab().get(CHAT_END)}
        return tuple(sorted(stops - {None}))


class Streamer:
    """Turns tokens into text as they come, in whole characters.

    A token of a byte-level tokenizer may hold part of a character; its text waits for the rest. The pieces and what
    `finish` returns, laid end to end, are `decode` of all the tokens.
    """

    def __init__(self, tokenizer, skip_special=False):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)
        self._context, self._pending = [], []

    def push(self, token):
        """The text that a token completes, or an empty string."""
        self._pending.append(int(token))
        text = self._pending_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self):
        """The text still waiting; bytes that are no character become replacement characters."""
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self):
        # Decoded behind the tokens before them: some tokenizers treat a text's first token differently.
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]


def _load(folder):
    # Imported on use: it takes seconds, which training on made problems can spare. It would advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
