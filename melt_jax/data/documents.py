"""Training documents: rows of jsonl and parquet files → chat template → tokens and a loss mask.

A row is a conversation (a list of messages), a question with its answer, or plain text. Rows are read in blocks, a few
at a time, so that memory does not grow with the files. The tokenizer uses all cores on a block; the documents' order
does not depend on the number of cores.
"""

import collections
import concurrent.futures
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from melt_jax.config import InputError
from melt_jax.data.text import Tokenizer
from melt_jax.files import Path, PathLike, as_path, file_bytes

SUFFIXES = (".jsonl", ".parquet")
MESSAGES, TEXT = ("messages", "conversations"), "text"
SCORES = ("assistant", "all")
# ShareGPT's role names, mapped to those of chat templates.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
CONTEXT, ANSWER, ALL = "context", "answer", "all"  # kinds of pieces: not scored, scored up to the stop token, scored
THINK = "<think>"
BLOCK_BYTES = 2**21  # text per call of the tokenizer, which needs about thirty times as much memory
BLOCK_ROWS = 4096
BLOCKS_AHEAD = 2  # one is read and rendered while the other is tokenized
Row = bytes | dict[str, Any]  # a jsonl line, or {column: value}


class Traits(NamedTuple):
    """Properties of a document that the manifest counts.

    Attributes:
      conversation: whether it was rendered with the chat template.
      unprompted: whether an assistant's turn does not begin with the template's generation prompt.
      extra_keys: keys of its messages other than role and content, sorted.
      markers: whether its messages or text contain the text of special tokens.
    """

    conversation: bool = False
    unprompted: bool = False
    extra_keys: tuple[str, ...] = ()
    markers: bool = False


class Document(NamedTuple):
    """Tokens of a document.

    Attributes:
      place: "file:line", from 1.
      tokens: [n] int32.
      loss_mask: [n] bool, true if the prediction made at this token, of the next one, is scored.
      traits: `Traits`.
    """

    place: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    traits: Traits = Traits()


class Draft(NamedTuple):
    """A document as text: pieces [(text, kind)], whether an end token follows, and its traits."""

    pieces: list[tuple[str, str]]
    ends: bool = False
    traits: Traits = Traits()


