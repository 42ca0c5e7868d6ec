"""Fashion-MNIST from its four IDX files, gzipped or not."""

import gzip
from pathlib import Path

import numpy as np


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_fashion_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, 28, 28]`` uint8 and labels ``[n]`` int32 of split ``"train"`` or ``"t10k"``."""

    def find(name: str) -> Path:
        for path in (folder / f"{name}.gz", folder / name):
            if path.exists():
                return path
        raise FileNotFoundError(
            f"{folder}: no {name}[.gz]; install Debian's dataset-fashion-mnist, or put the four "
            "IDX files in a folder and name it with LNQ_DATA or --data"
        )

    images = read_idx(find(f"{split}-images-idx3-ubyte"))
    labels = read_idx(find(f"{split}-labels-idx1-ubyte"))
    return images, labels.astype(np.int32)
