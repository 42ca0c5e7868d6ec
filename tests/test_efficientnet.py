"""The float EfficientNet-Lite0 of `examples/efficientnet.py`, its file reader and its crops."""

import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import efficientnet
from PIL import Image


def checkpoint(state_dict: object) -> bytes:
    """A checkpoint in torch's older layout, with no storages."""
    system = {"little_endian": True}
    parts = (0x1950A86A20F9469CFC6C, 1001, system, state_dict, [])
    return b"".join(pickle.dumps(part, 2) for part in parts)


class Call:
    """Pickled, an order to call `fn(*args)` on reading."""

    def __init__(self, fn, *args):
        self.order = fn, args

    def __reduce__(self):
        return self.order


@pytest.mark.parametrize("fn", [os.mkdir, open, eval, np.zeros], ids=lambda fn: fn.__name__)
def test_a_pickle_that_names_anything_but_tensors_is_refused(fn, tmp_path):
    bad = OrderedDict(weight=Call(fn, str(tmp_path / "made")))
    with pytest.raises(pickle.UnpicklingError, match=f"refused: the pickle names .*{fn.__name__}"):
        efficientnet.read_pth(checkpoint(bad))
    assert not (tmp_path / "made").exists()
    assert efficientnet.read_pth(checkpoint(OrderedDict())) == {}


def test_the_zip_layout_is_refused_by_name():
    with pytest.raises(ValueError, match="a zip archive"):
        efficientnet.read_pth(b"PK\x03\x04")


@pytest.mark.parametrize(("offset", "stride"), [(1, 1), (0, 2), (0, -1), (-1, 1)])
def test_a_tensor_reaching_outside_its_storage_is_refused(offset, stride):
    rebuild = efficientnet.ADMITTED["torch._utils", "_rebuild_tensor_v2"]
    storage = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(rebuild(storage, 1, (2, 2), (1, 3)), [[1, 4], [2, 5]])
    with pytest.raises(ValueError, match=r"strides|offset"):
        rebuild(storage, offset, (6,), (stride,))


def test_each_photograph_gives_crops_to_one_side_only(monkeypatch):
    black, white = (Image.new("RGB", (70, 50), color) for color in ("black", "white"))
    monkeypatch.setattr(efficientnet, "photographs", lambda: ({"a": black}, {"b": white}))
    calib, evaluation = efficientnet.crops(16, calib=3, evaluation=5)
    assert calib.shape == (3, 16, 16, 3)
    assert evaluation.shape == (5, 16, 16, 3)
    assert (calib == 0).all()
    assert (evaluation == 255).all()


@pytest.mark.download
def test_calibration_and_evaluation_photographs_differ():
    first, second = efficientnet.photographs()
    assert (len(first), len(second)) == (12, 20)
    assert not first.keys() & second.keys()
    pixels = {picture.tobytes() for picture in (*first.values(), *second.values())}
    assert len(pixels) == 32


@pytest.mark.download
def test_crops_are_distinct_and_the_same_each_time():
    calib, evaluation = efficientnet.crops(calib=64, evaluation=256)
    assert len(np.unique(np.concatenate([calib, evaluation]), axis=0)) == 64 + 256
    fewer, same = efficientnet.crops(calib=12, evaluation=256)
    np.testing.assert_array_equal(fewer, calib[:12])
    np.testing.assert_array_equal(same, evaluation)


@pytest.fixture(scope="module")
def model() -> tuple[efficientnet.ApplyFn, dict]:
    return efficientnet.load()


@pytest.mark.download
def test_every_weight_is_loaded(model):
    variables = model[1]
    images = np.zeros((1, 96, 96, 3), np.uint8)
    shapes = jax.eval_shape(efficientnet.EfficientNetLite0().init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 4_652_008


@pytest.mark.download
def test_labelled_photographs_are_recognised(model):
    apply_fn, variables = model
    images, labels = efficientnet.labelled()
    ranked = np.argsort(-jax.jit(apply_fn)(variables, images), axis=-1)
    hits = ranked == labels[:, None]
    assert hits[:, :1].sum() == 18
    assert hits[:, :5].sum() == 19
