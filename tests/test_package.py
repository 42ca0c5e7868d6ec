"""Promises about the package as a whole."""

import subprocess
import sys

import lnq

PROBE = """
import sys, time
import jax, flax, flax.linen, flax.nnx
start = time.perf_counter()
import lnq
{touch}
print(time.perf_counter() - start)
jax.config.update("jax_num_cpu_devices", 2)  # raises once a backend has been started
for heavy in ("scipy.optimize", "cvxpy", "lnq.cli", "orbax"):
    assert heavy not in sys.modules, heavy
"""


def seconds(touch: str) -> float:
    probe = [sys.executable, "-c", PROBE.format(touch=touch)]
    return float(subprocess.run(probe, capture_output=True, text=True, check=True).stdout)


def test_importing_starts_no_backend_and_nothing_heavy():
    assert seconds("") < 0.5


def test_using_every_module_still_starts_no_backend():
    assert seconds("[getattr(lnq, name) for name in lnq.__all__]") < 5.0


def test_every_public_name_exists():
    for name in lnq.__all__:
        value = getattr(lnq, name)
        for inner in getattr(value, "__all__", ()):
            assert hasattr(value, inner), f"{name}.{inner}"
    assert set(lnq.__all__) <= set(dir(lnq))
