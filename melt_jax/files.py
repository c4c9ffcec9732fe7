"""Checkpoint folders and files: written whole or not at all, with the files that travel beside the weights."""

import contextlib
import pathlib
import shutil

import jax
from jax.experimental import multihost_utils

# Tokenizer files, generation defaults and the model code that auto_map names.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template*", "generation_config.json", "configuration_*.py", "modeling_*.py"),
)


@contextlib.contextmanager
def atomic_folder(folder, overwrite=False):
    """A new folder to fill, which takes the name `folder` when the block ends well and is removed when it fails.

    Until then it is a hidden sibling, `.{name}.incomplete`, so that an interrupted writer leaves nothing that looks
    complete. With several processes each yields the same path; the first creates, renames and removes.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is false.
    """
    folder = pathlib.Path(folder).absolute()
    temporary, replaced = (folder.with_name(f".{folder.name}.{word}") for word in ("incomplete", "replaced"))
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: expected a new folder; remove it, or overwrite it explicitly")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _meet("created")
    try:
        yield temporary
        _meet("filled")
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if first:
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    _meet("renamed")


def write_text(path, text):
    """Writes a file whole or not at all: whoever reads it, after a kill too, finds the old text or the new."""
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.write_text(text)
    temporary.replace(path)


def copy_companions(source, target):
    """Copies tokenizer files and the like from one checkpoint folder into another; returns their names."""
    files = sorted({file for pattern in COMPANIONS for file in pathlib.Path(source).glob(pattern) if file.is_file()})
    for file in files:
        shutil.copyfile(file, pathlib.Path(target) / file.name)
    return [file.name for file in files]


def folder_bytes(folder):
    """The size of all files in a folder, in bytes."""
    return sum(file.stat().st_size for file in pathlib.Path(folder).rglob("*") if file.is_file())


def _meet(stage):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"melt_jax checkpoint folder {stage}")
