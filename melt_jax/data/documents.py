"""Documents for training: the rows of jsonl and parquet files → chat template → tokens, and which of them are scored.

A row is a conversation (a list of messages), a question with its answer, or plain text. Rows are read in blocks, and a
few blocks are under way at a time, so that memory does not grow with the files. The tokenizer works on a block with all
cores; documents come in the order of their rows, whatever the number of cores.
"""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
from typing import NamedTuple

import numpy as np

SUFFIXES = (".jsonl", ".parquet")
MESSAGES, TEXT = ("messages", "conversations"), "text"
SCORES = ("assistant", "all")
# ShareGPT's names of the roles; the names of the templates are the same in both columns.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
CONTEXT, ANSWER, ALL = "context", "answer", "all"  # kinds of a piece: not scored; up to its stop token; every token
BLOCK_BYTES = 2**21  # of text that the tokenizer gets at once: it takes some thirty times that while it works
BLOCK_ROWS = 4096
BLOCKS_AHEAD = 2  # one is read and rendered while the other is tokenised


class Traits(NamedTuple):
    """What prepared data tells of a document.

    Attributes:
      conversation: it was written by the chat template.
      unprompted: an answer does not begin as the template's generation prompt does.
      further: what its messages have besides role and content, sorted.
    """

    conversation: bool = False
    unprompted: bool = False
    further: tuple = ()


class Document(NamedTuple):
    """Tokens of a document.

    Attributes:
      place: "file:line", from 1.
      tokens: [n] int32.
      loss_mask: [n] bool, true where the prediction made at this token, that of the next one, is scored.
      traits: `Traits`.
    """

    place: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    traits: Traits = Traits()


class Draft(NamedTuple):
    """A document as text: pieces [(text, kind)], whether an end token follows, and as in `Document`."""

    pieces: list
    ends: bool = False
    traits: Traits = Traits()


class Malformed(NamedTuple):
    """A row that is no document: where, and why."""

    place: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Form:
    """What a row holds.

    Attributes:
      messages: column of conversations; question and answer: columns of one exchange; text: column of plain text. Where
        several are given, a row is the first of the three that it has. With none, `MESSAGES` and `TEXT` are given.
      score: "assistant" for the assistant's turns of conversations, or "all"; of plain text all is scored.
    """

    messages: str | None = None
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    score: str = "assistant"

    @property
    def columns(self):
        """The columns that may be asked of a row."""
        given = [name for name in (self.messages, self.question, self.answer, self.text) if name]
        return given or [*MESSAGES, TEXT]

    @property
    def kinds(self):
        """The columns of which a row has one, by which it is known what the row is."""
        return [name for name in self.columns if name != self.answer]


class InputRows:
    """The rows of files, in order: iterating gives (place, row), a row being a jsonl line's bytes or a dict of columns.

    Attributes:
      paths: the files.
      total: their size, bytes.
      position: how much of it was read.
    """

    def __init__(self, paths, columns):
        """ValueError: no files, or all that are not there, are folders, or are of another kind."""
        self.paths, self._columns, self.position = [pathlib.Path(path) for path in paths], columns, 0
        found = [f"{path}: {problem}" for path in self.paths if (problem := _path_problem(path))]
        if found or not self.paths:
            raise ValueError("\n".join(found) or "no input files")
        self.total = sum(path.stat().st_size for path in self.paths)

    def __iter__(self):
        for path in self.paths:
            yield from self._lines(path) if path.suffix == ".jsonl" else self._parquet(path)

    def _lines(self, path):
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                self.position += len(line)
                if line.strip():
                    yield f"{path}:{number}", line

    def _parquet(self, path):
        import pyarrow.parquet  # on use: it takes a while, and jsonl does without

        start, number = self.position, 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names, total = file.schema_arrow.names, file.metadata.num_rows
                columns = [name for name in self._columns if name in names]
                for batch in file.iter_batches(64, columns=columns, use_threads=False) if columns else ():
                    for row in batch.to_pylist():
                        number += 1
                        self.position = start + path.stat().st_size * number // total
                        yield f"{path}:{number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read as parquet, after row {number}: {error}") from error
        self.position = start + path.stat().st_size
        if not columns:
            raise ValueError(f"{path}: none of the columns {', '.join(self._columns)}; it has {', '.join(names)}")


