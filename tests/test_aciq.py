"""ACIQ against the numbers of its specification, independent twins, and the directions promised."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn

import lnq
from lnq import aciq, calibration, clipping, distortion, sites
from lnq.quantizer import QTensor, affine_grid, correct_bias, dequantize_array, fake_quant, quantize

RNG = np.random.default_rng(5)
LAPLACE = RNG.laplace(size=(100_000, 1)).astype(np.float32)
GAUSS = RNG.normal(size=(100_000, 1)).astype(np.float32)


def measured(x, clip, bits, one_sided=False):
    """Error of the library's grid, in NumPy and float64."""
    low = 0.0 if one_sided else max(x.min(), x.mean() - clip)
    high = min(x.max(), (0.0 if one_sided else x.mean()) + clip)
    scale = (high - low) / (2**bits - 1)
    offset = -(2 ** (bits - 1)) - np.round(low / scale)
    q = np.clip(np.round(x / scale + offset), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.mean((np.float64(x) - (q - offset) * scale) ** 2))


def act_error(x, bits, clip):
    """Family taken, and the true error on the data of the grid that statistics gave."""
    grid, family, _ = aciq.act_grid(calibration.observe(jnp.asarray(x), (1,)), bits, clip=clip)
    rounded = oracles.dequantize(
        oracles.quantize(x, jax.tree.map(lambda a: a[None], grid)),
        jax.tree.map(lambda a: a[None], grid),
    )
    return aciq.FAMILIES[clip][int(family[0])], float(np.mean((x - rounded) ** 2))


# Grids.


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.5), (0.0, 3.0), (-0.17, 9.0), (-4.0, -1.0)])
def test_a_grid_spans_its_interval_and_zero_exactly(low, high, bits):
    grid = affine_grid(jnp.array([low]), jnp.array([high]), bits)
    levels = (np.arange(grid.qmin[0], grid.qmax[0] + 1) - grid.zero_point[0]) * grid.scale[0]
    assert len(levels) == 2**bits
    assert 0.0 in levels
    width = max(high, 0.0) - min(low, 0.0)
    np.testing.assert_allclose(levels[-1] - levels[0], width, rtol=1e-6)
    assert abs(levels[0] - min(low, 0.0)) <= grid.scale[0] / 2 + 1e-6


def test_rounding_twice_is_rounding_once_and_zero_stays_zero():
    grid = affine_grid(jnp.array([[-1.3]]), jnp.array([[2.1]]), 4)
    x = jnp.asarray(RNG.normal(size=(50, 1)), jnp.float32)
    once = fake_quant(x, grid)
    np.testing.assert_array_equal(fake_quant(once, grid), once)
    assert fake_quant(jnp.zeros((1, 1)), grid) == 0.0


# Clips of data.


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("name", ["laplace", "gauss"])
def test_auto_recognises_the_density_and_loses_nothing(name, bits):
    x = {"laplace": LAPLACE, "gauss": GAUSS}[name]
    family, error = act_error(x, bits, "auto")
    spreads = {"b": np.abs(x - x.mean()).mean(), "sigma": x.std()}
    clips = {
        "laplace": clipping.laplace_grid_clip(spreads["b"], bits),
        "gauss": clipping.gauss_grid_clip(spreads["sigma"], bits),
    }
    best = min(measured(x, float(clip), bits) for clip in clips.values())
    assert error <= 1.01 * best
    if bits > 2:  # at 2 bits the two clips are equally good
        assert family == f"{name} grid"


@pytest.mark.parametrize(("bits", "gain"), [(3, 5.9), (4, 3.8), (8, 1.27)])
def test_clipping_a_laplace_gains_the_published_factors(bits, gain):
    naive, clipped = (act_error(LAPLACE, bits, clip)[1] for clip in ("max", "auto"))
    assert naive == pytest.approx(measured(LAPLACE, 1e9, bits), rel=1e-3)
    # The factors are of one sample of 1e5, whose range varies by 10 % (naive error by 20 %).
    assert naive / clipped == pytest.approx(gain, rel=0.25)


