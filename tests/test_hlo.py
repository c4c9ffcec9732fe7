"""FLOPs and collectives of compiled programs, compared with numbers computed by hand from the shapes.

Programs are compiled for the CPU and for TPU topologies, which needs libtpu but no TPU. Another process compiles the
programs for several CPU devices: `python tests/test_hlo.py FOLDER` writes their texts.
"""

import functools
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from melt_jax.analysis.hlo import analyse
from tests.helpers.topology import topology_devices

# With a compilation cache, JAX tries and fails to load programs for devices that are only described.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning")

LAYERS = 6
SIZES = {"tokens": 64, "width": 128, "hidden": 256}


@pytest.fixture(params=["cpu", "v5e:2x2"])
def device(request):
    return jax.devices()[0] if request.param == "cpu" else topology_devices(request.param)[0]


def compiled(function, device, *arrays):
    """Returns the compiled text of a function of arrays (dtype, *shape)."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype, *shape in arrays]
    return jax.jit(function).lower(*structs).compile().as_text()


# One device

EINSUMS = (
    "bckge,bske->bkgcs",  # scores
    "bkgcs,bske->bckge",  # weighted values
    "bcd,dkge->bckge",
    "bckge,kged->bcd",
    "tbcd,dv->tbcv",
    "bcd,bce->de",  # the gradient of a projection
    "bkgcs,bckge->bske",
    "abij,abjk->abik",
)
LETTERS = dict(zip("abcdegijkstv", (2, 3, 16, 24, 32, 2, 8, 12, 4, 40, 3, 48)))


@pytest.mark.parametrize("equation", EINSUMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_einsum_flops_are_exact(equation, dtype, device):
    """Two FLOPs for every combination of the indices."""
    left, right = equation.split("->")[0].split(",")
    shapes = [[LETTERS[letter] for letter in letters] for letters in (left, right)]
    product = functools.partial(jnp.einsum, equation, precision="highest")
    program = analyse(compiled(product, device, (dtype, *shapes[0]), (dtype, *shapes[1])))
    assert program.flops == 2 * math.prod(LETTERS[letter] for letter in set(left + right))
    if dtype == "float32":
        assert program.flops_by_precision() == {"f32 highest": program.flops}
        assert program.bf16_flops == 6 * program.flops


def nested(x, w, trips):
    """Runs this 3 · `trips` times: `inner` 5 times, then one more product."""

    def inner(x, _):
        with jax.named_scope("inner"):
            return jnp.tanh(x @ w), None

    def outer(x, _):
        return lax.scan(inner, x, None, length=5)[0] @ w, None

    with jax.named_scope("dynamic"):
        return lax.fori_loop(0, trips, lambda _, x: lax.scan(outer, x, None, length=3)[0], x)


def test_nested_loops_multiply(device):
    """The caller states the trip count of a loop with a traced bound; otherwise its body counts once."""
    text = compiled(nested, device, ("bfloat16", 64, 128), ("bfloat16", 128, 128), ("int32",))
    once = 3 * (5 + 1) * 2 * 64 * 128 * 128
    unknown = analyse(text)
    assert unknown.flops == once
    assert [loop.op_name for loop in unknown.unknown_loops] == ["jit(nested)/dynamic/while"]
    assert "trips unknown: jit(nested)/dynamic/while" in unknown.summary()
    known = analyse(text, {"dynamic": 7, "elsewhere": 100})
    assert known.flops == 7 * once and not known.unknown_loops
    assert sorted((loop.trips, loop.source) for loop in known.loops) == [(3, "text"), (5, "text"), (7, "trips")]
    assert analyse(text, lambda op_name: 2.5 if op_name.endswith("dynamic/while") else None).flops == 2.5 * once
    assert known.flops_by_scope(("inner",)) == {"inner": known.flops * 5 / 6, "other": known.flops / 6}
    with pytest.raises(ValueError, match=r"jit\(nested\)/dynamic/while.*found -1"):
        analyse(text, {"dynamic": -1})


def test_trip_counts_of_all_loops_are_found(device):
    def several(x, w):
        product = lambda x: jnp.tanh(x @ w)
        down = lambda state: (state[0] - 2, product(state[1]))
        x = lax.fori_loop(2, 9, lambda i, x: product(x) + i, x)  # 7
        x = lax.while_loop(lambda state: state[0] > 1, down, (11, x))[1]  # 5: 11, 9, 7, 5, 3
        x = lax.while_loop(lambda state: state[0] >= 1, down, (22, x))[1]  # 11
        x, _ = lax.scan(lambda x, y: (product(x) * y, None), x, jnp.arange(13.0), reverse=True)
        return x

    program = analyse(compiled(several, device, ("float32", 16, 128), ("float32", 128, 128)))
    assert sorted(loop.trips for loop in program.loops) == [5, 7, 11, 13] and not program.unknown_loops
    assert program.flops == (5 + 7 + 11 + 13) * 2 * 16 * 128 * 128


def test_larger_branch_counts(device):
    def branches(x, w, which):
        return lax.switch(which, [lambda x: x, lambda x: x @ w @ w, lambda x: x @ w], x)

    text = compiled(branches, device, ("float32", 16, 128), ("float32", 128, 128), ("int32",))
    assert analyse(text).flops == 2 * 2 * 16 * 128 * 128


def test_backward_pass_doubles_its_forward_pass(device):
    def loss(ws, x):
        def layer(x, w):
            with jax.named_scope("mlp"):
                return jnp.tanh(x @ w), None

        return jnp.sum(lax.scan(layer, x, ws)[0])

    arguments = ("float32", LAYERS, 128, 128), ("float32", 16, 128)
    forward = analyse(compiled(loss, device, *arguments)).flops_by_scope(("mlp", "attention"))
    both = analyse(compiled(jax.grad(loss, (0, 1)), device, *arguments)).flops_by_scope(("mlp", "attention"))
    assert forward == {"mlp": LAYERS * 2 * 16 * 128 * 128} and both == {"mlp": 3 * forward["mlp"]}


def test_kernel_is_listed_by_name():
    from jax.experimental import pallas as pl

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def repeated(x):
        kernel = pl.pallas_call(double, out_shape=jax.typeof(x), name="double")
        return lax.scan(lambda x, _: (kernel(x), None), x, None, length=7)[0]

    program = analyse(compiled(repeated, topology_devices("v5e:2x2")[0], ("float32", 256, 256)))
    assert program.custom_calls == {"tpu_custom_call double": 7}
    assert "tpu_custom_call double, 7 times" in program.summary()


KERNEL = """HloModule step, is_scheduled=true

