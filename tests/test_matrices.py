"""Rows of a site's data, times a matrix of its leaf, are what the site returns."""

import functools
import itertools
from typing import NamedTuple

import gallery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gallery import GALLERY, array
from jax import lax

from lnq import matrices, tree
from lnq.sites import Stat, find_sites, tap


def distance(a, b):
    """Norm of the difference, relative to the second."""
    a, b = np.float64(a), np.float64(b)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def last(observe):
    """What came by last, in a while and in a branch too; zeros where nothing did."""
    return Stat(
        observe,
        lambda like: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like),
        lambda a, b: jnp.where(jnp.any(b != 0), b, a),
    )


def all_rows(x, site):
    return matrices.rows(x, site, jnp.arange(matrices.count_rows(site)))


def is_matrices(site):
    return matrices.reason(site) == ""


class Product(NamedTuple):
    """Of one site, by the layers of its leaf.

    Attributes:
      x: ``[l, g, r, n]``.
      w: ``[l, g, n, o]``.
      y: ``[l, g, r, o]``, the site's own output.
    """

    x: np.ndarray
    w: np.ndarray
    y: np.ndarray


def by_groups(y, site):
    """A site's output ``[*lengths, *out]`` as ``[l, g, r, o]``, channels as they stand in it."""
    lengths = y.ndim - len(site.out.shape)
    own = [lengths + i for i in site.out_channels]
    places = [i for i in range(lengths, y.ndim) if i not in own]
    channels = int(np.prod([y.shape[i] for i in own], dtype=int))
    y = y.transpose(*range(lengths), *places, *own)
    layers = int(np.prod([site.shape[i] for i in site.sliced], dtype=int))
    groups = int(np.prod([site.shape[i] for i in site.batch], dtype=int))
    y = y.reshape(layers, groups, -1, channels)
    if site.window is None or site.window.groups == 1:
        return y
    blocks = y.reshape(layers, y.shape[2], site.window.groups, -1)
    return np.swapaxes(blocks, 1, 2)


def products(sites, apply_fn, params, *args):
    """``{site: Product}`` of those sites that are products of matrices, as one program."""
    leaves = dict(tree.named_leaves(params))

    @jax.jit
    def run(params, *args):
        x = tap(apply_fn, last(all_rows), is_matrices)(params, *args)[1]
        y = tap(apply_fn, last(lambda y, _: y), is_matrices, outputs=True)(params, *args)[1]
        return x, y

    x, y = jax.device_get(run(params, *args))
    found = {}
    for site in filter(is_matrices, sites):
        w = np.asarray(matrices.to_matrix(np.asarray(leaves[site.path]), site))
        rows = x[site.name].reshape(len(w), *x[site.name].shape[-3:])
        found[site] = Product(rows, w, by_groups(y[site.name], site))
    return found


# The models of the gallery.


NO_MATRICES = {
    "indexed stack": {"w"},
    "ragged experts": {"up", "down"},
    "FSDP": {"w", "v", "out"},
    "sharded RNN": {"w"},
    "views": {"flat", "qkv", "qkv@1", "halves", "halves@1"},
}
"""Sites that read a part of their leaf, or do so anew for each row, or on each device."""

every_model = pytest.mark.parametrize("model", GALLERY, ids=lambda model: model.name)
MODELS = {model.name: model for model in GALLERY}


@functools.cache
def sites_of(name):
    model = MODELS[name]
    return find_sites(model.apply_fn, model.params, *model.args).sites


@every_model
def test_parts_ragged_products_and_shards_have_a_reason_and_no_other_site_has(model):
    sites = sites_of(model.name)
    named = {site.name for site in sites if matrices.reason(site)}
    assert named == NO_MATRICES.get(model.name, set())
    for site in sites:
        if site.shards:
            assert matrices.reason(site) == "inside shard_map"
        elif matrices.reason(site):
            assert "a part of the leaf, or is ragged" in matrices.reason(site)


