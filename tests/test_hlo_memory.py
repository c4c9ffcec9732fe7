"""Bytes of memory of compiled programs, compared with numbers computed by hand from the shapes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from melt_jax.analysis.hlo import analyse
from melt_jax.analysis.hlo_memory import buffer_bytes, hbm_bytes
from tests.helpers.topology import topology_devices

# With a compilation cache, JAX tries and fails to load programs for devices that are only described.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning")

LAYERS, WIDTH = 6, 1024


@pytest.fixture(params=["cpu", "v5e:2x2"])
def device(request):
    return jax.devices()[0] if request.param == "cpu" else topology_devices(request.param)[0]


def program(function, device, *arrays, donate=()):
    """The `Program` of a function of arrays (dtype, *shape)."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype, *shape in arrays]
    return analyse(jax.jit(function, donate_argnums=donate).lower(*structs).compile().as_text())


def test_matmul_moves_operands_and_result(device):
    found = program(jnp.dot, device, ("float32", 512, 1024), ("float32", 1024, 2048))
    assert found.memory_bytes == 4 * (512 * 1024 + 1024 * 2048 + 512 * 2048)
    assert sum(transfer.written for transfer in found.transfers) == 4 * 512 * 2048


def test_elementwise_chain_moves_each_array_once(device):
    chain = lambda x, y: jnp.tanh(x) * y + 2 * x
    assert program(chain, device, ("float32", 4096, 1024), ("float32", 4096, 1024)).memory_bytes == 3 * 4 * 4096 * 1024


def test_scan_reads_each_slice_once(device):
    """Stacked weights count once in all, not once per trip; the carried rows are small."""

    def layers(x, ws):
        with jax.named_scope("layers"):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    found = program(layers, device, ("float32", 8, WIDTH), ("float32", LAYERS, WIDTH, WIDTH))
    weights, rows = 4 * LAYERS * WIDTH * WIDTH, 4 * 8 * WIDTH
    copies = 3 if device.platform == "cpu" else 1  # a CPU copies each slice before it multiplies
    assert copies * weights <= found.memory_bytes <= copies * weights + 12 * LAYERS * rows


def test_update_in_place_moves_only_the_update(device):
    """A row of a donated array, such as an entry of a cache."""

    def write(cache, row, slot):
        return lax.dynamic_update_slice(cache, row, (slot, jnp.int32(0)))

    arrays = ("float32", 4096, WIDTH), ("float32", 8, WIDTH), ("int32",)
    found = program(write, device, *arrays, donate=0).memory_bytes
    assert 2 * 4 * 8 * WIDTH <= found <= 4 * 4 * 8 * WIDTH


def test_gathered_rows_are_read_alone(device):
    """The table is larger than VMEM, to which a smaller one is copied whole."""
    found = program(lambda table, ids: table[ids], device, ("float32", 2**20, 128), ("int32", 16)).memory_bytes
    assert 2 * 4 * 16 * 128 <= found < 4 * 2**20 * 128 / 1000


def test_values_in_vmem_do_not_count():
    """The hidden layer of a small network never reaches HBM."""
    found = program(
        lambda x, up, down: jnp.tanh(x @ up) @ down,
        topology_devices("v5e:2x2")[0],
        ("bfloat16", 256, 1024),
        ("bfloat16", 1024, 2048),
        ("bfloat16", 2048, 1024),
    )
    assert found.memory_bytes == 2 * (256 * 1024 + 2 * 1024 * 2048 + 256 * 1024)


def test_all_reduce_reads_and_writes_its_array():
    mesh = jax.make_mesh((4,), ("data",), devices=topology_devices("v5e:2x2"))
    total = jax.shard_map(lambda x: lax.psum(x, "data"), in_specs=jax.P("data"), out_specs=jax.P())
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((4 * 4096, 4096), "float32", sharding=jax.NamedSharding(mesh, jax.P("data")))
        found = analyse(jax.jit(total).lower(x).compile().as_text())
    size = 4 * 4096 * 4096
    assert found.memory_bytes == 2 * size and found.collective_bytes == size


def test_nameless_copies_have_the_name_of_their_use():
    """A weight that is copied to VMEM ahead of its product counts for the product's scope."""

    def twice(x, up, down):
        hidden = jnp.tanh(x @ up)
        with jax.named_scope("second"):
            return hidden @ down

    arrays = ("bfloat16", 256, 1024), ("bfloat16", 1024, 2048), ("bfloat16", 2048, 1024)
    found = program(twice, topology_devices("v5e:2x2")[0], *arrays)
    copies = [transfer for transfer in found.transfers if transfer.opcode == "copy-start" and transfer.read > 2e6]
    assert copies and all(copy.op_name or copy.used_by for copy in copies)


