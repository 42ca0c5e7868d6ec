"""Widths by name, at the edges, for layers of a stack and for leaves that are used twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lnq.sites import find_sites
from lnq.widths import site_widths


def shapes(**named):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in named.items()}


def chain(params, x):
    for name in ("first", "inner", "last"):
        x = x @ params[name]
    return x


def stacked(params, x):
    x = x @ params["first"]
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


def tied(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] @ params["w"]


X = shapes(x=(2, 6))["x"]
SITES = {
    "chain": find_sites(chain, shapes(first=(6, 6), inner=(6, 6), last=(6, 6)), X).sites,
    "stacked": find_sites(stacked, shapes(first=(6, 6), layers=(3, 6, 6)), X).sites,
    "tied": find_sites(tied, shapes(w=(6, 6), v=(6, 6)), X).sites,
    "nothing": (),
}


def found(model, *args, **options):
    """Weights and data, by name."""
    widths = site_widths(SITES[model], *args, **options)
    for width in (*widths.weights.values(), *widths.acts.values()):
        assert width.dtype == np.int32
    return tuple({name: width.tolist() for name, width in part.items()} for part in widths)


ALL = ("first", "inner", "last")


@pytest.mark.parametrize(
    ("weight_bits", "expected"),
    [
        (3, [3, 3, 3]),
        ({"in": 2, "ir": 5}, [5, 2, 4]),  # 4 where nothing matches
        ({"r": 6, "": 1}, [6, 6, 1]),  # the first that is found
        (lambda name: len(name), [5, 5, 4]),
        ({"inner": None, "": 7}, [7, None, 7]),
        (None, [None, None, None]),
        (16, [16, 16, 16]),
    ],
    ids=["number", "mapping", "order", "function", "none for one", "none", "most"],
)
def test_widths_are_asked_for_by_name(weight_bits, expected):
    wanted = {name: bits for name, bits in zip(ALL, expected, strict=True) if bits}
    assert found("chain", weight_bits, None) == (wanted, {})
    assert found("chain", None, weight_bits) == ({}, wanted)


def test_the_edges_have_a_least_width_where_they_are_not_float():
    weights, acts = found("chain", 3, {"first": 9, "inner": 2, "last": None}, edge_bits=8)
    assert weights == {"first": 8, "inner": 3, "last": 8}
    assert acts == {"first": 9, "inner": 2}


def test_what_is_skipped_stays_float_with_its_data():
    assert found("chain", 4, 4, 8, skip="inner|last") == ({"first": 8}, {"first": 8})
    assert found("chain", 4, 4, skip=lambda name: True) == ({}, {})


def test_layers_of_a_stack_have_widths_of_their_own():
    weights, acts = found("stacked", {r"\[1\]": 2, "": 3}, {r"\[0\]": 5}, edge_bits=8)
    assert weights == {"first": 8, "layers": [3, 2, 8]}
    assert acts == {"first": 8, "layers": [5, 4, 8]}


def test_a_layer_that_is_skipped_or_float_among_others_has_sixteen_bits():
    weights, acts = found("stacked", 3, {r"\[2\]": None, "": 2}, skip=r"first|\[1\]")
    assert weights == {"layers": [3, 16, 3]}
    assert acts == {"layers": [2, 16, 16]}
    assert found("stacked", 3, 3, skip="layers") == ({"first": 3}, {"first": 3})


def test_a_leaf_that_is_used_twice_has_the_larger_width():
    weights, acts = found("tied", 3, 2, edge_bits=8)
    assert weights == {"w": 8, "v": 3}
    assert acts == {"w": 8, "v": 2, "w@1": 8}
    assert found("tied", 3, {"w": 5, "v": 1}) == ({"w": 3, "v": 3}, {"w": 5, "v": 1, "w@1": 5})


def test_no_site_has_no_width():
    assert found("nothing", 4, 4, 8) == ({}, {})


@pytest.mark.parametrize("bits", [0, 17, -4, "four", 2.5])
def test_a_width_that_is_none_is_named(bits):
    for asked in ({"inner": bits}, lambda name: bits if name == "inner" else 4):
        with pytest.raises(ValueError, match=rf"bits: 'inner' has {bits!r}, not a number from 1"):
            found("chain", asked, None)


@pytest.mark.parametrize("bits", [np.int64(3), np.int32(3)])
def test_numpys_numbers_are_numbers(bits):
    assert found("chain", bits, None)[0] == dict.fromkeys(ALL, 3)
