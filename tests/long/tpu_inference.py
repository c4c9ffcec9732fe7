"""Compares the tests' stand-in for tpu-inference with the wheel.

    python -m tests.long.tpu_inference

It downloads the wheel without its dependencies (2 MB), and neither installs nor imports the package, which needs vLLM,
another release of JAX and a TPU. It executes only the file with the kernel, for the reference implementation in it: in
float32, with requests of one and of several tokens in a step, grouped heads and scattered pages, the stand-in's paged
attention must give the same results and write the same entries. The names and leading parameters of everything that
`melt_jax.inference.tpu_inference` uses must be in the sources. It exits with status 1 if a check fails.
"""

import argparse
import ast
import importlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from types import ModuleType

import jax.numpy as jnp
import numpy as np

from tests.helpers import tpu_serving

PACKAGE = "tpu-inference==0.32.0"
KERNEL = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
TOLERANCE = 1e-5
# {file: {function: its leading parameters}}
FUNCTIONS = {
    "layers/common/attention_interface.py": {
        "attention": ["kv_cache", "q", "k", "v", "attention_metadata", "mesh", "head_dim_original"]
    },
    "models/common/model_loader.py": {"register_model": ["arch", "model"]},
}
# {file: {class: names that it assigns}}
CLASSES = {
    "layers/common/attention_metadata.py": {"AttentionMetadata": tpu_serving.FIELDS},
    "layers/common/sharding.py": {
        "ShardingAxisName2D": ["VOCAB", "ATTN_HEAD", "MLP_TENSOR"],
        "ShardingAxisNameBase": ["VOCAB", "ATTN_HEAD", "MLP_TENSOR"],
    },
}


def source_errors(root: pathlib.Path) -> list[str]:
    """What `FUNCTIONS` and `CLASSES` name and the sources lack."""
    errors = []
    for file, functions in FUNCTIONS.items():
        for node in ast.parse((root / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                found, expected = [arg.arg for arg in node.args.args], functions[node.name]
                if found[: len(expected)] != expected:
                    errors.append(f"{node.name}: expected {expected}, found {found}")
                functions = {name: value for name, value in functions.items() if name != node.name}
        errors += [f"{file}: expected {name}, found no such function" for name in functions]
    for file, classes in CLASSES.items():
        nodes = ast.parse((root / file).read_text()).body
        found = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        for name, expected in classes.items():
            parts = ast.walk(found[name]) if name in found else ()
            names = {part.id for part in parts if isinstance(part, ast.Name)}
            errors += [f"{name}: expected {field}, found none" for field in expected if field not in names]
    return errors


def attention_differences(root: pathlib.Path) -> tuple[float, float]:
    """The largest differences of results and of cache entries between the stand-in and the reference."""
    package = ModuleType("tpu_inference")
    package.__path__ = [str(root)]
    sys.modules["tpu_inference"] = package
    kernel = importlib.import_module(KERNEL)
    heads, kv_heads, width, pages, size = 4, 2, 6, 8, 4
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    integers = lambda *values: jnp.asarray(values, jnp.int32)
    query, keys, values = normal(8, heads, width), normal(8, kv_heads, width), normal(8, kv_heads, width)
    # Requests of 1, 1 and 5 tokens in the step, after 5, 0 and 4 earlier ones.
    lengths, tables, starts = integers(6, 1, 9), integers(5, 2, 0, 1, 0, 0, 7, 3, 4), integers(0, 1, 2, 7)
    counts = integers(2, 2, 3)
    cache = normal(*kernel.get_kv_cache_shape(pages, size, kv_heads, width, jnp.float32))
    expected, written = kernel.ref_ragged_paged_attention(
        query, keys, values, cache, lengths, tables, starts, counts, sm_scale=width**-0.5
    )
    # The wheel's cache interleaves keys and values and pads heads to 128 numbers.
    entries = lambda x: x[..., :width].reshape(pages, size, kv_heads, 2, width).swapaxes(2, 3)
    metadata = tpu_serving.AttentionMetadata(integers(), tables, lengths, starts, counts)
    found_cache, found = tpu_serving.attention(entries(cache), query, keys, values, metadata, None, width)
    largest = lambda a, b: float(jnp.abs(a - b).max())
    return largest(found[:7], expected), largest(found_cache, entries(written))


def main() -> None:
    """Prints a line for each check."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--ignore-requires-python", PACKAGE]
        subprocess.run([*command, "-d", name], check=True)
        [wheel] = pathlib.Path(name).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(name)
        root = pathlib.Path(name) / "tpu_inference"
        errors = source_errors(root)
        results, cache = attention_differences(root)
    print(f"{PACKAGE}: {len(errors)} names or parameters differ", *errors, sep="\n")
    print(f"paged attention: results differ by up to {results:.1e}, cache entries by up to {cache:.1e}")
    sys.exit(bool(errors) or max(results, cache) > TOLERANCE)


if __name__ == "__main__":
    main()