@pytest.mark.parametrize("clip", ["laplace", "gauss", "mix", "kld"])
def test_every_baseline_beats_no_clip_on_heavy_tails(clip):
    for bits in (3, 4):
        assert act_error(LAPLACE, bits, clip)[1] < act_error(LAPLACE, bits, "max")[1]


def test_one_sided_data_takes_the_one_sided_clip():
    x = np.maximum(LAPLACE, 0.0)
    family, error = act_error(x, 4, "auto")
    assert family == "laplace grid"
    # Half of the signed error at 5 bits; the density seen is that of 1e5 samples.
    expected = float(
        clipping.laplace_grid_mse(
            clipping.laplace_grid_clip(1.0, 4, one_sided=True), 1.0, 4, one_sided=True
        )
    )
    assert error == pytest.approx(expected, rel=0.03)


def test_scaling_and_shifting_the_data_scale_and_shift_the_clip():
    stats = [calibration.observe(jnp.asarray(x), (1,)) for x in (LAPLACE, 4.0 * LAPLACE)]
    (grid, _, _), (scaled, _, _) = (aciq.act_grid(s, 4, clip="laplace") for s in stats)
    np.testing.assert_allclose(scaled.scale, 4.0 * grid.scale, rtol=1e-5)
    moved = calibration.observe(jnp.asarray(LAPLACE + 2.0), (1,))
    interval = [
        aciq._interval("laplace", aciq._stats_spread(s), jnp.array([4])) for s in (stats[0], moved)
    ]
    for before, after in zip(*interval, strict=True):
        np.testing.assert_allclose(after, before + 2.0, rtol=2e-3)


def test_constant_data_is_exact_and_no_data_is_no_number_gone_wrong():
    stats = calibration.observe(jnp.array([[3.0, 0.0, -2.0]] * 4), (1,))
    grid, _, error = aciq.act_grid(stats, 4)
    np.testing.assert_allclose(error, 0.0, atol=1e-12)
    assert np.isfinite(jax.tree.leaves(grid)).all()


# Weights.


def channels(spread):
    """Laplace weights with channels of given spreads and means, last axis."""
    spread = np.asarray(spread)
    w = RNG.laplace(size=(3, 3, 16, len(spread))) * spread + 0.1 * spread
    return jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bias_correction_restores_mean_and_norm(bits):
    w = channels([0.5, 1.0, 3.0])
    rounded = dequantize_array(aciq.quantize_array(w, bits, correct="norm"))
    for x in (w, rounded):
        assert x.shape == w.shape
    a, b = (np.asarray(x, np.float64).reshape(-1, 3) for x in (w, rounded))
    np.testing.assert_allclose(b.mean(0), a.mean(0), rtol=1e-6, atol=1e-6)
    norms = [np.linalg.norm(x - x.mean(0), axis=0) for x in (a, b)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=2e-6)


def test_correcting_the_mean_removes_its_square_from_the_error():
    w = channels([1.0, 2.0])
    q = aciq.quantize_array(w, 2, correct="none")
    a, b = (np.asarray(x, np.float64).reshape(-1, 2) for x in (w, dequantize_array(q)))
    shift = a.mean(0) - b.mean(0)
    gain = ((a - b) ** 2).mean(0) - ((a - b - shift) ** 2).mean(0)
    np.testing.assert_allclose(gain, shift**2, rtol=1e-9)
    corrected = dequantize_array(correct_bias(w, q, (0, 1, 2), norm=False))
    means = np.asarray(corrected, np.float64).reshape(-1, 2).mean(0)
    np.testing.assert_allclose(means, a.mean(0), atol=1e-6)