@pytest.mark.parametrize(
    "model",
    [m for m in GALLERY if set(m.sites) - NO_MATRICES.get(m.name, set())],
    ids=lambda model: model.name,
)
def test_rows_times_matrix_are_the_output_of_the_site(model):
    sites, seen = sites_of(model.name), set()
    expected = set(model.sites) - NO_MATRICES.get(model.name, set())
    for sign in (1.0, -1.0) if model.name == "cond" else (1.0,):
        args = [sign * x if tree.is_float(x) else x for x in model.args]
        for site, (x, w, y) in products(sites, model.apply_fn, model.params, *args).items():
            assert x.dtype == site.act.dtype
            if not np.any(y):  # a branch not taken
                continue
            tolerance = 1e-6 if site.out.dtype == jnp.float32 else 1e-3
            assert distance(np.float64(x) @ np.float64(w), y) < tolerance, site.name
            seen.add(site.name)
    assert seen == expected


@every_model
def test_leaves_and_fields_of_their_grids_come_back_from_matrices(model):
    leaves = dict(tree.named_leaves(model.params))
    for site in filter(is_matrices, sites_of(model.name)):
        leaf = np.asarray(leaves[site.path])
        w = np.asarray(matrices.to_matrix(leaf, site))
        np.testing.assert_array_equal(matrices.from_matrix(w, site), leaf)
        fields = 1.0 + np.arange(w[:, :, :1].size, dtype=np.float32).reshape(w[:, :, :1].shape)
        for field in (fields, fields[:1]):  # one a channel, and the same for all layers
            whole = np.asarray(matrices.from_matrix(field, site))
            shared = {*site.contracting, *(site.sliced if len(field) < len(w) else ())}
            sizes = [1 if i in shared else n for i, n in enumerate(leaf.shape)]
            assert whole.shape == tuple(sizes)
            np.testing.assert_array_equal(matrices.to_matrix(whole, site), field)
            np.testing.assert_array_equal(matrices.to_matrix(leaf * whole, site), w * field)


# Convolutions, from their definition.


class Conv(NamedTuple):
    """A case: layouts of data, kernel and output, shapes, and how the window moves."""

    layout: tuple[str, str, str]
    data: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1

    def __call__(self, w, x):
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            lhs_dilation=self.dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=self.layout,
            feature_group_count=self.groups,
        )


def in_order(a, layout, order):
    return a.transpose([layout.index(axis) for axis in order])


