"""What a user may hand over as calibration data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnq import calibration

X = np.arange(12.0).reshape(4, 3)
ONE = {
    "numpy array": X,
    "jax array": jnp.asarray(X),
    "dict": {"image": X, "label": np.arange(4)},
    "tuple": (X, {"mask": np.ones((4, 2, 2), bool)}),
    "keys": {"x": X, "key": jax.random.split(jax.random.key(0), 4)},
}


@pytest.mark.parametrize("calib", ONE.values(), ids=ONE.keys())
def test_an_array_a_dict_or_a_tuple_is_one_batch(calib):
    (batch,) = calibration.as_batches(calib)
    assert batch is calib
    assert calibration.batch_size(batch) == 4


WRAPS = {
    "list": list,
    "iterator": iter,
    "generator": lambda batches: (x for x in batches),
    "map": lambda batches: map(np.asarray, batches),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_a_list_or_an_iterator_holds_batches_in_order(wrap):
    batches = calibration.as_batches(wrap([X, X[:3], X[3:]]))
    assert isinstance(batches, list)
    assert [calibration.batch_size(batch) for batch in batches] == [4, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), np.concatenate([X, X]))


@pytest.mark.parametrize("calib", [[], iter([])], ids=["list", "iterator"])
def test_no_batch_is_an_error(calib):
    with pytest.raises(ValueError, match="calib: no batch; give at least one example"):
        calibration.as_batches(calib)


@pytest.mark.parametrize(
    ("calib", "shapes"),
    [
        ({"x": X, "y": X[:3]}, r"\[\(4, 3\), \(3, 3\)\]"),
        ((X, 2.0), r"\[\(4, 3\), \(\)\]"),
        (np.float32(1), r"\[\(\)\]"),
        (np.ones((0, 3)), r"\[\(0, 3\)\]"),
        ({}, r"\[\]"),
        ([X, X[:0]], r"\[\(0, 3\)\]"),
        (iter([X, (X, X[1:])]), r"\[\(4, 3\), \(3, 3\)\]"),
    ],
    ids=["disagree", "a number beside", "a number", "no example", "no array", "second batch", "it"],
)
def test_a_batch_without_a_common_leading_axis_is_an_error_that_shows_the_shapes(calib, shapes):
    with pytest.raises(ValueError, match=f"calib: .* share a leading axis of examples.*{shapes}"):
        calibration.as_batches(calib)
