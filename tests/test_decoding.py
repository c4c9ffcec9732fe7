"""Bytes that decoding must move, and those that compiled decoding steps do move."""

import dataclasses

import jax
import pytest

from melt_jax import compile as command
from melt_jax.analysis.decoding import decoding_bytes
from melt_jax.analysis.hlo import analyse
from melt_jax.command_line import load_config
from melt_jax.config import ModelConfig, freeze
from melt_jax.inference import generation
from melt_jax.inference.generation import GenerationOptions, decode_block, decoding_options, prepare_prefill
from melt_jax.model.model import init_model, unstack
from melt_jax.sharding import make_mesh
from tests.helpers.topology import topology_devices

# With a compilation cache, JAX tries and fails to load programs for devices that are only described.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning")

MELT = ModelConfig(gate="elementwise")
LOOPLM = dataclasses.replace(MELT, gate="none")


def test_weights_are_read_once_per_loop():
    """Ouro-1.4B's layers in four loops, its norm, head and exit gate, and one row of the embedding per sequence."""
    layers = 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 4 * 2048)
    looplm = 4 * (layers + 2048) + 2048 * 49152 + 2048 + 1 + 3 * 2048
    assert decoding_bytes(LOOPLM, 3, 0).weights == 2 * looplm
    gates = 24 * (2 * 2048**2 + 2048)
    assert decoding_bytes(MELT, 3, 0).weights == 2 * (looplm + 3 * gates)
    assert decoding_bytes(dataclasses.replace(MELT, first_loop="gated"), 3, 0).weights == 2 * (looplm + 4 * gates)


def test_both_caches_are_read_alike():
    """MELT's shared entries are read in every loop, the LoopLM's in one; a token adds four times as many of these."""
    melt, looplm = (decoding_bytes(config, 3, 1000) for config in (MELT, LOOPLM))
    assert (
        melt.cache == looplm.cache == 3 * 1000 * 4 * 196_608 and looplm.written == 4 * melt.written == 3 * 4 * 196_608
    )


SMALL = dict(vocab=512, width=512, layers=8, kv_heads=4, heads=4, head_width=128, feed_forward=1024)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "topology"),
    [("decode", "v5e:2x2"), ("decode", "v5p:2x2x1"), ("decode", "v6e:2x2"), ("decode_looplm", "v5e:2x2")],
)
def test_decoding_moves_little_more_than_it_must(phase, topology):
    """At most 1.15 times the bytes: no copies of weights, of the cache or of empty slots."""
    settings = {
        "data.length": 8192, "data.batch": 4, "mesh.tensor": 1, "micro_batches": 1, "teacher": "none-such",
    }  # fmt: skip
    config = freeze(load_config("configs/ouro_1_4b.py", [(key, str(value)) for key, value in settings.items()]))
    mesh = make_mesh(config.mesh, topology_devices(topology))
    report = command.compile_phase(config, ModelConfig(**SMALL), mesh, phase)
    assert report.tokens == GenerationOptions(1).block and not report.program.unknown_loops
    assert 1 <= report.moved_token_bytes / report.token_bytes < 1.15
    assert f"{report.moved_token_bytes / report.token_bytes:.3f} of the" in report.text()


@pytest.mark.parametrize(("gate", "count"), [("none", 1), ("none", 4), ("elementwise", 1)])
def test_decoding_on_a_cpu_moves_little_more(gate, count):
    """A CPU reads all slots of its cache; here they are full."""
    model = unstack(init_model(ModelConfig(**SMALL | {"layers": 2}, gate=gate), jax.random.key(0)))
    options, prompts = GenerationOptions(2), [[1]] * count
    inputs = prepare_prefill(model, prompts, 1023, 1)
    state = generation._initial_state(inputs.lengths)
    request = generation._request(options, range(len(prompts)))
    lowered = decode_block.lower(model, inputs.cache, state, request, block=32)
    text = lowered.compile(decoding_options(len(prompts))).as_text()
    program = analyse(text, lambda name: 1 if name.count("while") == 1 else None)
    needed = decoding_bytes(model.config, len(prompts), inputs.cache.length, itemsize=4).total
    assert not program.unknown_loops
    assert needed <= program.memory_bytes < 1.15 * needed
