"""Descriptions of the devices of TPU topologies; they need libtpu but no TPU."""

import importlib.util
from typing import Any

from jax.experimental import topologies

from melt_jax.config import InputError

# Environment of a process that describes TPUs but uses none; libtpu reads it when it is loaded.
OFFLINE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def describe_devices(topology: str) -> list[Any]:
    """The devices of a topology such as "v5e:4x4".

    Raises:
      InputError: libtpu is not installed or does not support the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu: expected the TPU compiler, found none; pip install 'jax[tpu]'")
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # libtpu documents no exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"topology: expected one such as v5e:4x4 or v5p:2x2x2, found {topology!r}: {reason}"
        ) from error
