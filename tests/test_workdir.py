"""One workdir, one run: a second run is refused, the lock ends with its process, and the disk must have room."""

import shutil
import subprocess
import sys
import types

import pytest

from configs import nano
from melt_jax.config import ConfigError, freeze
from melt_jax.training.plan import disk_bytes
from melt_jax.training.workdir import LOCK, claim_workdir
from tests.helpers.tiny import TINY

RUN = freeze(nano.get_config())
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on elsewhere")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def claim(workdir):
    with claim_workdir(RUN, TINY, workdir):
        return True


def test_second_run_is_refused_until_the_first_dies(tmp_path):
    """SIGKILL leaves the file, but no lock."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="no other run uses, found process 7 on elsewhere; wait for it"):
            claim(tmp_path)
        first.kill()
        first.wait()
    assert (tmp_path / LOCK).exists() and claim(tmp_path)


def test_block_releases_the_workdir(tmp_path):
    with claim_workdir(RUN, TINY, tmp_path / "new/run"):
        with pytest.raises(ConfigError, match=r"found process \d+ on "):
            claim(tmp_path / "new/run")
    assert claim(tmp_path / "new/run")


def test_other_files_do_not_count_as_written(tmp_path, monkeypatch):
    """Only checkpoints and models of the run's phases count as written."""
    needed = disk_bytes(RUN, TINY)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=needed - 1))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/weights").write_bytes(bytes(1000))
    with pytest.raises(ConfigError, match="GB of free disk space"):
        claim(tmp_path)
    (tmp_path / "transition/checkpoints").mkdir(parents=True)
    (tmp_path / "transition/checkpoints/weights").write_bytes(bytes(1000))
    assert claim(tmp_path)


def test_full_disk_is_reported_before_the_run(tmp_path, monkeypatch):
    """Unless the run has ended and only reads."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"expected .* GB of free disk space .*, found 0.000 GB; free some"):
        claim(tmp_path)
    (tmp_path / RUN.phases[-1] / "model").mkdir(parents=True)
    assert claim(tmp_path)


def test_workdir_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        claim(tmp_path / "file")