class Malformed(NamedTuple):
    """A row that is not a document: its place and the reason."""

    place: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of the rows and how they are rendered.

    Attributes:
      messages: column of conversations.
      text: column of plain text.
      question, answer: columns of one exchange. If several forms are given, a row is read as the first one whose column
        it has, in the order messages, question, text. The default is `MESSAGES` and `TEXT`.
      score: "assistant": the assistant's turns of conversations are scored, or "all". Plain text is scored throughout.
      thinking: passed to the chat template as `enable_thinking`.
      allow_special_tokens: special tokens in messages and text become their ids; otherwise they are ordinary text.
    """

    messages: str | None = None
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    score: str = "assistant"
    thinking: bool = True
    allow_special_tokens: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        given = [name for name in (self.messages, self.question, self.answer, self.text) if name]
        return given or [*MESSAGES, TEXT]

    @property
    def kinds(self) -> list[str]:
        """The columns that determine the form of a row, in order of preference."""
        return [name for name in self.columns if name != self.answer]


class InputRows:
    """The rows of files, in order: an iterable of (place, row); a row is a jsonl line's bytes or a dict of columns.

    Attributes:
      paths: the files.
      sizes: theirs in bytes, in the same order.
      total: the sum of these.
      position: bytes read so far.
    """

    def __init__(self, paths: Iterable[PathLike], columns: list[str]):
        """Checks the files.

        Raises:
          InputError: lists the files that are missing, are folders, or have another suffix.
        """
        self.paths, self._columns, self.position = [as_path(path) for path in paths], columns, 0
        errors = [f"{path}: {error}" for path in self.paths if (error := _path_error(path))]
        if errors or not self.paths:
            raise InputError("\n".join(errors) or "input: expected at least one file, found none")
        self.sizes = [file_bytes(path) for path in self.paths]
        self.total = sum(self.sizes)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for path, size in zip(self.paths, self.sizes):
            yield from self._lines(path) if path.suffix == ".jsonl" else self._parquet(path, size)

    def _lines(self, path):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                self.position += len(line)
                if line.strip():
                    yield f"{path}:{number}", line

    def _parquet(self, path, size):
        import pyarrow.parquet  # slow to import, and not needed for jsonl

        start, number = self.position, 0
        try:
            with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
                names, total = file.schema_arrow.names, file.metadata.num_rows
                columns = [name for name in self._columns if name in names]
                for batch in file.iter_batches(64, columns=columns, use_threads=False) if columns else ():
                    for row in batch.to_pylist():
                        number += 1
                        self.position = start + size * number // total
                        yield f"{path}:{number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: expected a parquet file, found an error after row {number}: {error}") from error
        self.position = start + size
        if not columns:
            expected, found = ", ".join(self._columns), ", ".join(names)
            raise InputError(f"{path}: expected one of the columns {expected}, found {found}; name the right column")


def _path_error(path: Path) -> str | None:
    if path.is_dir():
        return "expected a file, found a folder; name its files, for example folder/*.jsonl"
    if not path.is_file():
        return "expected a file, found none"
    return None if path.suffix in SUFFIXES else f"expected {' or '.join(SUFFIXES)}, found {path.suffix!r}"


def documents(rows: Iterable[tuple[str, Row]], tokenizer: Tokenizer, form: Form) -> Iterator[Document | Malformed]:
    """A `Document` or `Malformed` for each row of `InputRows`, in order."""
    with concurrent.futures.ThreadPoolExecutor(BLOCKS_AHEAD) as pool:
        waiting = collections.deque()
        for block in _blocks(rows):
            waiting.append(pool.submit(tokenize, block, tokenizer, form))
            if len(waiting) > BLOCKS_AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _blocks(rows):
    block, size = [], 0
    for place, row in rows:
        block.append((place, row))
        size += len(row) if isinstance(row, bytes) else _text_size(row)
        if size >= BLOCK_BYTES or len(block) >= BLOCK_ROWS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _text_size(value):
    """Characters in a value of lists and dicts."""
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    if isinstance(value, list):
        return sum(map(_text_size, value))
    return len(value) if isinstance(value, str) else 1


def tokenize(block: list[tuple[str, Row]], tokenizer: Tokenizer, form: Form) -> list[Document | Malformed]:
    """A `Document` or `Malformed` for each (place, row) of a block."""
    drafts = [_draft_or_reason(place, row, tokenizer, form) for place, row in block]
    texts = [text for draft in drafts if isinstance(draft, Draft) for text, _ in draft.pieces]
    encoded = iter(tokenizer.encode_many(texts))
    return [
        _assemble(place, draft, [next(encoded) for _ in draft.pieces], tokenizer) if isinstance(draft, Draft) else draft
        for (place, _), draft in zip(block, drafts)
    ]


class _Reason(ValueError):
    """The reason why a row is not a document."""


def _draft_or_reason(place, row, tokenizer, form):
    try:
        return _draft(row, tokenizer, form)
    except _Reason as reason:
        return Malformed(place, str(reason))


def _draft(row, tokenizer, form):
    """The `Draft` of a row; raises _Reason."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode())
        except (ValueError, RecursionError) as error:
            raise _Reason(f"expected JSON in UTF-8, found {error}") from None
        if not isinstance(row, dict):
            raise _Reason(f"expected an object of columns, found {_brief(row)}")
    name = next((name for name in form.kinds if row.get(name) is not None), None)
    if len(form.kinds) == 1:
        (name,) = form.kinds
    if name is None:
        raise _Reason(f"expected one of the columns {', '.join(form.kinds)}, found {', '.join(row) or 'none'}")
    if name == form.question:
        pair = [{"role": "user", "content": _column(row, name)}]
        return _conversation([*pair, {"role": "assistant", "content": _column(row, form.answer)}], tokenizer, form)
    if name == (form.text or TEXT) and name != form.messages:
        text = _column(row, name)
        if not text:
            raise _Reason(f"{name}: expected text, found none")
        text, markers = _protect(text, tokenizer, form)
        return Draft([(text, ALL)], ends=True, traits=Traits(markers=markers))
    return _conversation(_messages(_column(row, name, list), name), tokenizer, form)


def _column(row, name, kind: type = str):
    if name not in row:
        raise _Reason(f'expected a column "{name}", found {", ".join(row) or "none"}')
    if not isinstance(row[name], kind):
        wanted = "text" if kind is str else "a list of messages"
        raise _Reason(f"{name}: expected {wanted}, found {_brief(row[name])}")
    return row[name]


def _messages(messages, column):
    """Messages of either convention as [{"role", "content", …}], with their other keys, which a template may use.

    Nulls are left out: parquet stores them for the keys of other rows.
    """
    out = []
    for i, message in enumerate(messages):
        where = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise _Reason(f"{where}: expected an object, found {_brief(message)}")
        role, content = ("role", "content") if message.get("role") is not None else ("from", "value")
        if message.get(role) is None:
            found = ", ".join(message) or "none"
            raise _Reason(f"{where}: expected role and content, or from and value, found {found}")
        for key in (role, content):
            if not isinstance(message.get(key), str):
                raise _Reason(f"{where}: expected {key} to be text, found {_brief(message.get(key))}")
        extra = {key: value for key, value in message.items() if key not in (role, content) and value is not None}
        speaker = SHAREGPT_ROLES.get(message[role], message[role])
        out.append({**extra, "role": speaker, "content": message[content]})
    if not out:
        raise _Reason(f"{column}: expected at least one message, found none")
    return out


