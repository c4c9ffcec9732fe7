"""Devices of TPU topologies for tests, described by libtpu without a TPU."""

import functools
import importlib.util
import os

import pytest

from melt_jax.analysis.topology import OFFLINE, describe_devices


@functools.cache
def topology_devices(name):
    """Returns the devices of a topology; skips the test if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]'")
    os.environ |= OFFLINE  # libtpu reads them when it is loaded
    return describe_devices(name)
