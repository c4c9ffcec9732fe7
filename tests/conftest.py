"""Settings of every test: JAX on the CPU, one device.

Tests that need several devices start a process of their own with XLA_FLAGS=--xla_force_host_platform_device_count=N,
which has to be set before JAX starts. MELT_TEST_DEVICES=N does so for a whole run of pytest.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
if count := os.environ.get("MELT_TEST_DEVICES"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"

import jax
import pytest


@pytest.fixture
def float64():
    """Runs a test in float64, in which mathematical identities hold to a tight bound on every machine."""
    with jax.enable_x64(True):
        yield
