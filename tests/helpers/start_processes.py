"""Starts a Python program in several processes that join through `jax.distributed`."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start_processes(count, *arguments, stderr=None, **variables):
    """Starts Python `count` times with the same arguments and environment variables.

    Even a single process uses `jax.distributed`, so that it adds numbers in the same order as several.

    Returns:
      The processes; their standard output is a text pipe.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    shared = os.environ | {"MELT_COORDINATOR": coordinator, "MELT_PROCESSES": str(count)} | variables
    command = [sys.executable, *map(str, arguments)]
    start = lambda i: subprocess.Popen(
        command, cwd=ROOT, env=shared | {"MELT_PROCESS": str(i)}, stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    return [start(i) for i in range(count)]
