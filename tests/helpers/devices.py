"""Environments of processes that tests start."""

import os


def several_devices(count: int) -> dict[str, str]:
    """This process's environment, for another process that shall have `count` CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
