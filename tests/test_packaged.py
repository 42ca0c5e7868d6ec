"""What `examples/packaged.py` reads out of archives."""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import packaged

FILES = {"p-1.0/b.txt": b"second", "p-1.0/a.txt": b"first", "p-1.0/c.bin": b"\x00"}


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in FILES.items():
            opened.writestr(name, content)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as opened:
        for name, content in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "write"),
    [("p-1.0-py3-none-any.whl", write_zip), ("p-1.0.zip", write_zip), ("p-1.0.tar.gz", write_tar)],
)
def test_wheels_and_sdists_are_read_alike(tmp_path, name, write):
    write(tmp_path / name)
    assert packaged.member(tmp_path / name, "p-1.0/c.bin") == b"\x00"
    texts = packaged.members(tmp_path / name, r"p-1\.0/\w+\.txt")
    assert list(texts.items()) == [("p-1.0/a.txt", b"first"), ("p-1.0/b.txt", b"second")]
    with pytest.raises(KeyError):
        packaged.member(tmp_path / name, "p-1.0/d.txt")


@pytest.mark.parametrize("name", ["a_package-1.0.zip", "A.Package-1.0.tar.gz"])
def test_an_sdist_in_the_cache_is_checked_and_not_fetched(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LNQ_DATA", str(tmp_path))
    (tmp_path / name).write_bytes(b"")
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing
    assert packaged.fetch_sdist("A-package", "1.0", digest) == tmp_path / name
    with pytest.raises(ValueError, match="SHA-256"):
        packaged.fetch_sdist("A-package", "1.0", "0")
