"""The demo's model: a small residual CNN with batch-norm for 28x28 gray images, 306 k weights."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, self.features, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = conv((3, 3), strides=self.stride, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = conv((3, 3), name="conv2")(y)
        y = norm(name="norm2")(y)
        if x.shape != y.shape:
            x = conv((1, 1), strides=self.stride, name="conv_shortcut")(x)
            x = norm(name="norm_shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem, one residual block per width, global mean, linear head.

    Images ``[batch, 28, 28]``, uint8 or float in [0, 255], to logits ``[batch, 10]``.
    """

    widths: Sequence[int] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.astype(jnp.float32)[..., None] / 127.5 - 1.0
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        for i, features in enumerate(self.widths):
            x = Block(features, stride=1 if i == 0 else 2, name=f"block{i + 1}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))
