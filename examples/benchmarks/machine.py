"""Where a measurement was made, for the JSON files of the examples and benchmarks."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lnq


def describe(*packages: str) -> dict[str, Any]:
    """Versions of lnq, Python and ``packages``, and the machine without its name."""
    return {
        "lnq": lnq.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }


def write_json(path: Path | None, results: dict[str, Any], *packages: str) -> None:
    """Write results and where they come from, if there is a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**results, "made_with": describe(*packages)}, indent=2) + "\n")
