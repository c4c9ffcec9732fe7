"""Analysis of compiled programs: HLO text, FLOPs, chips, topologies and the report of `melt_jax.compile`."""
