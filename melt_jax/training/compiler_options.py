"""Sets of options of the TPU's compiler for training steps, chosen by the config key `compiler_options`.

They change the schedule and not what is computed. The options are those with which MaxText runs these chips. Offloading
collectives to SparseCores, which gave wrong losses elsewhere, is in none of them. On a CPU, a GPU or another TPU a set
is empty.
"""

from melt_jax.analysis.chips import find_chip

_OVERLAP = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
_VMEM_KIB = {"v5e": 65536, "v5p": 65536, "v6e": 98304, "tpu7x": 65536}  # of scratch memory for one fusion
_SETS = {"default": (), "overlap": ("overlap",), "vmem": ("vmem",), "overlap_vmem": ("overlap", "vmem")}


def compiler_options(name: str, device_kind: str) -> dict[str, str]:
    """The options of a set for a chip, for `jax.jit(compiler_options=…)`.

    Args:
      name: one of `CHOICES["compiler_options"]`. "default": none; "overlap": collectives run beside products and are
        fused with them; "vmem": fusions may use more VMEM; "overlap_vmem": both.
      device_kind: JAX's `device.device_kind`.
    """
    chip = find_chip(device_kind)
    if chip is None or chip.name not in _VMEM_KIB:
        return {}
    parts = {"overlap": _OVERLAP, "vmem": {"xla_tpu_scoped_vmem_limit_kib": str(_VMEM_KIB[chip.name])}}
    return {key: value for part in _SETS[name] for key, value in parts[part].items()}
