"""Prepares text for training: conversations or plain text → tokens → packed sequences in ArrayRecord shards.

    python -m melt_jax.prepare --tokenizer=Ouro-1.4B-Thinking --input='traces/*.jsonl|traces/*.parquet' \\
        --output=data/traces --length=10000 --long=drop
    python -m melt_jax.prepare … --question=input --answer=output     # two columns, such as AceReason-1.1-SFT's
    python -m melt_jax.prepare … --messages=messages --question=input --answer=output     # files of both forms
    python -m melt_jax.prepare --verify=data/traces                   # compares the shards with their hashes

A row is a conversation (column `messages` or `conversations`, with role and content or ShareGPT's from and value), a
question and an answer in two columns, or plain `text`. If flags name several of these, a row is read as the first one
whose column it has.

Conversations are rendered with the tokenizer's chat template, and the assistant's answers are scored. With --thinking,
the default, a Thinking model's generation prompt ends with `<think>`, and answers are scored from there on. Generate
with the same setting. In messages and plain text, the text of special tokens is ordinary text, so that it cannot end a
turn or forge one. Plain text ends with the tokenizer's end token and is scored throughout.

Several documents share a sequence but do not attend to each other; documents are cut only with --long=split. The same
inputs and flags give the same bytes on any number of cores. An interrupted run leaves no output folder. To train on the
result:

    python -m melt_jax.train --config=configs/ouro_1_4b.py --config.data.path=data/traces …
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from melt_jax import __version__, command_line
from melt_jax.checkpoints import hub
from melt_jax.config import InputError
from melt_jax.data.documents import SCORES, Document, Form, InputRows, Malformed, documents
from melt_jax.data.packing import Packer, split
from melt_jax.data.records import Layout, ShardWriter, verify_shards, write_manifest
from melt_jax.data.text import Tokenizer
from melt_jax.files import PathLike, atomic_folder, find_files

MALFORMED_SHOWN = 10  # malformed rows that are printed one by one
KIND = "prepared data"  # in the record of the output folder
LONG, MALFORMED = ("error", "drop", "split"), ("stop", "count")


class PrepareError(InputError):
    """Data that cannot be prepared as requested; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How documents become sequences: the values of the flags with these names."""

    length: int = 10_000
    long: str = "error"
    malformed: str = "stop"
    window: int = 64
    shard_sequences: int = 4096


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "tokenizer", None, "Model folder, or model of the hub, that has the tokenizer and the chat template."
    )
    flags.DEFINE_multi_string(
        "input",
        [],
        "Input files, .jsonl or .parquet: patterns, joined by | or repeated; hf://datasets/org/name/path: of the hub.",
    )
    flags.DEFINE_string("output", None, "Folder to write.")
    flags.DEFINE_string("verify", None, "Folder of prepared data to verify; nothing is written.")
    flags.DEFINE_integer("length", 10_000, "Tokens per sequence.")
    flags.DEFINE_string("messages", None, "Column of conversations; by default messages, else conversations.")
    flags.DEFINE_string("text", None, "Column of plain text; by default text, in rows without a conversation.")
    flags.DEFINE_string("question", None, "Column of questions, with --answer.")
    flags.DEFINE_string("answer", None, "Column of answers, with --question.")
    flags.DEFINE_enum("score", "assistant", SCORES, "Scored tokens of conversations: the assistant's turns, or all.")
    flags.DEFINE_boolean("thinking", True, "Render the chat template with enable_thinking.")
    flags.DEFINE_boolean(
        "allow_special_tokens",
        False,
        "Special tokens in messages and text, such as <|im_end|>, become their ids; by default they are ordinary text.",
    )
    flags.DEFINE_enum("long", "error", LONG, "Documents longer than a sequence: stop, drop them, or split them.")
    flags.DEFINE_enum("malformed", "stop", MALFORMED, "Rows that are not documents: stop, or skip and count them.")
    flags.DEFINE_integer("window", 64, "Sequences kept open for further documents; 1: one after the other.")
    flags.DEFINE_integer("shard_sequences", 4096, "Sequences per shard.")
    flags.DEFINE_integer("threads", 0, "Tokenizer threads; 0: all cores.")
    flags.DEFINE_boolean("overwrite", False, "Replace the output if it is prepared data written by melt_jax.")


def main(argv: list[str]) -> None:
    """Validates the flags, writes the data and prints a summary."""
    del argv
    values = flags.FLAGS
    if errors := flag_errors(values):
        raise InputError("\n".join(errors))
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators to other programs
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if values.threads:
        os.environ["RAYON_NUM_THREADS"] = str(values.threads)
    if values.verify:
        return print(verify(values.verify))
    given: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Form)}
    form = Form(**given)
    settings = Settings(values.length, values.long, values.malformed, values.window, values.shard_sequences)
    paths = input_files(values.input)
    manifest = prepare(values.tokenizer, paths, values.output, form, settings, values.overwrite)
    print(summary(values.output, manifest))


def prepare(
    tokenizer: PathLike,
    paths: Sequence[PathLike],
    output: PathLike,
    form: Form,
    settings: Settings,
    overwrite: bool = False,
) -> dict:
    """Writes prepared data; returns its manifest.

    Args:
      tokenizer: model folder, or a model of the hub.
      paths: input files, read in this order.
      output: the new folder.
      form: the form of the rows.
      settings: how documents become sequences.
      overwrite: replace `output` if it exists.

    Raises:
      FileExistsError: `output` exists.
      FileNotFoundError: the folder has no tokenizer.
      InputError: the inputs cannot be read, or `output` must not be replaced.
      PrepareError: a malformed row or a long document, unless `settings` allow it, or no documents at all.
    """
    rows, opened = InputRows(paths, form.columns), Tokenizer(hub.local_folder(tokenizer, hub.TOKENIZER))
    if opened.template is None and (form.question or form.messages):
        raise PrepareError(f"{opened.folder}: expected a chat template for conversations, found none")
    layout, counts = Layout.of(settings.length, opened.vocab), collections.Counter()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    inputs = [opened.folder, *paths]
    with atomic_folder(output, overwrite, KIND, inputs) as folder, _progress(console, rows.total) as show:
        writer = ShardWriter(folder, settings.shard_sequences)
        for sequence in sequences(documents(rows, opened, form), settings, counts, console):
            writer.write(layout.encode(sequence))
            counts.update(_sequence_counts(sequence, settings.length))
            show(rows.position)
        writer.close()
        if not counts["sequences"]:
            raise PrepareError(
                f"input: expected documents, found none: {counts['malformed']} malformed rows, {counts['dropped']}"
                " documents dropped"
            )
        data = {"form": dataclasses.asdict(form), "settings": dataclasses.asdict(settings), "shards": writer.shards}
        manifest = {**dataclasses.asdict(layout), **_manifest(counts, opened, rows, form.thinking), **data}
        write_manifest(folder, manifest)
    return manifest


def sequences(
    found: Iterable[Document | Malformed], settings: Settings, counts: collections.Counter, console: Console
) -> Iterator[list[Document]]:
    """Packs documents: yields sequences as lists of documents, and updates `counts`."""
    packer = Packer(settings.length, settings.window)
    for document in found:
        if isinstance(document, Malformed):
            _count_malformed(document, settings, counts, console)
            continue
        counts["documents"] += 1
        counts["conversations"] += document.traits.conversation
        counts["unprompted"] += document.traits.unprompted
        counts["markers"] += document.traits.markers
        counts["extra_keys"] += bool(document.traits.extra_keys)
        counts.update(("extra_keys", key) for key in document.traits.extra_keys)
        for piece in _fit(document, settings, counts):
            if (full := packer.add(piece)) is not None:
                yield full
    yield from packer.finish()


def _fit(document: Document, settings: Settings, counts: collections.Counter) -> list[Document]:
    """The pieces of a document that fit into a sequence: itself, none, or several."""
    size = len(document.tokens)
    if size <= settings.length:
        return [document]
    if settings.long == "drop":
        counts["dropped"] += 1
        counts["dropped_tokens"] += size
        return []
    if settings.long == "split":
        counts["split"] += 1
        return split(document, settings.length)
    raise PrepareError(
        f"{document.place}: expected at most --length={settings.length} tokens, found {size}; raise --length, or use"
        " --long=drop or --long=split"
    )


def _count_malformed(row: Malformed, settings: Settings, counts: collections.Counter, console: Console) -> None:
    if settings.malformed == "stop":
        raise PrepareError(f"{row.place}: {row.reason}; correct it, or skip such rows with --malformed=count")
    counts["malformed"] += 1
    if counts["malformed"] <= MALFORMED_SHOWN:
        console.print(f"skipped: {row.place}: {row.reason}", markup=False)


def _sequence_counts(sequence: list[Document], length: int) -> dict[str, int]:
    tokens = sum(len(document.tokens) for document in sequence)
    scored = sum(int(document.loss_mask.sum()) for document in sequence)
    return {"sequences": 1, "tokens": tokens, "scored": scored, "padding": length - tokens}


COUNTS = (
    *("documents", "conversations", "malformed", "dropped", "dropped_tokens", "split", "unprompted", "extra_keys"),
    "markers",
    *("sequences", "tokens", "scored", "padding"),
)


def _manifest(counts: collections.Counter, tokenizer: Tokenizer, rows: InputRows, thinking: bool) -> dict:
    extra_keys = {key[1]: count for key, count in counts.items() if isinstance(key, tuple)}
    rendered = bool(counts["conversations"])
    return {
        "package": __version__,
        "counts": {name: counts[name] for name in COUNTS},
        "extra_keys": dict(sorted(extra_keys.items())),  # {key of messages: documents with it}
        "tokenizer": {"sha256": tokenizer.sha256, "vocab": tokenizer.vocab},
        # Both are None if no conversation was rendered; `thinking` also if the template does not depend on it.
        "template_sha256": tokenizer.template_sha256 if rendered else None,
        "thinking": thinking if rendered and tokenizer.has_thinking else None,
        "inputs": [{"file": str(path), "bytes": size} for path, size in zip(rows.paths, rows.sizes)],
    }


def summary(output: PathLike, manifest: dict) -> str:
    """The contents of a manifest as text, with everything that was dropped or needs attention."""
    counts = manifest["counts"]
    slots = counts["sequences"] * manifest["length"]
    size = sum(shard["bytes"] for shard in manifest["shards"])
    lines = [
        f"{output}: {counts['sequences']:,} sequences of {manifest['length']:,} tokens in {len(manifest['shards'])}"
        f" shard(s), {size:,} bytes",
        f"{counts['documents']:,} documents read; {counts['tokens']:,} tokens written, {counts['scored']:,} of them"
        f" scored; padding: {counts['padding'] / slots:.1%}",
    ]
    if manifest["thinking"] is not None:
        lines.append(f"chat template rendered with enable_thinking={manifest['thinking']}")
    allowed = manifest["form"]["allow_special_tokens"]
    notes = {
        "markers": "documents contain the text of special tokens: "
        + ("they became these tokens" if allowed else "it is encoded as ordinary text"),
        "malformed": "malformed rows skipped",
        "dropped": f"documents longer than a sequence dropped, {counts['dropped_tokens']:,} tokens",
        "split": "documents longer than a sequence split",
        "unprompted": "documents have an answer that does not start with the end of the generation prompt (<think> of a"
        " Thinking model): it is scored from its first token that differs from the prompt",
        "extra_keys": f"documents have messages with keys other than role and content"
        f" ({', '.join(manifest['extra_keys'])}); the chat template decides whether to use them",
    }
    return "\n".join([*lines, *(f"{counts[name]:,} {note}" for name, note in notes.items() if counts[name])])


def verify(folder: PathLike) -> str:
    """Compares all shards of prepared data with the manifest; returns a line that confirms it.

    Raises:
      InputError: lists the shards that differ.
    """
    if errors := verify_shards(folder):
        raise InputError("\n".join(errors))
    return f"{folder}: every shard matches its sha256"


def input_files(patterns: Sequence[str]) -> list[str]:
    """The files that match patterns, each once, sorted within a pattern. Those of the hub are downloaded.

    Raises:
      InputError: a data set of the hub cannot be read; or lists the patterns without a match.
    """
    patterns = [part for pattern in patterns for part in pattern.split("|") if part]
    matches = {pattern: _matches(pattern) for pattern in patterns}
    if empty := [pattern for pattern, paths in matches.items() if not paths]:
        raise InputError(f"--input: expected files that match {', '.join(empty)}, found none")
    return list(dict.fromkeys(path for paths in matches.values() for path in paths))


def _matches(pattern: str) -> list[str]:
    if pattern.startswith(hub.PREFIX):
        return hub.local_files(pattern)
    return [str(file) for file in find_files(pattern)]


def flag_errors(values: flags.FlagValues) -> list[str]:
    """Errors in the flags, one line each."""
    if values.verify:
        return []
    needed = [name for name in ("tokenizer", "input", "output") if not values[name].value]
    errors = [f"--{name}: expected a value, found none" for name in needed]
    if (values.question is None) != (values.answer is None):
        errors.append("--question, --answer: expected both or neither, found one")
    columns = [values[name].value for name in ("messages", "question", "answer", "text")]
    columns = [column for column in columns if column is not None]
    if len(set(columns)) < len(columns):
        errors.append(
            f"--messages, --question, --answer, --text: expected different columns, found {', '.join(columns)}"
        )
    limits = {"length": (2, 10**7), "window": (1, 10**6), "shard_sequences": (1, 10**9), "threads": (0, 1024)}
    for name, (least, most) in limits.items():
        if not least <= (found := getattr(values, name)) <= most:
            errors.append(f"--{name}: expected at least {least} and at most {most}, found {found}")
    return errors


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over the bytes of the input, if there is a terminal; yields the function that sets it."""
    columns = (TextColumn("prepare"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda position: bar.update(task, completed=position)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
