"""Published peak figures of accelerators."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's published peaks.

    Attributes:
      name: as Google Cloud and NVIDIA write it.
      kinds: JAX's `device.device_kind` for it.
      flops: bf16 FLOP/s, dense, a multiply-add counted as 2.
      memory: HBM, bytes.
      memory_bandwidth: HBM, bytes/s.
      link_bandwidth: bytes/s between chips over all links of a chip (ICI, NVLink), the sum of both directions. A chip
        sends at most at half of it, if the collective uses all links.
      dimensions: number of dimensions of the torus that the links form; 0 if they form none.
      matrix_unit: rows and columns of a matrix unit, which holds a square of one operand; 1 if it has none like that.
      devices: JAX devices that share the chip and its figures.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    dimensions: int
    matrix_unit: int = 1
    devices: int = 1

    @property
    def device_flops(self) -> float:
        """bf16 FLOP/s of one JAX device."""
        return self.flops / self.devices

    @property
    def device_memory(self) -> float:
        """HBM of one JAX device, bytes."""
        return self.memory / self.devices

    @property
    def device_bandwidth(self) -> float:
        """HBM bytes/s of one JAX device."""
        return self.memory_bandwidth / self.devices

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s that one JAX device sends in a ring along one dimension of the torus, in both directions."""
        return self.link_bandwidth / 2 / max(self.dimensions, 1) / self.devices


GIB = 2**30
HOP_SECONDS = 1e-6  # latency of one hop between TPUs ("How to Scale Your Model", jax-ml.github.io/scaling-book)

# TPUs: "key specifications" of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. For v4 the page rounds HBM
# bandwidth to 1200 GB/s and omits the links: six, with 50 GB/s in each direction (arXiv 2304.01433).
# Matrix units: 128 × 128, from v6e on 256 × 256 (the same pages).
# v4 and v5p expose a chip's two cores as one device (for v4 with chip_config_name="megacore"); tpu7x exposes its two
# chiplets as two devices.
# H100: NVIDIA's data sheet, SXM5. It gives bf16 with sparsity, twice the dense figure, and NVLink in both directions.
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, 600e9, 3, 128),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 400e9, 2, 128),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 1200e9, 3, 128),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 800e9, 2, 256),
    Chip("tpu7x", ("TPU7x", "TPU v7x"), 2307e12, 192 * GIB, 7380e9, 1200e9, 3, 256, devices=2),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3350e9, 900e9, 0),
)


def find_chip(device_kind: str) -> Chip | None:
    """The `Chip` of a JAX `device.device_kind`; None if it is not in the table, such as a CPU."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
