"""Prepares text for training: conversations or plain text → tokens → packed sequences in ArrayRecord shards.

    python -m melt_jax.prepare --tokenizer=Ouro-1.4B-Thinking --input='traces/*.jsonl|traces/*.parquet' \\
        --output=data/traces --length=10000 --long=drop
    python -m melt_jax.prepare … --question=input --answer=output     # two columns, such as AceReason-1.1-SFT's
    python -m melt_jax.prepare … --messages=messages --question=input --answer=output     # files of both forms
    python -m melt_jax.prepare --verify=data/traces                   # reads the shards, compares their hashes

A row is a conversation (`messages` or `conversations`, with role and content or ShareGPT's from and value), two columns
of question and answer, or plain `text`; where flags name several of these, the first that it has. Conversations are
written by the tokenizer's chat template and scored on what the assistant writes; plain text ends with the tokenizer's
end token and is scored throughout. Documents stay whole, side by side in sequences, and do not see each other. The same
inputs and flags make the same bytes, on any number of cores. The output appears when it is complete, and not before.
Train on it with

    python -m melt_jax.train --config=configs/ouro_1_4b.py --config.data.path=data/traces …
"""

import collections
import dataclasses
import glob
import os
import sys

import jax
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from melt_jax import __version__
from melt_jax.data.documents import SCORES, Form, InputRows, Malformed, documents
from melt_jax.data.packing import Packer, split
from melt_jax.data.records import Layout, ShardWriter, verify_shards, write_manifest
from melt_jax.data.text import Tokenizer
from melt_jax.files import atomic_folder

SHOWN = 10  # malformed rows that are told one by one when they are counted

