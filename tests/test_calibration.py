"""What a user may hand over as calibration data, and the statistics made of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnq import calibration
from lnq.quantizer import make_qparams

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


# Statistics.


def stats_of(x, **options):
    return calibration.observe(jnp.asarray(x, jnp.float32), (x.ndim - 1,), **options)


SKEWED = np.random.default_rng(8).normal(3.0, 2.0, size=(500, 3)) ** 3


def test_moments_are_those_of_the_data():
    stats = stats_of(SKEWED)
    np.testing.assert_allclose(stats.mean, SKEWED.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.sigma, SKEWED.std(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(stats.low, SKEWED.min(0), rtol=1e-6)
    np.testing.assert_allclose(stats.high, SKEWED.max(0), rtol=1e-6)


def test_the_histogram_counts_every_value_in_the_bin_that_holds_it():
    values = np.array([0.0, 1.0, 1.0625, -1.0, 1e-9, 3.99, -0.75, 1e9])[:, None]
    histogram = np.asarray(stats_of(values).histogram[0])
    one = 1 + 20 * 16  # bin of 1 .. 17/16; negative bins follow the positive ones
    expected = np.zeros_like(histogram)
    for place in (0, one, one + 1, one + calibration.BINS, 0, one + 31):
        expected[place] += 1
    expected[one - 8 + calibration.BINS] += 1  # 0.75 is the ninth of 0.5 .. 1
    expected[calibration.BINS] += 1  # beyond the range, in the last bin
    np.testing.assert_array_equal(histogram, expected)


def test_spread_on_known_densities():
    rng = np.random.default_rng(3)
    b = calibration.mean_distance(stats_of(rng.laplace(2.0, 0.7, size=(100_000, 1))))
    np.testing.assert_allclose(b, 0.7, rtol=0.01)
    gauss = stats_of(rng.normal(size=(100_000, 1)))
    np.testing.assert_allclose(calibration.mean_distance(gauss) / gauss.sigma, 0.79788, atol=0.003)


@pytest.mark.parametrize("cuts", [[250], [1, 499], [100, 101, 400]])
def test_any_split_into_batches_gives_the_same_statistics(cuts):
    whole = stats_of(SKEWED)
    parts = [stats_of(part) for part in np.split(SKEWED, cuts)]
    left = functools.reduce(calibration.merge, parts)
    right = functools.reduce(lambda a, b: calibration.merge(b, a), reversed(parts))
    for merged in (left, right):
        np.testing.assert_array_equal(merged.histogram, whole.histogram)
        for name in ("count", "mean", "squares", "low", "high"):
            a, b = (np.asarray(getattr(s, name)) for s in (merged, whole))
            np.testing.assert_allclose(a, b, rtol=2e-5)


def test_pooling_channels_is_observing_them_as_one():
    pooled, flat = calibration.pooled(stats_of(SKEWED)), stats_of(SKEWED.reshape(-1, 1))
    np.testing.assert_array_equal(pooled.histogram, flat.histogram)
    np.testing.assert_allclose(pooled.mean, flat.mean, rtol=1e-5)
    np.testing.assert_allclose(pooled.squares, flat.squares, rtol=1e-5)


def test_padding_does_not_count():
    x = np.random.default_rng(0).normal(size=(4, 6, 3))
    mask = np.arange(6)[None] < np.array([6, 2, 1, 3])[:, None]
    for data in (x, x.reshape(24, 3)):
        stats = stats_of(data, mask=jnp.asarray(mask))
        only = stats_of(x[mask])
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(only), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_of_a_grid_is_close_to_the_true_one(bits):
    x = np.random.default_rng(1).laplace(size=(100_000, 1))
    low, high = -4.0, 5.0
    scale = (high - low) / (2**bits - 1)
    zero_point = np.round(-low / scale)
    grid = make_qparams(
        jnp.array([scale]), qmin=0, qmax=2**bits - 1, zero_point=jnp.array([zero_point])
    )
    q = np.clip(np.round(x / scale + zero_point), 0, 2**bits - 1)
    true = np.mean((x - (q - zero_point) * scale) ** 2)
    np.testing.assert_allclose(calibration.grid_error(stats_of(x), grid), true, rtol=0.03)


# Models.


def two_layers(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    return hidden @ params["left"] + hidden @ params["right"]


@pytest.fixture(scope="module")
def calibrated():
    rng = np.random.default_rng(2)
    params = {
        name: rng.normal(size=(5, 5)).astype(np.float32) for name in ("first", "left", "right")
    }
    batches = [{"x": rng.normal(size=(n, 5)).astype(np.float32)} for n in (7, 9)]
    return params, batches, calibration.calibrate(two_layers, params, batches)


def test_statistics_are_of_what_each_site_reads(calibrated):
    params, batches, found = calibrated
    x = np.concatenate([batch["x"] for batch in batches])
    np.testing.assert_allclose(found.stats["first"].mean, x.mean(0), rtol=1e-4, atol=1e-6)
    hidden = np.tanh(x @ params["first"])
    np.testing.assert_allclose(found.stats["left"].high, hidden.max(0), rtol=1e-5)


def test_sites_that_read_the_same_value_share_statistics(calibrated):
    found = calibrated[2]
    assert found.stats["left"] is found.stats["right"]
    assert found.stats["left"] is not found.stats["first"]


def test_saved_statistics_come_back_as_they_were(calibrated, tmp_path):
    found = calibrated[2]
    calibration.save(tmp_path / "stats.npz", found)
    restored = calibration.load(tmp_path / "stats.npz")
    assert restored.sites == found.sites
    assert restored.stats["left"] is restored.stats["right"]
    for name, stats in found.stats.items():
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(restored.stats[name]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_saved_convolutions_come_back_with_their_window(tmp_path):
    def model(p, x):
        layout = ("NCHW", "OIHW", "NCHW")
        x = jax.lax.conv_general_dilated(
            x,
            p["oihw"],
            (2, 1),
            ((0, 3), (1, 0)),
            lhs_dilation=(1, 2),
            rhs_dilation=(1, 3),
            dimension_numbers=layout,
            feature_group_count=2,
        )
        return x @ p["dense"]

    rng = np.random.default_rng(3)
    params = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"oihw": (4, 1, 3, 2), "dense": (7, 3)}.items()
    }
    found = calibration.calibrate(model, params, rng.normal(size=(3, 2, 5, 5)).astype(np.float32))
    calibration.save(tmp_path / "stats.npz", found)
    restored = calibration.load(tmp_path / "stats.npz")
    conv, dense = restored.sites.sites
    assert conv.window == ((2, 3), (2, 1), ((0, 3), (1, 0)), (1, 2), (3, 2), (1, 3), 2)
    assert conv.window == found.sites.sites[0].window
    assert conv.window.padding == ((0, 3), (1, 0))
    assert type(conv.window) is type(found.sites.sites[0].window)
    assert dense.window is None
    assert restored.sites == found.sites
    assert hash(restored.sites.sites[0]) == hash(found.sites.sites[0])


def test_another_file_is_not_taken_for_statistics(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with pytest.raises(ValueError, match="not a file of calibration statistics"):
        calibration.load(tmp_path / "other.npz")


def test_one_batch_shape_is_compiled_once():
    traces = []

    def apply_fn(params, x):
        traces.append(1)
        return x @ params["w"]

    data = [np.ones((4, 3), np.float32)] * 5
    calibration.calibrate(apply_fn, {"w": np.eye(3, dtype=np.float32)}, data)
    assert len(traces) == 2  # once to find the sites, once to compile
