"""Two CPU devices for the sharding tests; no silent promotion of ranks or dtypes anywhere."""

import os

# The tests compile more than they compute: level 0 saves a third of their time.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
