"""Tensors of safetensors files. A file on a disk is mapped; of one in a bucket, only the ranges needed are read."""

import functools
import json
import math

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from melt_jax.checkpoints.published_config import STORED_DTYPES
from melt_jax.files import Path, as_path, file_bytes, in_bucket, read_range

Shape = tuple[int, ...]
RANGE_BYTES = 2**25  # read at a time from a bucket
HEADER_BYTES = 10**8  # the format's limit


def list_tensors(file: Path) -> dict[str, tuple[Shape, str]]:
    """{name: (shape, safetensors dtype code)} of a file, from its header.

    Raises:
      SafetensorError: the header is malformed, or the file is shorter than it says.
    """
    if in_bucket(file):
        _read_header.cache_clear()  # the file may have been replaced
        header, start = _read_header(str(file))
        size = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if (found := file_bytes(file)) != size:
            raise SafetensorError(f"{found} bytes instead of the {size} that its header states")
        return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
    with safe_open(file, framework="numpy") as tensors:
        pieces = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in pieces.items()}


def read_tensor(file: Path, name: str) -> np.ndarray:
    """A tensor that `list_tensors` lists, of one of `STORED_DTYPES`."""
    if not in_bucket(file):
        # Reopening the file for each tensor unmaps the pages read before.
        with safe_open(file, framework="numpy") as tensors:
            return tensors.get_tensor(name)
    header, start = _read_header(str(file))
    entry = header[name]
    first, last = (start + offset for offset in entry["data_offsets"])
    data = np.empty(last - first, np.uint8)
    for offset in range(first, last, RANGE_BYTES):
        piece = read_range(file, offset, min(offset + RANGE_BYTES, last))
        data[offset - first : offset - first + len(piece)] = np.frombuffer(piece, np.uint8)
    return data.view(jnp.dtype(STORED_DTYPES[entry["dtype"]])).reshape(entry["shape"])


@functools.lru_cache
def _read_header(address: str):
    """({name: entry}, the offset of the data in the file) of a safetensors file in a bucket."""
    file = as_path(address)
    size = int.from_bytes(read_range(file, 0, 8), "little")
    if size > HEADER_BYTES:
        raise SafetensorError("no safetensors header")
    try:
        header = json.loads(read_range(file, 8, 8 + size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            bits = 8 * (last - first)
            if dtype := STORED_DTYPES.get(entry["dtype"]):
                expected = 8 * jnp.dtype(dtype).itemsize * math.prod(entry["shape"])
                if bits != expected:
                    raise ValueError(f"{name}: {bits} bits instead of {expected}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorError(f"a malformed header: {error!r}") from error
    return header, 8 + size