def rows_by_hand(case, x):
    """``[g, r, n]``: one entry of the data at a time, where its place is worked out."""
    space = case.layout[1].translate({ord("I"): None, ord("O"): None})
    x = in_order(x, case.layout[0], "NC" + space)
    kernel = [case.kernel[case.layout[1].index(axis)] for axis in space]
    moves = (case.strides, case.padding, case.dilation, case.kernel_dilation)
    moves = list(zip(x.shape[2:], kernel, *moves, strict=True))
    sizes = [
        ((n - 1) * d + 1 + sum(edges) - ((k - 1) * kd + 1)) // stride + 1
        for n, k, stride, edges, d, kd in moves
    ]

    def entry(example, feature, at, offset):
        place = []
        for i, j, (n, _, stride, edges, d, kd) in zip(at, offset, moves, strict=True):
            dilated = i * stride + j * kd - edges[0]
            if dilated % d or not 0 <= dilated // d < n:
                return 0.0
            place.append(dilated // d)
        return x[(example, feature, *place)]

    every = [
        [
            entry(example, feature, at, offset)
            for feature in range(x.shape[1])
            for offset in itertools.product(*map(range, kernel))
        ]
        for example in range(len(x))
        for at in itertools.product(*map(range, sizes))
    ]
    return np.array(every, np.float32).reshape(len(every), case.groups, -1).swapaxes(0, 1)


def matrix_by_hand(case, w):
    """``[g, n, o]``."""
    space = case.layout[1].translate({ord("I"): None, ord("O"): None})
    w = in_order(w, case.layout[1], "O" + "I" + space)
    return np.stack([block.reshape(len(block), -1).T for block in np.split(w, case.groups)])


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
CONVOLUTIONS = {
    "strided, uneven edges": Conv(
        NHWC, (2, 6, 5, 2), (3, 2, 2, 5), (2, 3), ((0, 2), (3, 1)), (1, 1), (1, 1)
    ),
    "1 x 1, strided": Conv(
        NHWC, (2, 5, 4, 3), (1, 1, 3, 4), (2, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)
    ),
    "grouped, NCHW": Conv(
        NCHW, (2, 4, 5, 6), (6, 2, 3, 2), (1, 2), ((2, 0), (0, 1)), (1, 1), (2, 1), 2
    ),
    "depthwise": Conv(
        NHWC, (1, 5, 4, 3), (3, 3, 1, 6), (1, 2), ((1, 1), (0, 2)), (1, 1), (1, 1), 3
    ),
    "transposed": Conv(NHWC, (2, 3, 2, 2), (3, 4, 2, 5), (1, 1), ((1, 2), (3, 2)), (2, 3), (1, 1)),
    "transposed, grouped, NCHW": Conv(
        NCHW, (1, 4, 3, 2), (2, 2, 2, 3), (1, 1), ((1, 0), (2, 2)), (3, 2), (1, 1), 2
    ),
    "all at once, NWC": Conv(
        ("NWC", "WIO", "NWC"), (3, 5, 4), (3, 2, 6), (2,), ((1, 4),), (3,), (2,), 2
    ),
    "edges cut off": Conv(
        ("NCW", "IWO", "NWC"), (2, 3, 7), (3, 2, 4), (2,), ((-1, 2),), (2,), (3,)
    ),
    "one place": Conv(("NWC", "WIO", "NWC"), (2, 4, 3), (4, 3, 5), (1,), ((0, 0),), (1,), (1,)),
    "volume": Conv(
        ("NDHWC", "DHWIO", "NDHWC"),
        (1, 3, 4, 2, 2),
        (2, 3, 1, 2, 3),
        (1, 2, 1),
        ((1, 0), (0, 2), (0, 0)),
        (1, 1, 2),
        (1, 1, 1),
    ),
}


@functools.cache
def together(table):
    """Leaves and data of cases, and their products, found in one model that has them all."""
    cases = TABLES[table]
    ws = {name: array(kernel, 5, 0.4, 0.5) for name, (_, kernel, _) in cases.items()}
    xs = {name: array(data, 6, 3.0, 2.0) for name, (_, _, data) in cases.items()}

    def model(ws, xs):
        return {name: product(ws[name], xs[name]) for name, (product, _, _) in cases.items()}

    found = products(find_sites(model, ws, xs).sites, model, ws, xs).items()
    return ws, xs, {site.path: (site, product) for site, product in found}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_what_its_definition_says(name):
    ws, xs, found = together("convolutions")
    case, (site, (x, w, y)) = CONVOLUTIONS[name], found[name]
    rows = rows_by_hand(case, np.asarray(xs[name]))
    matrix = matrix_by_hand(case, np.asarray(ws[name]))
    assert matrices.count_rows(site) == rows.shape[1]
    assert distance(np.float64(rows) @ matrix, y[0]) < 1e-6
    np.testing.assert_array_equal(x[0], rows)
    np.testing.assert_array_equal(w[0], matrix)


# Places.


def experts(w, x):
    return jnp.einsum("teh,ehd->etd", x, w)


PLACES = {
    "dense": (lambda w, x: x @ w, (6, 5), (4, 6)),
    "dense, images": (lambda w, x: jnp.einsum("nhwk,kc->nhwc", x, w), (3, 5), (2, 3, 2, 3)),
    "experts": (experts, (3, 6, 5), (4, 3, 6)),
    "grouped convolution": (
        CONVOLUTIONS["grouped, NCHW"],
        CONVOLUTIONS["grouped, NCHW"].kernel,
        CONVOLUTIONS["grouped, NCHW"].data,
    ),
    "transposed convolution": (
        CONVOLUTIONS["transposed"],
        CONVOLUTIONS["transposed"].kernel,
        CONVOLUTIONS["transposed"].data,
    ),
}


@pytest.mark.parametrize("case", PLACES.values(), ids=PLACES)
def test_places_may_be_few_repeated_traced_and_of_more_data_than_the_site_was_found_with(case):
    product, kernel, data = case
    w, x = array(kernel, 5, 0.4, 0.5), array(data, 6, 3.0, 2.0)
    (site,) = find_sites(product, w, x).sites
    more = np.concatenate([x, array(data, 7), array(data, 8)])
    (larger,) = find_sites(product, w, more).sites
    count = matrices.count_rows(larger)
    assert count == 3 * matrices.count_rows(site)
    places = np.random.default_rng(1).integers(0, count, 9)
    places = np.concatenate([places, places[:2], [count - 1, 0]])

    @jax.jit
    def run(w, x, places):
        return matrices.rows(x, site, places), matrices.to_matrix(w, site)[0], product(w, x)

    rows, matrix, y = jax.device_get(run(w, more, places))
    assert distance(np.float64(rows) @ matrix, by_groups(y, larger)[0][:, places]) < 1e-6


# What is whole, and what is a part.


def scanned_slices(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w[:, ::-1]), None), x, w)[0]


