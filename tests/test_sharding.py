"""On many devices: a step is the one device's, weights are gathered as often as the config says, nothing fits by luck."""

import dataclasses
import os
import subprocess
import sys
import pathlib

import jax
import pytest

from melt_jax.config import MeshConfig
from melt_jax.sharding import ShardingError, make_mesh, mesh_shape, partition

MESHES = {
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "mixed": (2, 2, 2),
}
