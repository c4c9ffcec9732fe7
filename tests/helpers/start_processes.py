"""Starts a Python program in several processes that join through `jax.distributed`."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start_processes(count, program):
    """Returns the processes; their standard output is text in a pipe."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    shared = os.environ | {"MELT_COORDINATOR": coordinator, "MELT_PROCESSES": str(count)}
    command = [sys.executable, "-c", program]
    return [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"MELT_PROCESS": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]
