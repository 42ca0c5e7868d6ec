"""Small models of every kind, and what `find_sites` must say of each.

Each row is written down by hand: the sites in forward order, and every other use of a leaf.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from lnq import tree


class Model(NamedTuple):
    """A function, its arguments, and what it does with its leaves.

    Attributes:
      sites: Names of the sites in forward order.
      others: ``(path, reason)`` of every other use.
    """

    name: str
    apply_fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    sites: tuple[str, ...]
    others: set[tuple[str, str]]


def array(shape, seed=0, mean=0.0, spread=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, spread, shape), jnp.float32)


def filled(shapes):
    """Numbers for a tree of shapes: kernels that keep the size of data, nothing at its default."""
    seeds = iter(range(1, 1000))

    def numbers(name, leaf):
        if not tree.is_float(leaf):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name.endswith(("scale", "var")):
            return 1 + jnp.abs(array(leaf.shape, next(seeds), 0, 0.3))
        fan_in = max(np.prod(leaf.shape[:-1]), 4)
        return array(leaf.shape, next(seeds), 0.1 / fan_in, fan_in**-0.5)

    return tree.map_named(numbers, shapes)


def weights(**shapes):
    return {name: array(shape, 7 + i, 0.05, 0.4) for i, (name, shape) in enumerate(shapes.items())}


def linen(name, module, args, sites, others=()):
    params = filled(jax.eval_shape(module.init, jax.random.key(0), *args))
    return Model(name, module.apply, params, args, sites, set(others))


def of_nnx(name, build, args, sites, others=(), run=lambda model, x: model(x)):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def apply_fn(state, *args):
        return run(nnx.merge(graphdef, state), *args)

    return Model(name, apply_fn, filled(state), args, sites, set(others))


def plain(name, apply_fn, params, args, sites, others=()):
    return Model(name, apply_fn, params, args, sites, set(others))


IMAGE = array((2, 6, 6, 2), 1, 0.5)
ROWS = array((4, 6), 2, 0.5)
SEQUENCE = array((2, 3, 8), 3, 0.5)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), feature_group_count=2)(x)
        return nn.Conv(3, (1, 1))(nn.silu(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))


class Layer(nn.Module):
    """A block as `nn.scan` wants it; rematerialized."""

    @nn.compact
    def __call__(self, x, _):
        return nn.remat(Block, prevent_cse=False)()(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=3, **axes)(name="layers")(x, None)[0]


class LastAxis(nn.Module):
    """A stack whose layers are the last axis of each leaf."""

    @nn.compact
    def __call__(self, x):
        def layer(dense, x, _):
            return jnp.tanh(dense(x)), None

        axes = {"variable_axes": {"params": -1}, "split_rngs": {"params": True}}
        return nn.scan(layer, length=2, **axes)(nn.Dense(6, name="dense"), x, None)[0]


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        return embed.attend(nn.Dense(4, use_bias=False)(embed(tokens)))


class Upsample(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@jax.tree_util.register_dataclass
@dataclass
class Affine:
    kernel: jax.Array
    bias: jax.Array


def dataclass_mlp(layers, x):
    for layer in layers:
        x = jnp.tanh(x @ layer.kernel + layer.bias)
    return x


def einsum_attention(params, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in "qkv")
    scores = nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    mixed = jnp.einsum("bhts,bshk->bthk", scores, v)
    return jnp.einsum("bthk,hkd->btd", mixed, params["out"])


def experts(params, x):
    """Each expert sees its own data."""

    def dense(w, b, x):
        return jnp.tanh(x @ w + b)

    def conv(w, x):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    x = jax.vmap(dense)(params["w"], params["b"], x)
    return jax.vmap(conv)(params["conv"], x)


def lora(params, x):
    return x @ params["w"] + (x @ params["a"]) @ params["b"]


def merged_lora(params, x):
    return x @ (params["w"] + params["a"] @ params["b"])


def standardized(params, x):
    w = params["kernel"] - params["kernel"].mean((0, 1, 2), keepdims=True)
    w = w * lax.rsqrt((w * w).mean((0, 1, 2), keepdims=True) + 1e-3)
    return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=NHWC)


NHWC = ("NHWC", "HWIO", "NHWC")


def convolutions(params, x):
    """NCHW with strides and groups, then dilated and one-dimensional."""
    x = x.transpose(0, 3, 1, 2)
    x = lax.conv_general_dilated(
        x,
        params["oihw"],
        (2, 1),
        ((0, 1), (2, 0)),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=2,
    )
    x = jnp.tanh(x).reshape(2, 4, -1)
    return lax.conv_general_dilated(
        x,
        params["iwo"],
        (1,),
        "SAME",
        rhs_dilation=(2,),
        dimension_numbers=("NCW", "IWO", "NWC"),
    )


def on_the_left(params, x):
    return params["w"] @ x.T


def while_layer(params, x):
    def turn(state):
        i, x = state
        return i + 1, jnp.tanh(x @ params["w"] + params["b"])

    return lax.while_loop(lambda state: state[0] < 3, turn, (0, x))[1] @ params["out"]


def cond_layer(params, x):
    def yes(x):
        return x @ params["yes"]

    def no(x):
        return jnp.tanh(x @ params["no"]) @ params["yes"]

    return lax.cond(x.sum() > 0, yes, no, x)


def indexed(params, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"][i]), x)


def nested(params, x):
    """Two stages of three layers each, the last layer first."""

    def layer(x, w):
        return jnp.tanh(x @ w), x.mean()

    def stage(x, ws):
        return lax.scan(layer, x, ws, reverse=True)

    return lax.scan(stage, x, params["w"])[0]


def deep_rnn(params, x):
    """A stack of layers runs once per time step; a scan without leaves comes first."""

    def layer(h, w):
        return jnp.tanh(h @ w), None

    def step(h, x):
        return lax.scan(layer, h + x @ params["start"], params["w"])[0], None

    x = lax.scan(lambda total, x: (total + x, total + x), jnp.zeros_like(x[0]), x)[1]
    return lax.scan(step, jnp.zeros((4, 6)), x)[0]


def ragged(params, x, sizes):
    return lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, params["up"], sizes)), params["down"], sizes)


def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("d",))


def sharded(params, x):
    """Leaves lie scattered over two devices and are gathered before use; data is split."""

    def body(params, x):
        w = lax.all_gather(params["w"], "d", axis=0, tiled=True)
        v = lax.all_gather(params["v"], "d", axis=1, tiled=True)
        return jnp.tanh(x @ w + params["b"]) @ v @ params["out"]

    spec = PartitionSpec
    specs = {"w": spec("d"), "v": spec(None, "d"), "b": spec(), "out": spec()}
    outside = jax.shard_map(body, mesh=mesh(), in_specs=(specs, spec("d")), out_specs=spec("d"))
    return outside(params, x)


def sharded_rnn(params, x):
    """A loop inside of shards, a leaf constant in it."""

    def body(w, x):
        def step(h, x):
            return jnp.tanh((h + x) @ w), None

        h = lax.pcast(jnp.zeros(x.shape[1:]), "d", to="varying")
        return lax.scan(step, h, x)[0]

    spec = PartitionSpec
    specs = (spec(), spec(None, "d"))
    return jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=spec("d"))(params["w"], x)


@jax.custom_jvp
def slope(x, alpha):
    return jnp.where(x > 0, x, alpha * x)


@slope.defjvp
def _(primals, tangents):
    (x, alpha), (dx, dalpha) = primals, tangents
    return slope(x, alpha), jnp.where(x > 0, dx, alpha * dx + x * dalpha)


@jax.custom_vjp
def projected(w, x):
    return x @ w


projected.defvjp(
    lambda w, x: (x @ w, (w, x)),
    lambda kept, g: (kept[1].T @ g, g @ kept[0].T),
)


def custom_rules(params, x):
    return slope(projected(params["w"], x), params["alpha"]) @ params["out"]


def views(params, x):
    """Sites behind transposes, casts, reshapes, slices and calls."""
    x = x @ jax.jit(lambda w: w.T)(params["jit"])
    x = (x.astype(jnp.float16) @ params["cast"].astype(jnp.float16)).astype(jnp.float32)
    x = x @ params["flat"].reshape(6, 4)
    x = x @ params["qkv"][1] + x @ params["qkv"][2, ::-1]
    left, right = jnp.split(params["halves"], 2, axis=1)
    x = jnp.tanh(x @ left) + x @ right
    return x @ lax.with_sharding_constraint(
        params["placed"], jax.NamedSharding(mesh(), PartitionSpec())
    )


LOG = []


def logged(params, x):
    x = x @ params["first"]
    io_callback(lambda x: LOG.append(("first", float(x))), None, x.sum(), ordered=True)
    jax.debug.callback(lambda x: LOG.append(("debug", float(x))), x.sum(), ordered=True)
    x = io_callback(lambda x: LOG.append(("second", float(x.sum()))) or x + 1, x, x, ordered=True)
    return x @ params["last"]


def added(*names):
    return {(name, "elementwise") for name in names}


SCORES = {("", "product of data")}
ATTENTION = ("query", "key", "value", "out")
BLOCK = (
    *[f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ATTENTION],
    "Dense_1/kernel",
    "Dense_0/kernel",
)
BLOCK_ADDED = (
    *[name.replace("kernel", "bias") for name in BLOCK],
    *[f"LayerNorm_{i}/{name}" for i in (0, 1) for name in ("scale", "bias")],
)


def under(prefix, names):
    return tuple(f"{prefix}/{name}" for name in names)


GALLERY = (
    linen(
        "linen MLP",
        MLP(),
        (ROWS,),
        under("params", ("Dense_1/kernel", "Dense_0/kernel")),
        added("params/Dense_1/bias", "params/Dense_0/bias"),
    ),
    linen(
        "linen CNN",
        CNN(),
        (IMAGE,),
        under("params", ("Conv_0/kernel", "Dense_0/kernel")),
        added(
            *under("batch_stats/BatchNorm_0", ("mean", "var")),
            *under("params", ("BatchNorm_0/scale", "BatchNorm_0/bias", "Dense_0/bias")),
        ),
    ),
    linen(
        "linen depthwise CNN",
        Depthwise(),
        (IMAGE,),
        under("params", ("Conv_0/kernel", "Conv_1/kernel")),
        added("params/Conv_0/bias", "params/Conv_1/bias"),
    ),
    linen(
        "linen transformer",
        Block(),
        (SEQUENCE,),
        under("params", BLOCK),
        SCORES | added(*under("params", BLOCK_ADDED)),
    ),
    linen(
        "linen scanned transformer",
        Stack(),
        (SEQUENCE,),
        under("params/layers/CheckpointBlock_0", BLOCK),
        SCORES | added(*under("params/layers/CheckpointBlock_0", BLOCK_ADDED)),
    ),
    linen(
        "linen stack on the last axis",
        LastAxis(),
        (ROWS,),
        ("params/dense/kernel",),
        added("params/dense/bias"),
    ),
    linen(
        "linen LSTM",
        nn.RNN(nn.LSTMCell(6)),
        (SEQUENCE,),
        under("params/cell", [f"{side}{gate}/kernel" for gate in "ifgo" for side in "ih"]),
        added(*under("params/cell", [f"h{gate}/bias" for gate in "ifgo"])),
    ),
    linen(
        "linen tied embedding",
        Tied(),
        (jnp.arange(6).reshape(2, 3),),
        under("params", ("Dense_0/kernel", "Embed_0/embedding")),
        {("params/Embed_0/embedding", "lookup")},
    ),
    linen(
        "linen transposed convolution",
        Upsample(),
        (IMAGE,),
        ("params/ConvTranspose_0/kernel",),
        added("params/ConvTranspose_0/bias"),
    ),
    of_nnx(
        "nnx MLP",
        NnxMLP,
        (ROWS,),
        ("first/kernel", "last/kernel"),
        added("first/bias", "last/bias"),
    ),
    of_nnx(
        "nnx CNN",
        NnxCNN,
        (IMAGE,),
        ("conv/kernel", "dense/kernel"),
        added("norm/mean", "norm/var", "norm/scale", "norm/bias", "dense/bias"),
    ),
    of_nnx(
        "nnx attention",
        lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
        (SEQUENCE,),
        tuple(f"{name}/kernel" for name in ATTENTION),
        SCORES | added(*(f"{name}/bias" for name in ATTENTION)),
    ),
    of_nnx(
        "nnx GRU",
        lambda rngs: nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs), rngs=rngs),
        (SEQUENCE,),
        ("cell/dense_i/kernel", "cell/dense_h/kernel"),
        added("cell/dense_i/bias"),
    ),
    plain(
        "einsum attention",
        einsum_attention,
        weights(q=(8, 2, 3), k=(8, 2, 3), v=(8, 2, 3), out=(2, 3, 8)),
        (SEQUENCE,),
        ("q", "k", "v", "out"),
        SCORES,
    ),
    plain(
        "dataclass",
        dataclass_mlp,
        [
            Affine(**weights(kernel=(6, 5), bias=(1, 5))),
            Affine(**weights(kernel=(5, 4), bias=(1, 4))),
        ],
        (ROWS,),
        ("0/kernel", "1/kernel"),
        added("0/bias", "1/bias"),
    ),
    plain(
        "vmapped experts",
        experts,
        weights(w=(3, 6, 5), b=(3, 1, 1, 5), conv=(3, 3, 5, 2)),
        (array((3, 2, 4, 6), 4, 0.5),),
        ("w", "conv"),
        added("b"),
    ),
    plain("LoRA", lora, weights(w=(6, 5), a=(6, 3), b=(3, 5)), (ROWS,), ("w", "a", "b")),
    plain(
        "merged LoRA",
        merged_lora,
        weights(w=(6, 5), a=(6, 2), b=(2, 5)),
        (ROWS,),
        (),
        added("w")
        | {("a + b", "product of leaves"), ("a + b + w", "the weight is computed from leaves")},
    ),
    plain(
        "weight standardization",
        standardized,
        weights(kernel=(3, 3, 2, 3)),
        (IMAGE,),
        (),
        added("kernel")
        | {("kernel", "reduction"), ("kernel", "the weight is computed from leaves")},
    ),
    plain(
        "unusual convolutions",
        convolutions,
        weights(oihw=(4, 1, 3, 3), iwo=(4, 3, 3)),
        (IMAGE,),
        ("oihw", "iwo"),
    ),
    plain("weight on the left", on_the_left, weights(w=(5, 6)), (ROWS,), ("w",)),
    plain(
        "while",
        while_layer,
        weights(w=(6, 6), b=(1, 6), out=(6, 3)),
        (ROWS,),
        ("w", "out"),
        added("b"),
    ),
    plain("cond", cond_layer, weights(yes=(6, 6), no=(6, 6)), (ROWS,), ("no", "yes", "yes@1")),
    plain("indexed stack", indexed, weights(w=(3, 6, 6)), (ROWS,), ("w",)),
    plain("nested scan", nested, weights(w=(2, 3, 6, 6)), (ROWS,), ("w",)),
    plain(
        "deep RNN",
        deep_rnn,
        weights(start=(6, 6), w=(2, 6, 6)),
        (array((3, 4, 6), 3, 0.2),),
        ("start", "w"),
    ),
    plain(
        "ragged experts",
        ragged,
        weights(up=(3, 6, 5), down=(3, 5, 4)),
        (array((7, 6), 3, 0.5), jnp.array([3, 0, 4])),
        ("up", "down"),
    ),
    plain(
        "FSDP",
        sharded,
        weights(w=(6, 4), v=(4, 6), b=(1, 4), out=(6, 3)),
        (ROWS,),
        ("w", "v", "out"),
        added("b"),
    ),
    plain("sharded RNN", sharded_rnn, weights(w=(6, 6)), (array((3, 4, 6), 3, 0.2),), ("w",)),
    plain(
        "custom rules",
        custom_rules,
        weights(w=(6, 5), alpha=(1, 5), out=(5, 3)),
        (ROWS,),
        ("w", "out"),
        {("alpha", "opaque primitive")},
    ),
    plain(
        "views",
        views,
        weights(jit=(6, 6), cast=(6, 6), flat=(24,), qkv=(3, 4, 4), halves=(4, 10), placed=(5, 3)),
        (ROWS,),
        ("jit", "cast", "flat", "qkv", "qkv@1", "halves", "halves@1", "placed"),
    ),
    plain("callbacks", logged, weights(first=(6, 5), last=(5, 3)), (ROWS,), ("first", "last")),
)
