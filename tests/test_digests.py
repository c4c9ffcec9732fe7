"""Records of folders: damaged files are named, and only folders of the same kind that melt_jax wrote are replaced."""

import json
import pathlib

import pytest

from melt_jax.config import InputError
from melt_jax.digests import DIGESTS, SKIP, check_digests, digest_errors
from melt_jax.files import atomic_folder

KIND = "a test folder"


def write(folder: pathlib.Path, text: str = "text", **kwargs) -> pathlib.Path:
    """A folder of two files with a record."""
    with atomic_folder(folder, kind=KIND, **kwargs) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a").write_text(text)
        (temporary / "sub/b").write_bytes(bytes(range(256)))
    return folder


def flip(path: pathlib.Path) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["a", "sub/b"])
@pytest.mark.parametrize(
    "damage",
    [flip, pathlib.Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"text and more")],
)
def test_damaged_files_are_named(tmp_path, name, damage):
    folder = write(tmp_path / "x")
    check_digests(folder)
    damage(folder / name)
    with pytest.raises(InputError, match=rf"x: expected the files as they were written.*\n  - .*x/{name}: expected"):
        check_digests(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": "melt_jax digests 1", "kind": "", "files": {"../a": [1, "0"]}}']
)
def test_damaged_records_are_named(tmp_path, text):
    folder = write(tmp_path / "x")
    (folder / DIGESTS).write_text(text)
    assert [f"{folder / DIGESTS}: expected a record" in error for error in digest_errors(folder)] == [True]


def test_comparison_can_be_skipped(tmp_path, monkeypatch):
    """By the variable, or if there is no record; files that were not recorded do not count."""
    folder = write(tmp_path / "x")
    (folder / "more").write_text("")
    check_digests(folder)
    flip(folder / "a")
    monkeypatch.setenv(SKIP, "1")
    check_digests(folder)
    monkeypatch.delenv(SKIP)
    (folder / DIGESTS).unlink()
    check_digests(folder)


def test_changes_after_a_comparison_are_found(tmp_path):
    folder = write(tmp_path / "x")
    check_digests(folder)
    (folder / "a").write_text("tExt")
    assert len(digest_errors(folder)) == 1


def test_own_folders_of_the_kind_are_replaced(tmp_path):
    write(write(tmp_path / "x"), "other", overwrite=True)
    assert (tmp_path / "x/a").read_text() == "other" and [path.name for path in tmp_path.iterdir()] == ["x"]


def _foreign(folder):
    (folder / DIGESTS).unlink()


def _other_kind(folder):
    record = json.loads((folder / DIGESTS).read_text())
    (folder / DIGESTS).write_text(json.dumps(record | {"kind": "another kind"}))


def _more_files(folder):
    (folder / "sub/thesis.tex").write_text("years of work")


def _file(folder):
    folder.rename(folder.with_name("target"))
    folder.write_text("")


@pytest.mark.parametrize(
    "change, found",
    [
        (_foreign, "found one without digests.json"),
        (_other_kind, "a test folder to overwrite, found another kind"),
        (_more_files, "found also sub/thesis.tex"),
        (_file, "found a file"),
    ],
)
def test_other_folders_are_never_replaced(tmp_path, change, found):
    folder = write(tmp_path / "x")
    change(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"x: expected .*{found}"):
        write(folder, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("source", ["x", "x/sub", "x/sub/b", ".", "link/a"])
def test_inputs_are_never_replaced(tmp_path, source):
    """The output is an input, contains one or is inside one, also through a link."""
    folder = write(tmp_path / "x")
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(InputError, match="expected an output apart from the inputs"):
        write(folder, overwrite=True, inputs=[tmp_path / source])
    assert (folder / "a").exists()