def _path_problem(path):
    if path.is_dir():
        return "a folder: expected a file; name those in it, as by folder/*.jsonl"
    if not path.is_file():
        return "no such file"
    return None if path.suffix in SUFFIXES else f"expected {' or '.join(SUFFIXES)}"


def documents(rows, tokenizer, form):
    """A `Document` or `Malformed` of every row, in the rows' order.

    Args:
      rows: iterable of (place, row), as `InputRows`.
      tokenizer: `melt_jax.data.text.Tokenizer`.
      form: `Form`.
    """
    work = lambda block: tokenise(block, tokenizer, form)
    with concurrent.futures.ThreadPoolExecutor(BLOCKS_AHEAD) as pool:
        waiting = collections.deque()
        for block in _blocks(rows):
            waiting.append(pool.submit(work, block))
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


def tokenise(block, tokenizer, form):
    """[`Document` or `Malformed`] of [(place, row)]."""
    drafts = [_draft_or_reason(place, row, tokenizer, form) for place, row in block]
    texts = [text for draft in drafts if isinstance(draft, Draft) for text, _ in draft.pieces]
    encoded = iter(tokenizer.encode_many(texts))
    out = []
    for (place, _), draft in zip(block, drafts):
        if isinstance(draft, Draft):
            draft = _assemble(place, draft, [next(encoded) for _ in draft.pieces], tokenizer)
        out.append(draft)
    return out


class _Reason(ValueError):
    """Why a row is no document."""


def _draft_or_reason(place, row, tokenizer, form):
    try:
        return _draft(row, tokenizer, form)
    except _Reason as reason:
        return Malformed(place, str(reason))


