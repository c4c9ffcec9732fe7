"""XLA flags for tests: compilation is fast, programs are slow. Those of tests are small and run once or twice."""

import importlib.metadata

_KNOWN_TO_ALL = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# XLA ends the process if it does not know a flag. jaxlib 0.12 does not know this one.
_ONLY_0_10 = " --xla_cpu_use_fusion_emitters=false"
QUICK = _KNOWN_TO_ALL + (_ONLY_0_10 if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
