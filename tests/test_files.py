"""Files and folders, on a disk and in a bucket of an emulator on loopback: written completely or not at all."""

import json
import pathlib

import pytest

from melt_jax.config import InputError
from melt_jax.files import (
    INCOMPLETE,
    absolute,
    as_path,
    atomic_folder,
    completeness_errors,
    copy_companions,
    copy_file,
    folder_bytes,
    in_bucket,
    is_complete,
    make_folder,
    matching,
    read_on_disk,
    read_range,
    remove_folder,
    write_text,
    written_on_disk,
)


@pytest.fixture(params=["disk", "bucket"])
def base(request, tmp_path):
    """An empty folder, on a disk or in a bucket."""
    return tmp_path if request.param == "disk" else as_path(request.getfixturevalue("bucket")) / "base"


def made(folder):
    """Creates a folder; one in a bucket exists by its files alone."""
    make_folder(folder)
    return folder


def names(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize(
    "text, found",
    [
        ("", "an empty text"),
        ("s3://a/b", "the scheme s3://"),
        ("http://host/a", "the scheme http://"),
        ("gs://", "no bucket"),
        ("gs:///a", "no bucket"),
        ("GS://a/b", "the scheme GS://"),
        ("gs:/a/b", "found one"),
        (pathlib.Path("gs://a/b"), "found one"),
    ],
)
def test_other_schemes_are_refused_by_name(text, found):
    """The message is one line and names the path, unless that is empty."""
    with pytest.raises(InputError, match=found) as error:
        as_path(text)
    assert "\n" not in str(error.value)
    assert str(text) in str(error.value)


def test_paths_keep_their_text():
    """Also those with a colon."""
    for text in ("runs/a", "/runs/a", "a:b/c", "C:", "gs://bucket", "gs://bucket/a/b"):
        assert str(as_path(text)) == text
    assert str(absolute("gs://bucket/a")) == "gs://bucket/a"
    assert str(as_path("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert in_bucket(as_path("gs://bucket/a")) and not in_bucket(as_path("a"))
    assert as_path(as_path("gs://bucket/a")) == as_path("gs://bucket/a")


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gs://bucket/a: expected the package gcsfs, found none; run pip install"):
        as_path("gs://bucket/a")


def test_folder_is_complete_after_its_block(base):
    with atomic_folder(base / "a") as folder:
        write_text(folder / "x", "1")
        assert not is_complete(base / "a")
    assert is_complete(base / "a") and not completeness_errors(base / "a")
    assert names(base / "a") == ["x"] and names(base) == ["a"]


def test_failed_block_leaves_no_folder(base):
    with pytest.raises(ZeroDivisionError), atomic_folder(base / "a") as folder:
        write_text(folder / "x", "1")
        raise ZeroDivisionError
    assert not (base / "a").exists() and names(base) == []


def test_existing_folder_is_refused_or_replaced(base):
    """A replaced folder keeps none of its files."""
    write_text(made(base / "a") / "x", "1")
    with (
        pytest.raises(FileExistsError, match="expected a new folder, found one"),
        atomic_folder(base / "a"),
    ):
        pass
    assert names(base / "a") == ["x"]
    with atomic_folder(base / "a", overwrite=True) as folder:
        write_text(folder / "y", "2")
    assert names(base / "a") == ["y"] and is_complete(base / "a")


def test_next_writer_removes_what_killed_one_left(base):
    """Readers refuse what a killed writer left, wherever it was killed; files of other folders stay."""
    write_text(made(base / "ab") / "other", "1")
    writer = atomic_folder(base / "a")
    write_text(writer.__enter__() / "x", "1")  # and never leaves it, as if killed
    assert not is_complete(base / "a")
    if in_bucket(base):
        assert INCOMPLETE in completeness_errors(base / "a")[0]
    with atomic_folder(base / "a") as folder:
        assert [name for name in names(folder) if name != INCOMPLETE] == []
        write_text(folder / "y", "2")
    assert is_complete(base / "a") and names(base / "a") == ["y"] and names(base / "ab") == ["other"]


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # of gcsfs
def test_files_are_written_and_read_whole_or_by_range(base, tmp_path):
    data = bytes(range(256)) * 40_000  # 10 MB: more than one request
    with written_on_disk(made(base / "a") / "x") as file, file.open("wb") as out:
        out.seek(256)
        out.write(data[256:])
        out.seek(0)
        out.write(data[:256])
    assert (base / "a" / "x").read_bytes() == data
    assert read_range(base / "a" / "x", 1000, 1_000_000) == data[1000:1_000_000]
    assert read_range(base / "a" / "x", len(data) - 5, len(data) + 5) == data[-5:]
    assert read_range(base / "a" / "x", 7, 7) == b""
    copy_file(base / "a" / "x", base / "a" / "y")
    copy_file(base / "a" / "y", tmp_path / "z")
    assert (tmp_path / "z").read_bytes() == data
    assert folder_bytes(base) - (tmp_path / "z").stat().st_size * (not in_bucket(base)) == 2 * len(data)


def test_failed_write_uploads_nothing(bucket):
    path = as_path(bucket) / "x"
    with pytest.raises(ZeroDivisionError), written_on_disk(path) as file:
        file.write_text("half")
        raise ZeroDivisionError
    assert not path.exists()


def test_companions_are_found_and_copied(base):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"):
        write_text(base / name, json.dumps(name))
    made(base / "b")
    copied = ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert copy_companions(base, base / "b") == copied == names(base / "b")
    assert [file.name for file in matching(base, ("tok*", "*.json"))] == copied[:2]
    with read_on_disk(base, ("tok*",)) as folder:
        assert (folder / "tokenizer.json").read_text() == '"tokenizer.json"'


def test_removed_folder_is_gone(base):
    write_text(made(base / "a") / "x", "1")
    remove_folder(base / "a")
    remove_folder(base / "a")
    assert not (base / "a").exists()


@pytest.mark.slow
def test_failing_requests_lose_nothing(emulator, bucket):
    """Every fourth request fails, half of them after they were carried out; clients wait before they try again."""
    emulator.fail_every, before = 4, emulator.failures
    try:
        base = as_path(bucket)
        for i in range(2):
            with atomic_folder(base / "a", overwrite=True) as folder:
                write_text(folder / f"{i}", str(i))
                write_text(folder / "x", "y" * i)
            assert names(base / "a") == [str(i), "x"] and (base / "a" / "x").read_text() == "y" * i
            assert is_complete(base / "a")
    finally:
        emulator.fail_every = 0
    assert emulator.failures > before
