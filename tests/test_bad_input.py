"""Generated bad input: each case ends with one clear message, or is accepted. A sample of `tests.long.bad_input`."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_sample_of_bad_input_ends_with_messages():
    """Every fortieth case of each trial, in one process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.long.bad_input", "--every=40"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "trial       cases  survived" in done.stdout and len(done.stdout.splitlines()) >= 6