def grouped_by_batch(w, x):
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=layout, batch_group_count=2
    )


PARTS = {
    # name: product, shape of the leaf, shape of the data
    "slice of the sum": (lambda w, x: x @ w[1:], (7, 5), (4, 6)),
    "slice of the channels": (lambda w, x: x @ w[:, :5], (6, 7), (4, 6)),
    "every other row": (lambda w, x: x @ w[::2], (12, 5), (4, 6)),
    "sum reversed": (lambda w, x: x @ w[::-1], (6, 5), (4, 6)),
    "channels reversed": (lambda w, x: x @ w[:, ::-1], (6, 5), (4, 6)),
    "kernel reversed": (
        lambda w, x: CONVOLUTIONS["one place"](w[::-1], x),
        (4, 3, 5),
        (2, 4, 3),
    ),
    "reversed and transposed": (lambda w, x: x @ jnp.flip(w).T, (5, 6), (4, 6)),
    "half": (lambda w, x: x @ jnp.split(w, 2, 1)[1], (6, 10), (4, 6)),
    "one of a stack": (lambda w, x: x @ w[1], (3, 6, 5), (4, 6)),
    "a traced one of a stack": (
        lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.int32(x[0, 0]) * 0, 0, False),
        (3, 6, 5),
        (4, 6),
    ),
    "one row cut out for all of the sum": (
        lambda w, x: x @ jnp.broadcast_to(lax.dynamic_slice_in_dim(w, jnp.int32(2), 1), (6, 5)),
        (6, 5),
        (4, 6),
    ),
    "slices in a scan": (scanned_slices, (3, 6, 6), (4, 6)),
    "sum and channels in one axis": (lambda w, x: x @ w.reshape(6, 4), (24,), (4, 6)),
    "sum and channels cut anew": (lambda w, x: x @ w.reshape(6, 4), (4, 6), (4, 6)),
    "one row for all of the sum": (lambda w, x: x @ jnp.broadcast_to(w, (6, 5)), (1, 5), (4, 6)),
    "one column for all channels": (lambda w, x: x @ jnp.broadcast_to(w, (6, 5)), (6, 1), (4, 6)),
    "rows repeated": (lambda w, x: x @ jnp.repeat(w, 2, 0), (3, 5), (4, 6)),
    "groups of examples": (grouped_by_batch, (3, 2, 4), (4, 5, 2)),
}


@pytest.mark.parametrize("case", PARTS.values(), ids=PARTS)
def test_a_product_with_a_part_of_a_leaf_or_with_one_entry_twice_is_not_whole(case):
    product, kernel, data = case
    sites = find_sites(product, array(kernel, 5), array(data, 6)).sites
    assert len(sites) == 1
    assert not sites[0].whole
    assert matrices.reason(sites[0])