def _draft(row, tokenizer, form):
    """The `Draft` of a row; _Reason if it has none."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode())
        except (ValueError, RecursionError) as error:
            raise _Reason(f"no JSON in UTF-8: {error}") from None
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
            raise _Reason(f"{name}: empty")
        return Draft([(text, ALL)], ends=True)
    return _conversation(_messages(_column(row, name, list), name), tokenizer, form)


def _column(row, name, kind=str):
    if name not in row:
        raise _Reason(f'no column "{name}"; found {", ".join(row) or "none"}')
    if not isinstance(row[name], kind):
        wanted = "text" if kind is str else "a list of messages"
        raise _Reason(f"{name}: expected {wanted}, found {_brief(row[name])}")
    return row[name]


def _messages(messages, column):
    """[{"role", "content", …}] of messages by either of the two conventions, with all else that they have.

    What else is written is the template's choice. Nulls are left out: parquet has them for what other rows hold.
    """
    out = []
    for i, message in enumerate(messages):
        where = f"{column}[{i}]"
        if not isinstance(message, dict):
            raise _Reason(f"{where}: expected an object, found {_brief(message)}")
        role, content = ("role", "content") if message.get("role") is not None else ("from", "value")
        if message.get(role) is None:
            found = ", ".join(message) or "none"
            raise _Reason(f"{where}: expected role and content, or from and value; found {found}")
        for key in (role, content):
            if not isinstance(message.get(key), str):
                raise _Reason(f"{where}: expected {key} to be text, found {_brief(message.get(key))}")
        further = {key: value for key, value in message.items() if key not in (role, content) and value is not None}
        speaker = SHAREGPT_ROLES.get(message[role], message[role])
        out.append({**further, "role": speaker, "content": message[content]})
    if not out:
        raise _Reason(f"{column}: no messages")
    return out


def _conversation(messages, tokenizer, form):
    """The `Draft` of a conversation.

    Answers are encoded apart from what stands before them, as generation does: no token spans the two.
    """
    whole = _render(messages, False, tokenizer)
    further = tuple(sorted({key for message in messages for key in message} - {"role", "content"}))
    if form.score == "all":
        return Draft([(whole, ALL)], traits=Traits(True, False, further))
    spans, unprompted = _answer_spans(messages, whole, tokenizer)
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [(whole[end:start], CONTEXT), (whole[start:stop], ANSWER)]
        end = stop
    pieces.append((whole[end:], CONTEXT))
    return Draft([piece for piece in pieces if piece[0]], traits=Traits(True, unprompted, further))


def _render(messages, generation_prompt, tokenizer):
    try:
        return tokenizer.render(messages, generation_prompt)
    except Exception as error:  # a template may raise anything
        raise _Reason(f"the chat template refuses the conversation: {error}") from None


def _answer_spans(messages, whole, tokenizer):
    """([(start, stop)] of the assistant's turns in the rendered conversation, whether one begins unlike its prompt).

    A turn begins where the generation prompt ends, so that exactly what the model would write is scored.
    """
    spans, unprompted = [], False
    if not any(message["role"] == "assistant" for message in messages):
        found = ", ".join(sorted({message["role"] for message in messages}))
        raise _Reason(f"no assistant's turn, so nothing would be scored; found the roles {found}")
    if messages[0]["role"] == "assistant":
        raise _Reason(
            "the assistant opens the conversation: no generation prompt tells the template's header of that turn from"
            " what the assistant writes; leave the turn out or score all"
        )
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, through = (_render(messages[:count], False, tokenizer) for count in (i, i + 1))
        for count, text in ((i, before), (i + 1, through)):
            if not whole.startswith(text):
                raise _Reason(
                    f"the chat template renders the first {count} messages otherwise alone than in the whole"
                    " conversation, so turns cannot be told apart; split it into single exchanges or score all"
                )
        prompt = _render(messages[:i], True, tokenizer)
        unprompted |= not through.startswith(prompt)
        spans.append((_answer_start(before, prompt, through, tokenizer), len(through)))
    return spans, unprompted


def _answer_start(before, prompt, through, tokenizer):
    """Where in the conversation `through` an answer begins: behind the prompt's tokens with which its turn begins."""
    if through.startswith(prompt):
        return max(len(prompt), len(before))
    if not prompt.startswith(before):
        raise _Reason(
            "the chat template's generation prompt does not go on from the messages before it, so what the template"
            " writes of an answer cannot be told; score all"
        )
    head, turn = prompt[len(before) :], through[len(before) :]
    same = next((n for n, (a, b) in enumerate(zip(head, turn)) if a != b), len(turn))
    try:
        return len(before) + tokenizer.last_boundary(head, same)
    except ValueError as error:
        raise _Reason(str(error)) from None


def _assemble(place, draft, encoded, tokenizer):
    """The `Document` of a draft and the ids of its pieces, or `Malformed`."""
    wrong = [str(ids) for ids in encoded if isinstance(ids, ValueError)]
    if wrong:
        return Malformed(place, wrong[0])
    kinds = [kind for _, kind in draft.pieces]
    if draft.ends and tokenizer.eos is not None:
        encoded, kinds = [*encoded, [tokenizer.eos]], [*kinds, ALL]
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids in encoded])
    written = np.concatenate([_written(ids, kind, tokenizer.stop_ids) for ids, kind in zip(encoded, kinds)])
    loss_mask = np.zeros(len(tokens), bool)
    loss_mask[:-1] = written[1:]
    if not loss_mask.any():
        return Malformed(place, "nothing in it is scored: it is too short, or the assistant's turns are empty")
    return Document(place, tokens, loss_mask, draft.traits)


def _written(ids, kind, stop_ids):
    """[n] bool: the tokens that the model is to write. What a template puts after an answer's stop token is not."""
    out = np.full(len(ids), kind != CONTEXT)
    stops = np.flatnonzero(np.isin(ids, stop_ids))
    if kind == ANSWER and len(stops):
        out[stops[-1] + 1 :] = False
    return out


def _brief(value):
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
