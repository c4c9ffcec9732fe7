"""Sets of compiler options: which chips have them, and that the TPU's compiler takes them."""

import jax
import jax.numpy as jnp
import pytest

from melt_jax.config import CHOICES
from melt_jax.training.compiler_options import compiler_options
from tests.helpers.topology import topology_devices

# With a compilation cache, JAX tries and fails to load programs for devices that are only described.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning")


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiler_takes_every_set(topology):
    """An unknown option, or one with a wrong value, is an error of the compiler."""
    device = topology_devices(topology)[0]
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    options = {name: compiler_options(name, device.device_kind) for name in CHOICES["compiler_options"]}
    assert options["default"] == {} and options["overlap_vmem"] == options["overlap"] | options["vmem"]
    assert len(options["overlap"]) > 5 and len(options["vmem"]) == 1
    assert not any("sparse" in option or "offload" in option for option in options["overlap_vmem"])
    jax.jit(lambda x: x + 1, compiler_options=options["overlap_vmem"]).lower(x).compile()


@pytest.mark.parametrize("kind", ["cpu", "TPU v4", "NVIDIA H100 80GB HBM3"])
def test_other_devices_have_no_options(kind):
    assert all(compiler_options(name, kind) == {} for name in CHOICES["compiler_options"])