def test_channels_of_zero_bits_become_their_mean():
    w = channels([1e-3, 1.0, 4.0, 8.0])
    q = aciq.quantize_array(w, 2, allocate=clipping.greedy_bits, correct="none")
    assert int(q.qparams.bits.ravel()[0]) == 0
    np.testing.assert_allclose(dequantize_array(q)[..., 0], float(w[..., 0].mean()), rtol=1e-5)
    assert float(q.qparams.bits.mean()) == 2.0


@pytest.mark.parametrize("rule", [clipping.greedy_bits, clipping.published_bits])
def test_sharing_bits_lowers_the_error_at_the_same_average(rule):
    w = channels(np.exp(RNG.normal(size=64) * 0.8))
    uniform, shared = (aciq.quantize_array(w, 4, allocate=a, clip="mix") for a in (None, rule))
    assert abs(float(shared.qparams.bits.mean()) - 4.0) <= 0.05
    assert distortion.mse(w, dequantize_array(shared)) < 0.7 * distortion.mse(
        w, dequantize_array(uniform)
    )


def test_groups_are_separate_arrays():
    w = channels([1.0, 2.0])[0, 0]
    q = aciq.quantize_array(w, 3, group_size=4)
    assert q.qparams.scale.shape == (4, 2)
    parts = [dequantize_array(aciq.quantize_array(w[i : i + 4], 3)) for i in range(0, 16, 4)]
    np.testing.assert_allclose(dequantize_array(q), jnp.concatenate(parts), rtol=1e-5, atol=1e-6)


def test_layers_of_a_stack_are_separate_arrays_with_widths_of_their_own():
    w = jnp.stack([channels([1.0, 2.0])[0, 0], 5.0 * channels([1.0, 3.0])[0, 0]])
    q = aciq.quantize_array(w, jnp.array([3, 8]), stacked=1)
    for layer, bits in enumerate((3, 8)):
        alone = dequantize_array(aciq.quantize_array(w[layer], bits))
        np.testing.assert_allclose(dequantize_array(q)[layer], alone, rtol=1e-5, atol=1e-6)


def test_other_widths_compile_nothing_new():
    traces = []

    @jax.jit
    def run(w, bits):
        traces.append(1)
        return aciq.quantize_weights({"w": w}, bits)

    w = channels([1.0, 2.0])[0, 0]
    errors = [distortion.mse(w, dequantize_array(run(w, b)["w"])) for b in (2, 4, 8)]
    assert len(traces) == 1
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


