"""Records the memory that a command holds, without what the allocator keeps of freed memory.

    PYTHONMALLOC=malloc python -m tests.helpers.live_memory command SAMPLES PHASE_FOLDER melt_jax.train --config=…
    PYTHONMALLOC=malloc python -m tests.helpers.live_memory saves CHECKPOINT FOLDER

The first form runs a command of melt_jax and appends a line to SAMPLES every few steps: step, live bytes, resident
bytes, open files. The second prints the live bytes that Orbax alone gains in one save of a checkpoint (median).

Live bytes are those that glibc's malloc has given out, to Python (`PYTHONMALLOC=malloc`) and to all libraries, after a
collection of garbage. The resident memory of a process also counts freed memory in partly used pages and arenas. Live
memory moves by some MiB, too: XLA needs some while a step runs, and TensorStore has a pool of zstd's compression
contexts, 3.5 MiB each. So compare many short intervals, not two moments.
"""

import ctypes
import gc
import importlib
import os
import pathlib
import resource
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from melt_jax import command_line
from tests.helpers.runs import last_step, read_checkpoint

EVERY = 10  # steps between two samples, which are taken in the middle between multiples of it
SAVES = 40


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def live_bytes() -> int:
    """Bytes that malloc has given out, in all its arenas and in maps of their own, and that were not freed."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _record(samples: pathlib.Path, phase: pathlib.Path) -> None:
    """Appends a sample every few steps, forever."""
    seen = 0
    while True:
        time.sleep(0.05)
        step = last_step(phase.parent, phase.name)
        if step == seen or step % EVERY != EVERY // 2:
            continue
        seen = step
        numbers = step, live_bytes(), resident_bytes(), len(os.listdir("/proc/self/fd"))
        with samples.open("a") as file:
            print(*numbers, file=file)


def _run_command(samples: str, phase: str, module: str, *arguments: str) -> None:
    recorder = threading.Thread(target=_record, args=(pathlib.Path(samples), pathlib.Path(phase)), daemon=True)
    command = importlib.import_module(module)
    sys.argv = [module, *arguments]
    recorder.start()
    command.define_flags()
    command_line.run(command.main)


def _measure_saves(checkpoint: str, folder: str) -> None:
    state = {name: jnp.asarray(leaf) for name, leaf in read_checkpoint(pathlib.Path(checkpoint)).items()}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    live = []
    with ocp.CheckpointManager(pathlib.Path(folder), options=options) as manager:
        for step in range(SAVES):
            manager.save(step, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            live.append(live_bytes())
    print(int(np.median(np.diff(live[SAVES // 4 :]))))  # the first saves also import and compile


if __name__ == "__main__":
    {"command": _run_command, "saves": _measure_saves}[sys.argv[1]](*sys.argv[2:])
