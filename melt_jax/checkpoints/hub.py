"""Models and data sets on the Hugging Face Hub, by `huggingface_hub`, with its cache, login and environment variables.

`local_folder` turns what a user writes for a model folder into a folder: a path, `org/name`, or
`hf://org/name@revision`. A command calls it once for each of its model folders; everything else takes folders.
Several processes of one machine may call it at once: the library locks each file, one process downloads it, and the
others find it in the cache.
"""

import dataclasses
import glob
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from melt_jax.checkpoints.orbax import PARAMS
from melt_jax.checkpoints.published import INDEX
from melt_jax.config import InputError
from melt_jax.files import COMPANIONS, Path, PathLike, as_path

PREFIX = "hf://"
DATASETS = f"{PREFIX}datasets/"

# The files of a repository to download.
CONFIG = ("config.json",)
TOKENIZER = COMPANIONS
MODEL = (*CONFIG, *TOKENIZER, "*.safetensors", INDEX, f"{PARAMS}/*")
NOT_MODEL = ("*/*.safetensors",)  # `*` of a pattern matches slashes, too

_NAME = r"[\w.-]+(?:/[\w.-]+)?"


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of the hub.

    Attributes:
      name: "org/name".
      revision: a branch, a tag or a commit; None: the main branch.
      kind: "model" or "dataset".
    """

    name: str
    revision: str | None = None
    kind: Literal["model", "dataset"] = "model"

    @property
    def page(self) -> str:
        """The address of its page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def repository(text: PathLike) -> Repository | None:
    """The model that a text names on the hub; None if it names a local folder.

    `org/name` without a prefix is a local folder if it or the folder `org` exists.

    Raises:
      InputError: the text starts with hf:// but names no model.
    """
    text = os.fspath(text)
    if text.startswith(PREFIX):
        match = re.fullmatch(rf"({_NAME})(?:@(.+))?", text.removeprefix(PREFIX))
        if match is None or text.startswith(DATASETS):
            raise InputError(f"{text}: expected a model of the hub as hf://org/name or hf://org/name@revision")
        return Repository(match[1], match[2])
    is_bare = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None
    return Repository(text) if is_bare and not pathlib.Path(text).parent.exists() else None


def local_folder(text: PathLike, files: Sequence[str] = MODEL, argument: str = "path") -> Path:
    """The folder of a model: the path itself, or the downloaded files of a model on the hub.

    Args:
      text: a path, `org/name`, or `hf://org/name@revision`. A path need not exist, and may be in a bucket.
      files: patterns of the files to download: `CONFIG`, `TOKENIZER` or `MODEL`.
      argument: the name of the flag or key, for the error of an empty text.

    Raises:
      InputError: in one line: the text is empty or has another scheme, the hub cannot be reached, or the model or
        revision is not there or is gated.
    """
    found = repository(text)
    return as_path(text, argument) if found is None else _download(found, files, NOT_MODEL, str(text))


def pinned(text: str, files: Sequence[str] = MODEL) -> str:
    """`text` itself if it names a local folder; else the model of the hub with its commit, `hf://org/name@commit`.

    It downloads the files.

    Raises:
      InputError: as `local_folder`.
    """
    found = repository(text)
    return text if found is None else f"{PREFIX}{found.name}@{local_folder(text, files).name}"


def local_files(pattern: str) -> list[str]:
    """The files of a data set that match `hf://datasets/org/name[@revision]/path`, downloaded, sorted.

    Raises:
      InputError: in one line, as `local_folder`; or the pattern names no file.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([^/]+))?/(.+)", pattern.removeprefix(DATASETS))
    if not pattern.startswith(DATASETS) or match is None:
        raise InputError(f"{pattern}: expected files of the hub as hf://datasets/org/name/path or …/name@revision/path")
    name, revision, path = match.groups()
    # The hub's `*` crosses folders, so deeper files than the pattern's are left out.
    deeper = [] if "**" in path else ["*/" * (path.count("/") + 1) + "*"]
    folder = _download(Repository(name, revision, "dataset"), [path.replace("**/", "*")], deeper, pattern)
    return sorted(glob.glob(str(pathlib.Path(glob.escape(str(folder)), path)), recursive=True))


def upload(folder: pathlib.Path, name: str, private: bool = False) -> str:
    """Uploads a model folder in one commit, to a model repository that is created if it is missing.

    Args:
      folder: the model folder.
      name: of the repository, "org/name".
      private: a new repository is private.

    Returns:
      The address of the commit.

    Raises:
      InputError: in one line: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with _one_line_errors(Repository(name), name, "a repository to write to"):
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the model").commit_url


def _download(found: Repository, files: Sequence[str], leave_out: Sequence[str], text: str) -> pathlib.Path:
    """The folder of a commit in the cache, `…/snapshots/<commit>`."""
    from huggingface_hub import snapshot_download

    expected = "files" if found.kind == "dataset" else "a model folder, or a model on the Hugging Face Hub"
    with _one_line_errors(found, text, expected):
        return pathlib.Path(
            snapshot_download(
                found.name,
                repo_type=found.kind,
                revision=found.revision,
                allow_patterns=list(files),
                ignore_patterns=list(leave_out),
            )
        )


@contextmanager
def _one_line_errors(found: Repository, text: str, expected: str) -> Iterator[None]:
    """Turns the library's errors into an `InputError`; hides its warnings and, without a terminal, progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    try:
        yield
    except Exception as error:  # HTTP libraries, the library and Xet have no common class
        raise InputError(f"{text}: expected {expected}, found {_reason(found, error)}") from error


def _reason(found: Repository, error: Exception) -> str:
    """What was found instead of a repository, and what to do."""
    from huggingface_hub import constants, errors

    log_in = "run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError):  # the library looked into its cache after another error
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"that {found.name} is gated; accept its terms at {found.page}, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {found.revision or 'main'!r} of {found.name}; {found.page}/tree/main lists the revisions"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no {found.kind} {found.name} on {constants.ENDPOINT}; correct the name or, if it is private, {log_in}"
    if status in (401, 403):
        return f"that {constants.ENDPOINT} denies access ({status}); {log_in}, with a token that may do this"
    if constants.HF_HUB_OFFLINE:
        return (
            f"nothing complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it once to"
            " download"
        )
    if isinstance(error, errors.HFValidationError):
        return f"no valid name of a repository; {_first_line(error)}"
    # The library's releases use httpx or httpx2.
    if "TransportError" in {base.__name__ for base in type(error).__mro__}:
        return f"no answer from {constants.ENDPOINT} and nothing in the cache; check the network, or name a folder"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).split("\n")), "")[:300]
