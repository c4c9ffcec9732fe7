"""Flags with which XLA compiles the small programs of tests fast. They run once or twice, so slow programs are fine."""

import importlib.metadata

_KNOWN_TO_ALL = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# XLA ends the process if it does not know a flag. Later versions of jaxlib do not know this one.
_ONLY_0_10 = " --xla_cpu_use_fusion_emitters=false"
QUICK = _KNOWN_TO_ALL + (_ONLY_0_10 if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
