"""Batch-norm folding on the model it is for."""

import jax
import numpy as np
import pytest

import lnq
from lnq.demo.resnet import BATCH_NORMS
from lnq.tuning import fold_batch_norm


def test_folding_keeps_the_function_and_makes_every_norm_an_identity():
    demo = lnq.demo.load()
    folded = fold_batch_norm(demo.variables, BATCH_NORMS)
    before, after = (demo.apply_fn(v, demo.images[:32]) for v in (demo.variables, folded))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(folded) == jax.tree.structure(demo.variables)
    for name, leaf in lnq.tree.named_leaves(folded):
        if "norm" in name and name.endswith(("scale", "mean", "var")):
            value = {"scale": 1.0, "mean": 0.0, "var": 1.0 - 1e-5}[name.split("/")[-1]]
            np.testing.assert_allclose(leaf, value, rtol=1e-6, err_msg=name)
    original = demo.variables["params"]["stem"]["kernel"]
    assert not np.allclose(folded["params"]["stem"]["kernel"], original)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"stm": "stem_norm"}, "no 'stm'"),
        ({"stem": "norm"}, "no 'norm'"),
        ({"head": "stem_norm"}, "'head' has a bias"),
    ],
)
def test_wrong_pairs_are_named(pairs, message):
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(lnq.demo.load().variables, pairs)