def test_of_two_uses_one_may_be_whole():
    def product(w, x):
        return x @ w + x @ w[::-1] + x @ w[jnp.array([1, 0, 2, 3, 5, 4])]

    sites, others = find_sites(product, array((6, 5)), gallery.ROWS)
    assert [site.whole for site in sites] == [True, False]
    assert "lookup" in {use.reason for use in others}


WHOLE = {
    "transposed": (lambda w, x: x @ w.T, (5, 6), (4, 6)),
    "leaf on the left": (lambda w, x: w @ x.T, (5, 6), (4, 6)),
    "inputs merged": (lambda w, x: x @ w.reshape(6, 5), (2, 3, 5), (4, 6)),
    "inputs transposed and merged": (
        lambda w, x: x @ w.transpose(1, 0, 2).reshape(6, 5),
        (2, 3, 5),
        (4, 6),
    ),
    "inputs split": (
        lambda w, x: jnp.einsum("thk,hkd->td", x, w.reshape(2, 3, 5)),
        (6, 5),
        (4, 2, 3),
    ),
    "channels transposed and merged": (
        lambda w, x: x @ w.transpose(0, 2, 1).reshape(6, 6),
        (6, 2, 3),
        (4, 6),
    ),
    "channels split": (
        lambda w, x: jnp.einsum("tk,kab->tab", x, w.reshape(6, 2, 3)),
        (6, 6),
        (4, 6),
    ),
    "channels on both sides of the sum": (
        lambda w, x: jnp.einsum("tk,akb->tab", x, w),
        (2, 6, 3),
        (4, 6),
    ),
    "channels out of order": (lambda w, x: jnp.einsum("akb,tk->bat", w, x), (2, 6, 3), (4, 6)),
    "summed in the order of the kernel": (
        lambda w, x: lax.dot_general(x, w, (((2, 1), (0, 2)), ((), ()))),
        (3, 5, 2),
        (4, 2, 3),
    ),
    "squeezed kernel": (lambda w, x: x @ w.squeeze((0, 1)), (1, 1, 6, 5), (2, 3, 3, 6)),
    "expert of one": (
        lambda w, x: jnp.einsum("etn,eno->eto", x, w[None]),
        (6, 5),
        (1, 4, 6),
    ),
    "one leaf for all experts": (
        lambda w, x: jnp.einsum("etn,eno->eto", x, jnp.broadcast_to(w, (3, 6, 5))),
        (6, 5),
        (3, 4, 6),
    ),
    "experts, channels first": (
        lambda w, x: jnp.einsum("ten,oen->eot", x, w),
        (5, 3, 6),
        (4, 3, 6),
    ),
    "two axes of experts, in another order": (
        lambda w, x: lax.dot_general(x, w, (((3,), (2,)), ((1, 0), (0, 1)))),
        (2, 3, 6, 5),
        (3, 2, 4, 6),
    ),
    "experts on the last axis": (
        lambda w, x: jax.vmap(lambda w, x: x @ w, in_axes=(2, 1))(w, x),
        (6, 5, 3),
        (4, 3, 6),
    ),
    "no channel": (lambda w, x: x @ w, (6,), (4, 6)),
    "one row": (lambda w, x: w @ x, (5, 6), (6,)),
    "a call": (lambda w, x: x @ jax.jit(lambda w: w.T)(w), (5, 6), (4, 6)),
    "convolution over a batch of batches": (
        lambda w, x: jax.vmap(lambda x: CONVOLUTIONS["transposed"](w, x), in_axes=3)(x),
        (3, 4, 2, 5),
        (2, 3, 2, 3, 2),
    ),
    "a kernel for each batch": (
        lambda w, x: jax.vmap(CONVOLUTIONS["depthwise"], in_axes=(2, 0))(w, x),
        (3, 3, 2, 1, 6),
        (2, 1, 5, 4, 3),
    ),
    "kernels for one batch": (
        lambda w, x: jax.vmap(lambda w: CONVOLUTIONS["transposed"](w, x), in_axes=1)(w),
        (3, 3, 4, 2, 5),
        (2, 3, 2, 2),
    ),
}


