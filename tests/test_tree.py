"""Names of leaves, selection among them, and maps that treat a quantized leaf as one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lnq import quantizer, tree
from lnq.quantizer import FakeQuantTensor, QTensor, make_qparams


@jax.tree_util.register_dataclass
@dataclass
class Block:
    kernel: object
    value: object


QPARAMS = make_qparams([0.5], qmin=-8, qmax=7)
CODED = QTensor(jnp.ones(3, jnp.int8), QPARAMS)
HELD = FakeQuantTensor(jnp.ones(3), QPARAMS)

NAMED = {
    "dict": ({"b": {"c": 0}, "a": 0}, ["a", "b/c"]),
    "list and tuple": ({"a": [0, (0, 0)]}, ["a/0", "a/1/0", "a/1/1"]),
    "int keys": ({"a": {3: 0, 10: 0}}, ["a/3", "a/10"]),
    "slash and tilde": ({"a/b": {"~": 0, "~1": 0}}, ["a~1b/~0", "a~1b/~01"]),
    "dataclass": ({"a": Block(kernel=[0], value=0)}, ["a/kernel/0", "a/value"]),
    "a key called value": ({"a": {"value": 0}}, ["a/value"]),
    "a leaf alone": (0, [""]),
    "no leaf": ({"a": None, "b": {}}, []),
    "quantized": ({"a": CODED, "b": [HELD]}, ["a", "b/0"]),
}


@pytest.mark.parametrize(("params", "names"), NAMED.values(), ids=NAMED.keys())
def test_a_name_is_the_path_joined_by_slashes(params, names):
    assert [name for name, _ in tree.named_leaves(params)] == names


def test_linen_and_nnx_give_a_layer_the_same_names():
    linen = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    names = [name for name, _ in tree.named_leaves(state)]
    assert names == [name for name, _ in tree.named_leaves(linen)] == ["bias", "kernel"]


def test_an_nnx_variable_that_holds_a_quantized_leaf_has_the_name_of_the_variable():
    state = nnx.state(nnx.Sequential(nnx.Param(CODED), nnx.Param(jnp.ones(2))))
    names = dict(tree.named_leaves(state))
    assert list(names) == ["layers/0", "layers/1"]
    assert isinstance(names["layers/0"], QTensor)


keys = st.text("a/~01", max_size=3) | st.just("value")
nodes = st.recursive(
    st.just(0),
    lambda node: (
        st.dictionaries(keys, node, min_size=1)
        | st.dictionaries(st.integers(0, 20), node, min_size=1)
        | st.lists(node, min_size=1)
        | st.builds(Block, node, node)
    ),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(nodes)
def test_no_two_leaves_share_a_name(params):
    names = [name for name, _ in tree.named_leaves(params)]
    assert len(set(names)) == len(names) == len(jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("conv", True),
        ("^conv", 0),
        ({"head": 8, "conv1": 4, "kernel": 2}, 4),
        ({"kernel$": 2, "conv1": 4}, 2),
        ({"head": 8}, 0),
        ({}, 0),
        (len, 18),
        (lambda name: None, None),
    ],
    ids=["found", "anchored", "mapping", "first wins", "not in mapping", "empty", "function", "no"],
)
def test_lookup_takes_expressions_mappings_and_functions(select, expected):
    assert tree.lookup(select, "block/conv1/kernel", default=0) == expected


def test_map_named_gives_names_and_leaves_of_all_trees_and_keeps_the_structure():
    first = {"a": [1, CODED], "b": None, "c": Block(2, 3)}
    other = {"a": [10, HELD], "b": None, "c": Block(20, 30)}
    out = tree.map_named(lambda name, x, y: (name, x, y), first, other)
    assert out["a"] == [("a/0", 1, 10), ("a/1", CODED, HELD)]
    assert out["b"] is None
    assert out["c"] == Block(("c/kernel", 2, 20), ("c/value", 3, 30))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_check_finite_names_the_leaf(bad, dtype):
    params = {"a": jnp.ones(3), "b": {"c/d": jnp.array([1.0, bad], dtype)}, "n": jnp.arange(2)}
    with pytest.raises(ValueError, match="params: 'b/c~1d' holds NaN or infinity"):
        tree.check_finite(params)


def test_check_finite_accepts_what_is_finite_or_no_float_array():
    largest = jnp.array([jnp.finfo(jnp.float32).max])
    tree.check_finite({"a": largest, "q": CODED, "n": 3, "x": float("nan"), "s": "name"})


def test_check_finite_has_nothing_to_look_at_under_jit():
    def doubled(x):
        tree.check_finite({"a": x})
        return 2 * x

    np.testing.assert_array_equal(jax.jit(doubled)(jnp.array([jnp.inf])), [np.inf])


FLOATS = {
    "float32": jnp.ones(2),
    "bfloat16": jnp.ones((), jnp.bfloat16),
    "numpy": np.ones(2, np.float16),
    "numpy scalar": np.float64(1),
    "shape": jax.ShapeDtypeStruct((2,), "float32"),
}
OTHERS = {
    "int": jnp.ones(2, jnp.int8),
    "bool": jnp.ones(2, bool),
    "complex": jnp.ones(2, jnp.complex64),
    "key": jax.random.key(0),
    "QTensor": CODED,
    "FakeQuantTensor": HELD,
    "number": 1.0,
    "str": "x",
    "None": None,
}


@pytest.mark.parametrize("leaf", FLOATS.values(), ids=FLOATS.keys())
def test_arrays_of_real_numbers_are_float(leaf):
    assert tree.is_float(leaf)


@pytest.mark.parametrize("leaf", OTHERS.values(), ids=OTHERS.keys())
def test_nothing_else_is_float(leaf):
    assert not tree.is_float(leaf)


def test_both_kinds_of_quantized_leaf_are_recognized():
    assert [quantizer.is_quantized(x) for x in (CODED, HELD, QPARAMS, jnp.ones(2), 1)] == [
        *(True, True),
        *(False, False, False),
    ]