ENTRY %main (count: s32[1], query: bf16[512,128], keys: bf16[2048,128]) -> (bf16[512,128], f32[2048,128]) {
  %count = s32[1]{0} parameter(0)
  %query = bf16[512,128]{1,0} parameter(1)
  %keys = bf16[2048,128]{1,0} parameter(2)
  ROOT %out = (bf16[512,128]{1,0}, f32[2048,128]{1,0}) custom-call(%count, %query, %keys), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"blocks":"4",
"operands_by_block":"2:8",
"results_by_block":"1:4",
"sides":"128 512",
"whole":"128 512"
}}, metadata={op_name="jit(f)/cached_blocks/fold/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzvUg==","cost_estimate":{"flops":"8000","transcendentals":"10","bytes_accessed":"10"}}}
}
"""  # noqa: E501


@pytest.mark.parametrize(("trips", "live"), [(None, 1), ({"cached_blocks": 1.5}, 1.5 / 4), ({"cached_blocks": 9}, 1)])
def test_kernel_counts_the_blocks_that_it_visits(trips, live):
    """By its own estimate; FLOPs, operands and results that do not belong to the blocks count whole."""
    program = analyse(KERNEL, trips)
    (product,), (transfer,) = program.products, program.transfers
    assert product.flops == 2000 + 6000 * live and product.sides == (128, 512) and product.precision == "bf16"
    assert transfer.read == 4 + 2 * 512 * 128 + 2 * 2048 * 128 * live / 2
    assert transfer.written == 2 * 512 * 128 + 4 * 2048 * 128 * live
    assert program.custom_calls == {}


def test_compiler_markers_are_not_custom_calls():
    """The TPU compiler marks the packed indices of a gather with a custom call."""
    pick = lambda x, index: jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
    text = compiled(pick, topology_devices("v5e:2x2")[0], ("bfloat16", 4, 128, 256), ("int32", 4))
    assert "GatherScatterIndicesBitpacked" in text and analyse(text).custom_calls == {}


# Several devices


def every_collective(mesh):
    """A scan of one collective of each kind over float32 shards of 128 × 256; the all-reduce has two arrays."""
    data, model = mesh.axis_sizes

    def shard(x):
        def body(x, _):
            both = lax.psum((x, jnp.sin(x)), "data")
            gathered = lax.all_gather(x, "model", tiled=True)
            scattered = lax.psum_scatter(gathered, "model", tiled=True)
            passed = lax.ppermute(x, "data", [(i, (i + 1) % data) for i in range(data)])
            exchanged = lax.all_to_all(x, "model", 0, 0, tiled=True)
            return both[0] * both[1] + scattered + passed + exchanged, None

        return lax.scan(body, x, None, length=LAYERS)[0]

    axes = jax.P(("data", "model"))
    function = jax.shard_map(shard, in_specs=axes, out_specs=axes, check_vma=False)
    size = 128 * 256 * 4
    expected = {
        ("all-reduce", data): 2 * LAYERS * size,
        ("all-gather", model): LAYERS * size * model,
        ("reduce-scatter", model): LAYERS * size * model,
        ("collective-permute", data): LAYERS * size,
        ("all-to-all", model): LAYERS * size,
    }
    return function, [((128 * data * model, 256), axes)], 0, expected


def gathered_weights(mesh, tokens=SIZES["tokens"], width=SIZES["width"], hidden=SIZES["hidden"]):
    """A scan over feed-forward layers with weights split over both axes and gathered over `data` by layer."""
    data, model = mesh.axis_sizes

    def function(x, ups, downs):
        def layer(x, weights):
            up, down = jax.reshard(weights[0], jax.P(None, "model")), jax.reshard(weights[1], jax.P("model", None))
            hidden = jnp.tanh(product("bd,df->bf", x, up))
            return product("bf,fd->bd", hidden, down, out_sharding=jax.P("data", None)), None

        return lax.scan(layer, x, (ups, downs))[0]

    product = functools.partial(jnp.einsum, precision="highest")  # otherwise a TPU gathers bfloat16

    arguments = [
        ((tokens, width), jax.P("data")),
        ((LAYERS, width, hidden), jax.P(None, "data", "model")),
        ((LAYERS, hidden, width), jax.P(None, "model", "data")),
    ]
    expected = {
        ("all-gather", data): 2 * LAYERS * width * hidden // model * 4,
        ("all-reduce", model): LAYERS * tokens // data * width * 4,
    }
    return function, arguments, LAYERS * 2 * 2 * tokens * width * hidden // (data * model), expected


def sharded_text(make, devices, shape, dtype="float32"):
    """Returns (the text of a program on a mesh, its FLOPs per device, {(kind, group): bytes})."""
    mesh = jax.make_mesh(shape, ("data", "model"), devices=devices)
    function, arguments, flops, expected = make(mesh)
    with jax.set_mesh(mesh):
        sharded = lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
        text = jax.jit(function).lower(*(sharded(*argument) for argument in arguments)).compile().as_text()
    return text, flops, expected


@pytest.fixture(scope="module")
def cpu_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, __file__, str(folder)]
    subprocess.run(command, env=environment | {"PYTHONPATH": str(root)}, check=True, timeout=300)
    return folder


def check_sharded(text, flops, expected):
    program = analyse(text)
    assert program.flops == flops and not program.unknown_loops
    found = {(kind, group): size for (kind, group, _), (_, size) in program.collectives_by_kind().items()}
    assert found == expected
    assert program.collective_bytes == sum(expected.values())
    return program


@pytest.mark.parametrize("make", [every_collective, gathered_weights])
@pytest.mark.parametrize("target", ["cpu", "v5e:2x2", "v5e:4x4"])
def test_scanned_collectives_count_every_iteration(make, target, cpu_texts):
    if target == "cpu":
        mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
        *_, flops, expected = make(mesh)
        program = check_sharded((cpu_texts / make.__name__).read_text(), flops, expected)
    else:
        devices = topology_devices(target)
        side = math.isqrt(len(devices))
        program = check_sharded(*sharded_text(make, devices, (side, side)))
    assert all(collective.dtype == "f32" for collective in program.collectives)
    kinds = {collective.kind: collective for collective in program.collectives}
    if make is every_collective:
        gather, permute = kinds["all-gather"], kinds["collective-permute"]
        assert gather.sent_bytes == gather.bytes * (gather.group - 1) / gather.group
        assert permute.sent_bytes == permute.bytes


def test_overlapped_collective_counts_once():
    """A TPU program splits a large collective into three fusions, each of which contains a copy of it."""
    make = functools.partial(gathered_weights, tokens=4096, width=2048, hidden=8192)
    text, flops, expected = sharded_text(make, topology_devices("v5e:4x4"), (4, 4), "bfloat16")
    assert "AsyncCollectiveStart" in text and "%async_collective_fusion" in text
    program = check_sharded(text, flops, {key: size / 2 for key, size in expected.items()})
    assert any(collective.overlapped for collective in program.collectives)


def test_gradient_is_reduced_and_scattered():
    """On a TPU this is a fusion of an all-reduce and a slice; the CPU compiler does not scatter."""

    def make(mesh):
        function, arguments, flops, expected = gathered_weights(mesh)
        gradient = jax.grad(lambda ups, downs, x: jnp.sum(function(x, ups, downs)), (0, 1))
        return gradient, [arguments[1], arguments[2], arguments[0]], 3 * flops, expected

    text, flops, expected = sharded_text(make, topology_devices("v5e:2x2"), (2, 2))
    program = analyse(text)
    assert program.flops == flops
    sizes = {(kind, group): size for (kind, group, _), (_, size) in program.collectives_by_kind().items()}
    assert sizes[("reduce-scatter", 2)] == expected[("all-gather", 2)]


def _write_cpu_texts(folder):
    for make in (every_collective, gathered_weights):
        text, *_ = sharded_text(make, jax.devices(), (2, 4))
        (pathlib.Path(folder) / make.__name__).write_text(text)


if __name__ == "__main__":
    _write_cpu_texts(sys.argv[1])