TABLES = {
    "convolutions": {name: (case, case.kernel, case.data) for name, case in CONVOLUTIONS.items()},
    "whole": WHOLE,
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_is_a_product_of_matrices(name):
    ws, _, found = together("whole")
    site, (x, w, y) = found[name]
    assert distance(np.float64(x) @ np.float64(w), y) < 1e-6
    np.testing.assert_array_equal(matrices.from_matrix(w, site), ws[name])


@pytest.mark.parametrize("axis", [0, -1], ids=["first", "last"])
def test_layers_stand_in_their_order_wherever_the_stack_is(axis):
    ws = array((3, 5, 6), 4, 0.1, 0.5)

    def model(w, x):
        def layer(x, w):
            y = jnp.einsum("oi,ti->to", w, x)
            return jnp.tanh(jnp.concatenate([y, x[:, :1]], 1)), None

        return lax.scan(layer, x, jnp.moveaxis(w, axis, 0))[0]

    leaf = np.moveaxis(np.asarray(ws), 0, axis)
    (site,) = find_sites(model, leaf, gallery.ROWS).sites
    rows, matrix, y = products([site], model, leaf, gallery.ROWS)[site]
    np.testing.assert_array_equal(matrix[:, 0], np.swapaxes(ws, 1, 2))
    np.testing.assert_array_equal(matrices.from_matrix(matrix, site), leaf)
    assert distance(np.float64(rows) @ np.float64(matrix), y) < 1e-6


# In another order: either no matrices, or the right ones.


def plain_conv(w, x):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)


def grouped_conv(w, x):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2
    )


REORDERED = {
    "inputs split, summed in another order": (
        lambda w, x: lax.dot_general(x, w.reshape(2, 3, 5), (((2, 1), (1, 0)), ((), ()))),
        (6, 5),
        (4, 2, 3),
    ),
    "inputs permuted": (
        lambda w, x: x @ w.reshape(2, 3, 5).transpose(1, 0, 2).reshape(6, 5),
        (6, 5),
        (4, 6),
    ),
    "channels permuted": (
        lambda w, x: x @ w.reshape(6, 2, 3).transpose(0, 2, 1).reshape(6, 6),
        (6, 6),
        (4, 6),
    ),
    "experts split, in another order": (
        lambda w, x: lax.dot_general(x, w.reshape(2, 3, 6, 5), (((3,), (2,)), ((1, 0), (1, 0)))),
        (6, 6, 5),
        (2, 3, 4, 6),
    ),
    "flat kernel": (lambda w, x: plain_conv(w.reshape(3, 3, 2, 5), x), (18, 5), (2, 4, 4, 2)),
    "kernel with one axis for its places": (
        lambda w, x: plain_conv(w.reshape(3, 3, 2, 5), x),
        (9, 2, 5),
        (2, 4, 4, 2),
    ),
    "dense layer as a convolution": (
        lambda w, x: plain_conv(w[None, None], x),
        (2, 5),
        (2, 4, 4, 2),
    ),
    "kernel of a sequence on images": (
        lambda w, x: plain_conv(w[:, None], x),
        (3, 2, 5),
        (2, 4, 4, 2),
    ),
    "grouped kernels for one batch": (
        lambda w, x: jax.vmap(lambda w: grouped_conv(w, x))(w),
        (3, 3, 3, 1, 4),
        (2, 4, 4, 2),
    ),
}


@pytest.mark.parametrize("case", REORDERED.values(), ids=REORDERED)
def test_entries_in_another_order_are_not_taken_for_whole(case):
    product, kernel, data = case
    w, x = array(kernel, 5, 0.4, 0.5), array(data, 6, 3.0, 2.0)
    sites = find_sites(product, w, x).sites
    for site, (rows, matrix, y) in products(sites, product, w, x).items():  # none with a reason
        assert distance(np.float64(rows) @ np.float64(matrix), y) < 1e-6
        np.testing.assert_array_equal(matrices.from_matrix(matrix, site), w)
