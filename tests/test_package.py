"""Promises about the package as a whole."""

import subprocess
import sys

import lnq

IMPORTS = """
import sys
import jax, flax, flax.linen, flax.nnx
before = set(sys.modules)
import lnq
assert set(sys.modules) - before == {"lnq"}, set(sys.modules) - before
"""
USES = """
import sys
import jax, lnq
[getattr(lnq, name) for name in lnq.__all__]
jax.config.update("jax_num_cpu_devices", 2)  # raises once a backend has been started
for heavy in ("scipy.optimize", "cvxpy", "lnq.cli", "orbax"):
    assert heavy not in sys.modules, heavy
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_brings_in_nothing_but_one_small_file():
    run(IMPORTS)


def test_using_every_module_starts_no_backend_and_imports_nothing_heavy():
    run(USES)


def test_every_public_name_exists():
    for name in lnq.__all__:
        value = getattr(lnq, name)
        for inner in getattr(value, "__all__", ()):
            assert hasattr(value, inner), f"{name}.{inner}"
    assert set(lnq.__all__) <= set(dir(lnq))