# Models.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="middle")(x))
        return nn.Dense(5, name="last")(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def model():
    x = jnp.asarray(RNG.laplace(size=(64, 8, 8, 2)), jnp.float32)
    params = Net().init(jax.random.key(3), x)
    heavy = jax.tree.map(lambda w: w * jnp.asarray(RNG.laplace(size=w.shape), w.dtype), params)
    return Net().apply, heavy, x, calibration.calibrate(Net().apply, heavy, x)


def run(model, **options):
    apply_fn, params, x, stats = model
    qtree, info = aciq.quantize(apply_fn, params, stats, **options)
    return distortion.sqnr_db(apply_fn(params, x), QUANTIZED(qtree, x)), qtree, info


QUANTIZED = jax.jit(sites.quantized(Net().apply))


def test_more_bits_and_clipping_raise_the_signal(model):
    naive = run(model, act_clip="max", edge_bits=None)[0]
    clipped = run(model, edge_bits=None)[0]
    eight = run(model, weight_bits=8, act_bits=8, edge_bits=None)[0]
    assert naive < clipped < eight - 10.0


def test_first_and_last_site_have_eight_bits_unless_told_otherwise(model):
    rows = run(model)[2].rows
    assert [(row.path.split("/")[1], row.weight_bits, row.act_bits) for row in rows] == [
        ("first", 8, 8),
        ("middle", 4, 4),
        ("last", 8, 8),
    ]
    assert {row.act_bits for row in run(model, edge_bits=None)[2].rows} == {4}


def test_widths_and_exceptions_are_chosen_by_name(model):
    _, qtree, info = run(
        model,
        weight_bits={"middle": 3, "": 6},
        act_bits=lambda name: 5,
        skip="last",
        edge_bits=None,
    )
    first, middle, last = info.rows
    assert (first.weight_bits, middle.weight_bits, middle.act_bits) == (6, 3, 5)
    assert (last.status, last.reason, last.weight_bits) == ("float", "skipped", 32)
    assert qtree["params"]["last"]["kernel"] is model[1]["params"]["last"]["kernel"]


def test_the_report_says_what_is_multiplied_how(model):
    def statuses(**options):
        return [row.status for row in run(model, **options)[2].rows]

    assert statuses() == ["int8"] * 3
    assert statuses(per_channel=True) == ["fake-quant"] * 3
    assert statuses(act_bits=12, edge_bits=None) == ["fake-quant"] * 3
    assert statuses(act_bits=None) == ["weights only"] * 3
    row = run(model)[2].rows[1]
    assert row.macs == 64 * 4 * 4 * 16 * 8 * 9
    assert 12 < row.act_sqnr < 30
    assert row.clip < float(model[3].stats[row.path].high.max())


def test_integer_products_equal_fake_quant(model):
    apply_fn, _, x, _ = model
    qtree = run(model)[1]

    def in_float(leaf):
        acts = tuple(jax.tree.map(lambda a: a, act) for act in leaf.acts)
        return lnq.QTensor(leaf.codes.astype(jnp.int16), leaf.qparams, acts, leaf.dtype)

    twin = jax.tree.map(
        lambda leaf: in_float(leaf) if isinstance(leaf, QTensor) else leaf,
        qtree,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    a, b = (np.asarray(jax.jit(sites.quantized(apply_fn))(t, x)) for t in (qtree, twin))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_statistics_serve_other_widths_without_the_model(model):
    _, params, _, stats = model

    def never(params, batch):
        raise AssertionError("the model was run")

    qtree, info = aciq.quantize(never, params, stats, weight_bits=3)
    assert info.calibration is stats
    assert qtree["params"]["middle"]["kernel"].qparams.bits.max() == 3


def test_correcting_outputs_brings_their_means_back(model):
    apply_fn, params, x, _ = model
    reference = apply_fn(params, x).mean(0)
    gaps = []
    for correct_acts in (False, True):
        options = {"weight_bits": 3, "act_bits": 3, "edge_bits": None, "correct_acts": correct_acts}
        _, qtree, _ = run(model, **options)
        gaps.append(float(distortion.l2_norm(QUANTIZED(qtree, x).mean(0) - reference)))
    assert gaps[1] < 0.7 * gaps[0]


def test_one_shift_equals_the_measured_one():
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.exponential(size=(4000, 6)), jnp.float32)  # what is clipped is one-sided
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "b": jnp.ones((1, 4))}

    def apply_fn(p, x):
        return x @ p["w"] + p["b"]

    qtree, _ = aciq.quantize(apply_fn, params, x, act_bits=2, edge_bits=None, correct_acts=True)
    gap = (sites.quantized(apply_fn)(qtree, x) - apply_fn(params, x)).mean(0)
    before = dict(qtree, b=params["b"])
    plain = (sites.quantized(apply_fn)(before, x) - apply_fn(params, x)).mean(0)
    # The histogram knows a value to 3 %, which matters for those near the edge of a cell.
    assert np.abs(gap).max() < 0.1 * np.abs(plain).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 0}, "weight|bits: 'params/first/kernel' has 0"),
        ({"act_bits": 17}, "not a number from 1 to 16"),
        ({"weight_clip": "kld"}, "weight_clip: must be one of"),
        ({"act_clip": "best"}, "act_clip: must be one of"),
        ({"correct": "bias"}, "correct: must be one of mean, norm, none"),
        ({"group_size": 5}, "'params/first/kernel': group_size: 5 does not divide"),
    ],
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, **options)