@pytest.mark.parametrize(
    ("shape", "padded", "in_hbm"),
    [
        ("f32[8,100]", 3200, 3200),
        ("f32[8,100]{1,0:T(8,128)}", 4096, 4096),
        ("f32[8,100]{0,1:T(8,128)}", 104 * 128 * 4, 104 * 128 * 4),
        ("bf16[2,8,1,64]{3,0,2,1:T(8,128)(2,1)S(1)}", 8 * 8 * 128 * 2, 0),
        ("(f32[2]{0:T(128)}, s32[]{:T(128)S(6)})", 512 + 4, 512),
    ],
)
def test_padding_and_memory_spaces_are_read(shape, padded, in_hbm):
    assert (buffer_bytes(shape), hbm_bytes(shape)) == (padded, in_hbm)


FUSED = """HloModule step, is_scheduled=true

%inner (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  ROOT %same = f32[64,128]{1,0} bitcast(%p)
}

%update (big: f32[64,128], small: f32[1,128], at: s32[], table: f32[64,128]) -> (f32[64,128], f32[1,128], f32[64,128]) {
  %big = f32[64,128]{1,0} parameter(0)
  %small = f32[1,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %table = f32[64,128]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %renamed = f32[64,128]{1,0} fusion(%table), kind=kLoop, calls=%inner
  %row = f32[1,128]{1,0} dynamic-slice(%renamed, %at, %zero), dynamic_slice_sizes={1,128}
  %written = f32[64,128]{1,0} dynamic-update-slice(%big, %small, %at, %zero)
  ROOT %all = (f32[64,128]{1,0}, f32[1,128]{1,0}, f32[64,128]{1,0}) tuple(%written, %row, %table)
}

ENTRY %main (big: f32[64,128], small: f32[1,128], at: s32[], table: f32[64,128]) -> (f32[64,128], f32[1,128], f32[64,128]) {
  %big = f32[64,128]{1,0} parameter(0)
  %small = f32[1,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %table = f32[64,128]{1,0} parameter(3)
  ROOT %out = (f32[64,128]{1,0}, f32[1,128]{1,0}, f32[64,128]{1,0}) fusion(%big, %small, %at, %table), kind=kLoop, calls=%update
}
"""  # noqa: E501


def test_fusions_move_what_they_select_and_update():
    """The update, the index and a row are read, the update and the row are written; what passes through is not."""
    (transfer,) = analyse(FUSED).transfers
    assert (transfer.read, transfer.written) == (4 * 128 + 4 + 4 * 128, 4 * 128 + 4 * 128)


CONVERTED = """HloModule step, is_scheduled=true

%inner (p: f32[64,128]) -> bf16[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  ROOT %narrow = bf16[64,128]{0,1} copy(%p)
}

%take (table: f32[64,128], at: s32[], other: f32[64,128]) -> (bf16[1,128], bf16[64,128]) {
  %table = f32[64,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %other = f32[64,128]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %narrow = bf16[64,128]{0,1} fusion(%table), kind=kLoop, calls=%inner
  %row = bf16[1,128]{1,0} dynamic-slice(%narrow, %at, %zero), dynamic_slice_sizes={1,128}
  %whole = bf16[64,128]{1,0} convert(%other)
  ROOT %all = (bf16[1,128]{1,0}, bf16[64,128]{1,0}) tuple(%row, %whole)
}

ENTRY %main (table: f32[64,128], at: s32[], other: f32[64,128]) -> (bf16[1,128], bf16[64,128]) {
  %table = f32[64,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %other = f32[64,128]{1,0} parameter(2)
  ROOT %out = (bf16[1,128]{1,0}, bf16[64,128]{1,0}) fusion(%table, %at, %other), kind=kLoop, calls=%take
}
"""


def test_fusions_convert_only_what_they_select():
    """A float32 row and the index are read and a bfloat16 row is written, besides a table that is converted whole."""
    (transfer,) = analyse(CONVERTED).transfers
    assert (transfer.read, transfer.written) == (4 * 128 + 4 + 4 * 64 * 128, 2 * 128 + 2 * 64 * 128)