TOKENIZER = flags.DEFINE_string("tokenizer", None, "Checkpoint folder whose tokenizer and chat template are used.")
INPUT = flags.DEFINE_multi_string("input", [], "Files, .jsonl or .parquet: patterns, joined by | or given repeatedly.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
VERIFY = flags.DEFINE_string("verify", None, "Folder of prepared data to check instead of writing one.")
LENGTH = flags.DEFINE_integer("length", 10_000, "Tokens of a sequence.")
MESSAGES = flags.DEFINE_string("messages", None, "Column of conversations, if neither messages nor conversations.")
TEXT = flags.DEFINE_string("text", None, "Column of plain text; by default text, where there are no conversations.")
QUESTION = flags.DEFINE_string("question", None, "Column of questions, with --answer.")
ANSWER = flags.DEFINE_string("answer", None, "Column of answers, with --question.")
SCORE = flags.DEFINE_enum(
    "score", "assistant", SCORES, "What is scored of conversations: the assistant's turns, or all."
)
LONG = flags.DEFINE_enum(
    "long", "error", ("error", "drop", "split"), "Documents longer than a sequence: stop, leave out, or cut in pieces."
)
MALFORMED = flags.DEFINE_enum(
    "malformed", "stop", ("stop", "count"), "InputRows that are no document: stop, or go on and tell."
)
WINDOW = flags.DEFINE_integer(
    "window", 64, "Sequences open at a time for documents to fit into; 1: one after the other."
)
SHARD_SEQUENCES = flags.DEFINE_integer("shard_sequences", 4096, "Sequences of a shard.")
THREADS = flags.DEFINE_integer("threads", 0, "Cores of the tokenizer; 0: all.")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace the output folder if it exists.")


class PrepareError(ValueError):
    """Data that cannot be prepared as asked; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How sequences are made of documents: the flags of these names."""

    length: int = 10_000
    long: str = "error"
    malformed: str = "stop"
    window: int = 64
    shard_sequences: int = 4096


def main(argv):
    """Checks, writes, tells."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}; quote patterns")
    if wrong := flag_errors():
        raise app.UsageError("\n".join(wrong))
    jax.config.update("jax_platforms", "cpu")  # nothing here computes: an accelerator is left to others
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if THREADS.value:
        os.environ["RAYON_NUM_THREADS"] = str(THREADS.value)
    try:
        if VERIFY.value:
            return verify(VERIFY.value)
        form = Form(MESSAGES.value, TEXT.value, QUESTION.value, ANSWER.value, SCORE.value)
        settings = Settings(LENGTH.value, LONG.value, MALFORMED.value, WINDOW.value, SHARD_SEQUENCES.value)
        paths = input_files(INPUT.value)
        manifest = prepare(TOKENIZER.value, paths, OUTPUT.value, form, settings, OVERWRITE.value)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"melt_jax.prepare: {error}")
    print(summary(OUTPUT.value, manifest))


def prepare(tokenizer, paths, output, form, settings, overwrite=False):
    """Writes prepared data; returns its manifest.

    Args:
      tokenizer: checkpoint folder.
      paths: input files, in their order.
      output: the folder.
      form: `melt_jax.data.documents.Form`, what a row holds.
      settings: `Settings`.
      overwrite: replace `output` if it exists.

    Raises:
      FileExistsError: `output` exists. FileNotFoundError: no tokenizer. ValueError: inputs that cannot be read.
      PrepareError: a malformed row or a long document that is to stop the work.
    """
    rows, tokenizer = InputRows(paths, form.columns), Tokenizer(tokenizer)
    if tokenizer.template is None and (form.question or form.messages):
        raise PrepareError(f"{tokenizer.folder}: no chat template in its tokenizer files; conversations need one")
    layout, counts = Layout.of(settings.length, tokenizer.vocab), collections.Counter()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with atomic_folder(output, overwrite) as folder, _progress(console, rows.total) as tell:
        writer = ShardWriter(folder, settings.shard_sequences)
        for sequence in sequences(documents(rows, tokenizer, form), settings, counts, console):
            writer.write(layout.encode(sequence))
            counts.update(_sequence_counts(sequence, settings.length))
            tell(rows.position)
        writer.close()
        if not counts["sequences"]:
            raise PrepareError(f"no document to write: {counts['malformed']} malformed, {counts['dropped']} dropped")
        manifest = _manifest(layout, counts, writer.shards, tokenizer, rows, form, settings)
        write_manifest(folder, manifest)
    return manifest


def sequences(found, settings, counts, console):
    """Packs documents: yields lists of `Document`, and counts into `counts` what was read and what was left out."""
    packer = Packer(settings.length, settings.window)
    for document in found:
        if isinstance(document, Malformed):
            _count_malformed(document, settings, counts, console)
            continue
        counts["documents"] += 1
        counts["conversations"] += document.traits.conversation
        counts["unprompted"] += document.traits.unprompted
        counts["further"] += bool(document.traits.further)
        counts.update(("further", key) for key in document.traits.further)
        for piece in _fit(document, settings, counts):
            if (full := packer.add(piece)) is not None:
                yield full
    yield from packer.finish()


def _fit(document, settings, counts):
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
        f"{document.place}: {size} tokens, but a sequence has {settings.length}; lengthen the sequences, or take"
        " --long=drop or --long=split"
    )


def _count_malformed(row, settings, counts, console):
    if settings.malformed == "stop":
        raise PrepareError(f"{row.place}: {row.reason}; mend it, or take --malformed=count to leave such rows out")
    counts["malformed"] += 1
    if counts["malformed"] <= SHOWN:
        console.print(f"left out: {row.place}: {row.reason}", markup=False)


def _sequence_counts(sequence, length):
    tokens = sum(len(document.tokens) for document in sequence)
    scored = sum(int(document.loss_mask.sum()) for document in sequence)
    return {"sequences": 1, "tokens": tokens, "scored": scored, "padding": length - tokens}


COUNTS = ("documents", "conversations", "malformed", "dropped", "dropped_tokens", "split", "unprompted", "further")


def _manifest(layout, counts, shards, tokenizer, rows, form, settings):
    further = {count[1]: counts[count] for count in counts if isinstance(count, tuple)}
    return {
        "package": __version__,
        **dataclasses.asdict(layout),
        "counts": {name: counts[name] for name in (*COUNTS, "sequences", "tokens", "scored", "padding")},
        "further": dict(sorted(further.items())),  # documents by what their messages have besides role and content
        "shards": shards,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab": tokenizer.vocab},
        "template_sha256": tokenizer.template_sha256 if counts["conversations"] else None,  # of the one that wrote them
        "inputs": [{"file": str(path), "bytes": path.stat().st_size} for path in rows.paths],
        "form": dataclasses.asdict(form),
        "settings": dataclasses.asdict(settings),
    }


def summary(output, manifest):
    """What was written and what was left out, as text."""
    counts = manifest["counts"]
    places = counts["sequences"] * manifest["length"]
    size = sum(shard["bytes"] for shard in manifest["shards"])
    lines = [
        f"{output}: {counts['sequences']:,} sequences of {manifest['length']:,} tokens in {len(manifest['shards'])}"
        f" shard(s), {size:,} bytes",
        f"{counts['documents']:,} documents read; {counts['tokens']:,} tokens written, {counts['scored']:,} of them"
        f" scored; {counts['padding'] / places:.1%} of the places are padding",
    ]
    notes = {
        "malformed": "rows were malformed and left out",
        "dropped": f"documents were longer than a sequence and dropped, {counts['dropped_tokens']:,} tokens",
        "split": "documents were longer than a sequence and cut in pieces",
        "unprompted": "documents have an answer that does not begin as the template's generation prompt does (such as"
        " without <think>): it is scored from the prompt's first token that it lacks",
        "further": f"documents' messages have more than role and content ({', '.join(manifest['further'])}): whether it"
        " is written is the template's choice",
    }
    return "\n".join([*lines, *(f"{counts[name]:,} {note}" for name, note in notes.items() if counts[name])])


def verify(folder):
    """Checks all shards against the manifest; exits with what is wrong."""
    if wrong := verify_shards(folder):
        sys.exit("\n".join(wrong))
    print(f"{folder}: every shard is as it was written")


def input_files(patterns):
    """The files of patterns, each once, sorted by path within a pattern; ValueError names the patterns without any."""
    patterns = [part for pattern in patterns for part in pattern.split("|") if part]
    found = {pattern: sorted(glob.glob(pattern, recursive=True)) for pattern in patterns}
    if empty := [pattern for pattern, paths in found.items() if not paths]:
        raise ValueError(f"--input: no file matches {', '.join(empty)}")
    return list(dict.fromkeys(path for paths in found.values() for path in paths))


def flag_errors():
    """What is wrong with the flags, a line each."""
    if VERIFY.value:
        return []
    needed = {"--tokenizer": TOKENIZER.value, "--input": INPUT.value, "--output": OUTPUT.value}
    wrong = [f"{name} is needed" for name, value in needed.items() if not value]
    if (QUESTION.value is None) != (ANSWER.value is None):
        wrong.append("--question and --answer go together")
    columns = [flag.value for flag in (MESSAGES, QUESTION, ANSWER, TEXT) if flag.value is not None]
    if len(set(columns)) < len(columns):
        wrong.append(f"--messages, --question, --answer and --text name different columns, found {', '.join(columns)}")
    for flag, least in ((LENGTH, 2), (WINDOW, 1), (SHARD_SEQUENCES, 1), (THREADS, 0)):
        if flag.value < least:
            wrong.append(f"--{flag.name} must be {least} or more, got {flag.value}")
    return wrong


class _progress:
    """A progress bar over the bytes of the input where there is a terminal; entering gives its setter."""

    def __init__(self, console, total):
        columns = (TextColumn("prepare"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._total = total

    def __enter__(self):
        self._bar.start()
        task = self._bar.add_task("", total=self._total)
        return lambda position: self._bar.update(task, completed=position)

    def __exit__(self, *_):
        self._bar.stop()


if __name__ == "__main__":
    app.run(main)
