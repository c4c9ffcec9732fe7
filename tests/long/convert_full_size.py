"""Converts a synthetic checkpoint of Ouro-1.4B's exact shapes in both directions and measures peak memory.

Not part of the test suite: it writes 2.87 GB of random bfloat16 weights and needs five times that space on disk. Peak
memory is the largest resident set of each conversion's process (ru_maxrss), including the interpreter and libraries.
The bound is 1.3 times the size of the input, even if new gates make the output larger.

    python -m tests.long.convert_full_size /tmp/full            Ouro-1.4B, a few minutes
    python -m tests.long.convert_full_size /tmp/full --files 3 --layers 48     Ouro-2.6B in three files

    python -m tests.long.convert_full_size /tmp/full --bucket    the input in a bucket of an emulator on loopback

With --bucket, the input is copied to the emulator, and opened by `open_model` instead of converted back; the emulator
keeps it in the folder.

Prints one line per conversion. Exits with status 1 if a conversion exceeds the bound or a tensor changes.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
from safetensors import safe_open

from melt_jax.checkpoints.published import scan_tensors
from melt_jax.config import ModelConfig
from melt_jax.files import Path, as_path, file_sizes, folder_bytes
from tests.helpers import buckets
from tests.helpers.synthetic import write_published

BOUND = 1.3


def main() -> None:
    """Runs all conversions; exits with status 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="new folder for all checkpoints")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--bucket", action="store_true", help="read the input from a bucket")
    parser.add_argument("--keep", action="store_true", help="do not remove the folder")
    args = parser.parse_args()
    base = args.folder
    write_published(base / "ouro", ModelConfig(layers=args.layers), args.files)
    print(f"published: {folder_bytes(base / 'ouro'):,} bytes in {args.files} file(s)", flush=True)
    if args.bucket:
        with buckets.emulator(base / "objects") as emulator:
            good = read_from_bucket(base, emulator)
        finish(base, args.keep, good)
    good = True
    for source, target, form, *more in (
        ("ouro", "looplm", "orbax"),
        ("looplm", "ouro_again", "published"),
        ("ouro", "melt", "orbax", "--gate=elementwise"),
        ("melt", "melt_published", "published"),
    ):
        good &= convert(base / source, base / target, form, more)
    good &= same_tensors(base / "ouro", base / "ouro_again")
    finish(base, args.keep, good)


def finish(base: pathlib.Path, keep: bool, good: bool) -> None:
    """Removes the folder and ends the process."""
    if not keep:
        shutil.rmtree(base)
    sys.exit(0 if good else 1)


def read_from_bucket(base: pathlib.Path, emulator: buckets.Emulator) -> bool:
    """Copies the input to a bucket, converts and opens it there; returns whether both succeed within the bound."""
    source = as_path(emulator.new_bucket()) / "ouro"
    for name in file_sizes(base / "ouro"):
        emulator.upload(base / "ouro" / name, str(source / name))
    good = convert(source, base / "looplm", "orbax", [])
    opens = f"from melt_jax.checkpoints.orbax import open_model; open_model({str(source)!r})"
    return measure(source, "open_model", [sys.executable, "-c", opens]) and good


def convert(source: Path, target: pathlib.Path, form: str, more: list[str]) -> bool:
    """Runs one conversion in its own process; returns whether it succeeds with a peak memory within the bound."""
    command = [sys.executable, "-m", "melt_jax.convert"]
    command += [f"--input={source}", f"--output={target}", f"--to={form}", *more]
    return measure(source, f"{target.name} ({form})", command)


def measure(source: Path, title: str, command: list[str]) -> bool:
    """Runs a command that reads `source`; returns whether it succeeds with a peak memory within the bound."""
    start = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    peak = usage.ru_maxrss * 1024
    size = folder_bytes(source)
    good = status == 0 and peak <= BOUND * size
    seconds = time.perf_counter() - start
    print(f"{source.name} -> {title}: peak {peak:,} bytes = {peak / size:.3f} of {size:,}, "
          f"bound {BOUND}, {seconds:.0f} s: {'ok' if good else 'FAIL'}", flush=True)  # fmt: skip
    return good


def same_tensors(first: pathlib.Path, second: pathlib.Path) -> bool:
    """Whether two published folders hold bitwise identical tensors."""
    ours, theirs = scan_tensors(first)[0], scan_tensors(second)[0]
    same = sorted(ours) == sorted(theirs)
    for name in ours if same else ():
        tensors = []
        for (file, *_), *_ in (ours[name], theirs[name]):
            with safe_open(file, framework="numpy") as stored:
                tensors.append(stored.get_tensor(name))
        same &= tensors[0].dtype == tensors[1].dtype and np.array_equal(*(t.view(np.uint16) for t in tensors))
    print(f"{first.name} and {second.name}: {'bitwise identical tensors' if same else 'FAIL, tensors differ'}")
    return same


if __name__ == "__main__":
    main()