def _conversation(messages, tokenizer, form):
    """The `Draft` of a conversation.

    Answers are encoded separately from their context, as in generation, so that no token spans the two.
    """
    messages, markers = _protect(messages, tokenizer, form)
    render = lambda count, prompt: _render(messages[:count], prompt, tokenizer, form.thinking)
    whole = render(len(messages), False)
    extra_keys = tuple(sorted({key for message in messages for key in message} - {"role", "content"}))
    if form.score == "all":
        return Draft([(whole, ALL)], traits=Traits(True, False, extra_keys, markers))
    spans, unprompted = _answer_spans(messages, whole, render, tokenizer)
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [(whole[end:start], CONTEXT), (whole[start:stop], ANSWER)]
        end = stop
    pieces.append((whole[end:], CONTEXT))
    return Draft([piece for piece in pieces if piece[0]], traits=Traits(True, unprompted, extra_keys, markers))


def _protect(value, tokenizer, form):
    """(messages or a text, protected unless the form allows special tokens; whether they contain any)."""
    try:
        protected = tokenizer.protect(value)
    except InputError as error:
        raise _Reason(str(error)) from None
    return (value if form.allow_special_tokens else protected), protected != value


def _render(messages, generation_prompt, tokenizer, thinking):
    try:
        return tokenizer.render(messages, generation_prompt, thinking)
    except Exception as error:  # a template may raise anything
        raise _Reason(f"the chat template rejects the conversation: {error}") from None


def _answer_spans(messages, whole, render, tokenizer):
    """([(start, stop)] of the assistant's answers in the rendered conversation, whether one is unprompted).

    An answer starts where the generation prompt ends, so that exactly the text that the model would write is scored.
    """
    spans, unprompted = [], False
    if not any(message["role"] == "assistant" for message in messages):
        found = ", ".join(sorted({message["role"] for message in messages}))
        raise _Reason(f"expected an assistant's turn to score, found only the roles {found}")
    if messages[0]["role"] == "assistant":
        raise _Reason(
            "the conversation starts with the assistant, so no generation prompt separates the template's header from"
            " the answer; drop the turn or score all"
        )
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through, prompt = render(i, False), render(i + 1, False), render(i, True)
        for count, text in ((i, before), (i + 1, through)):
            if not whole.startswith(text):
                raise _Reason(
                    f"the chat template renders the first {count} messages differently without the later ones, so turns"
                    " cannot be separated; split it into single exchanges or score all"
                )
        unprompted |= not through.startswith(prompt)
        spans.append((_answer_start(before, prompt, through, tokenizer), len(through)))
    return spans, unprompted


def _answer_start(before, prompt, through, tokenizer):
    """Start of the answer in the text `through`: after the tokens that its turn shares with the generation prompt."""
    if through.startswith(prompt):
        if THINK in prompt[len(before) :] and through[len(prompt) :].lstrip().startswith(THINK):
            raise _Reason(f"{THINK} would be written twice, by the template and by the answer; use --nothinking")
        return max(len(prompt), len(before))
    if not prompt.startswith(before):
        raise _Reason(
            "the chat template's generation prompt does not extend the messages before it, so answers cannot be"
            " separated; score all"
        )
    head, turn = prompt[len(before) :], through[len(before) :]
    same = next((n for n, (a, b) in enumerate(zip(head, turn)) if a != b), len(turn))
    try:
        return len(before) + tokenizer.last_boundary(head, same)
    except InputError as error:
        raise _Reason(str(error)) from None


def _assemble(place, draft, encoded, tokenizer):
    """The `Document` of a draft and the ids of its pieces, or `Malformed`."""
    errors = [str(ids) for ids in encoded if isinstance(ids, InputError)]
    if errors:
        return Malformed(place, errors[0])
    kinds = [kind for _, kind in draft.pieces]
    if draft.ends and tokenizer.eos is not None:
        encoded, kinds = [*encoded, [tokenizer.eos]], [*kinds, ALL]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in encoded])
    scored = np.concatenate([_scored(ids, kind, tokenizer.stop_ids) for ids, kind in zip(encoded, kinds)])
    loss_mask = np.zeros(len(tokens), bool)
    loss_mask[:-1] = scored[1:]
    if not loss_mask.any():
        return Malformed(place, "expected tokens to score, found none: too short, or the assistant's turns are empty")
    return Document(place, tokens, loss_mask, draft.traits)


def _scored(ids, kind, stop_ids):
    """[n] bool: the tokens to predict, without those that a template adds after an answer's stop token."""
    out = np.full(len(ids), kind != CONTEXT)
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    if kind == ANSWER and len(stops):
        out[stops[-1] + 1 :] = False
    return out


def _brief(value):
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
