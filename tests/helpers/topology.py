"""Devices of TPU topologies for tests, described by libtpu without a TPU."""

import functools
import os
import sys

import pytest

from melt_jax.analysis.topology import OFFLINE, describe_devices


@functools.cache
def topology_devices(name):
    """The devices of a topology; skips the test on systems without a libtpu package."""
    if sys.platform != "linux":
        pytest.skip("libtpu exists for Linux only")
    os.environ |= OFFLINE  # libtpu reads them when it is loaded
    return describe_devices(name)