def test_statistics_of_another_model_are_refused(model):
    with pytest.raises(ValueError, match="which params lack"):
        aciq.quantize(model[0], {"other": jnp.ones((3, 3))}, model[3])


def test_a_model_without_sites_is_refused():
    with pytest.raises(ValueError, match="nothing to quantize"):
        aciq.quantize(lambda p, x: x + p, jnp.ones((1, 3)), jnp.ones((2, 3)))


def branching(params, x):
    branch = jax.lax.cond(x.sum() > 1e6, lambda: x @ params["rare"], lambda: x)
    return branch @ params["common"]


def test_a_site_that_data_never_reaches_stays_float_or_is_an_error():
    params = {"rare": jnp.eye(4), "common": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32)
    qtree, info = aciq.quantize(branching, params, x, edge_bits=None)
    rows = {row.path: row for row in info.rows}
    assert (rows["rare"].status, rows["rare"].reason) == (
        "weights only",
        "no calibration data reached it",
    )
    assert rows["common"].status == "int8"
    assert qtree["rare"].acts == ()
    with pytest.raises(ValueError, match="no data reached rare"):
        aciq.quantize(branching, params, x, strict=True)


def test_layers_of_a_scanned_leaf_have_grids_and_widths_of_their_own():
    layers = jnp.asarray(RNG.normal(size=(3, 6, 6)), jnp.float32) / 2
    x = jnp.asarray(RNG.laplace(size=(64, 6)), jnp.float32)

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]

    def unrolled(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params[f"layer{i}"])
        return x

    options = {"weight_bits": {r"\[1\]": 3, "layer1": 3}, "edge_bits": 8}
    stacked, _ = aciq.quantize(scanned, {"layers": layers}, x, **options)
    apart, info = aciq.quantize(unrolled, {f"layer{i}": layers[i] for i in range(3)}, x, **options)
    assert [row.weight_bits for row in info.rows] == [8, 3, 8]
    assert [int(b) for b in stacked["layers"].qparams.bits[:, 0, 0]] == [8, 3, 8]
    np.testing.assert_allclose(
        sites.quantized(scanned)(stacked, x), sites.quantized(unrolled)(apart, x), atol=1e-5
    )


def test_a_skipped_layer_of_a_stack_has_sixteen_bits():
    params = {"layers": jnp.asarray(RNG.normal(size=(2, 6, 6)), jnp.float32)}
    x = jnp.asarray(RNG.laplace(size=(64, 6)), jnp.float32)

    def scanned(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]

    qtree, _ = aciq.quantize(scanned, params, x, skip=r"\[0\]", edge_bits=None)
    assert [int(b) for b in qtree["layers"].qparams.bits[:, 0, 0]] == [16, 4]
    np.testing.assert_allclose(dequantize_array(qtree["layers"])[0], params["layers"][0], atol=1e-4)


def test_the_file_keeps_integer_activations(model, tmp_path):
    _, _, x, _ = model
    qtree = run(model)[1]
    lnq.save(tmp_path / "net.lnq", qtree)
    restored = lnq.load(tmp_path / "net.lnq")
    assert jax.tree.structure(restored) == jax.tree.structure(qtree)
    np.testing.assert_array_equal(QUANTIZED(restored, x), QUANTIZED(qtree, x))


def test_quantize_rounds_to_the_nearest_code_of_the_grid():
    w = channels([1.0])[..., 0].reshape(-1, 1)
    q = aciq.quantize_array(w, 4, clip="laplace", correct="none")
    np.testing.assert_array_equal(q.codes, oracles.quantize(w, q.qparams))
    np.testing.assert_array_equal(quantize(w, q.qparams, jnp.int16).codes, q.codes)


def test_a_leaf_with_float_weights_must_be_skipped_by_name():
    params = {"a": jnp.eye(4), "b": jnp.eye(4)}
    with pytest.raises(ValueError, match=r"weight_bits: None for \['b'\]; name them in `skip`"):
        aciq.quantize(
            lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((3, 4)), weight_bits={"b": None}
        )
