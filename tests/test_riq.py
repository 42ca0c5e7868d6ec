"""RIQ against its specification: formulas, theory, search, and what users hand it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from lnq import ans, dequantize, distortion, riq
from lnq.types import UnreachableError

RNG = np.random.default_rng


def entropy(codes) -> float:
    """Bits per symbol."""
    codes = np.asarray(codes)
    return ans.entropy_bits(np.unique(codes, return_counts=True)[1]) / codes.size


def quantized(w, step):
    return np.round(w / step)


def cosine_distance(a, b) -> float:
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return 1.0 - a @ b / np.sqrt((a @ a) * (b @ b))


# --- formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize("eps0", [0.0, 0.003, 0.01])
@pytest.mark.parametrize("n", [600, 2_359_296])
def test_step_is_the_published_sum_and_the_rule_inverts_it(n, eps0):
    with jax.enable_x64(True):
        norm, k = 3.7, 1234.5
        step = float(riq.step_size(norm, n, k, eps0))
        assert step == pytest.approx(norm / k + eps0 * norm * math.sqrt(24 / n), rel=1e-12)
        root = step * math.sqrt(n) / (norm * math.sqrt(24))
        assert root**2 == pytest.approx((eps0 + math.sqrt(n / 24) / k) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "ratios"),
    [  # of true distance to formula at steps of 0.25, 0.5, 1, 1.5 and 2 root mean squares
        ("normal", (0.997, 0.984, 0.941, 0.877, 0.817)),
        ("laplace", (0.993, 0.971, 0.899, 0.814, 0.732)),
        ("t3", (0.997, 0.985, 0.932, 0.845, 0.746)),
        ("uniform", (1.000, 0.987, 1.016, 0.700, 0.671)),
    ],
)
def test_distance_formula_holds_for_fine_steps_and_errs_by_known_ratios(name, ratios):
    rng, n = RNG(0), 1_000_000
    draw = {
        "normal": lambda: rng.normal(size=n),
        "laplace": lambda: rng.laplace(size=n) / math.sqrt(2),
        "t3": lambda: rng.standard_t(3, size=n) / math.sqrt(3),
        "uniform": lambda: rng.uniform(-math.sqrt(3), math.sqrt(3), size=n),
    }[name]
    w = draw()
    for step, ratio in zip((0.25, 0.5, 1.0, 1.5, 2.0), ratios, strict=True):
        formula = n * step**2 / (24 * (w @ w))
        assert cosine_distance(w, quantized(w, step)) / formula == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("eps0", [0.003, 0.01, 0.05])
def test_bounds_of_k_destroy_the_largest_layer_and_exhaust_eps0(eps0):
    n = 102_760_448
    low, high = riq.k_bounds(n, eps0)
    with jax.enable_x64(True):
        assert float(riq.norm_rule(n, low, eps0)) == pytest.approx(1.0, rel=1e-12)
        floor = eps0**2 * (1 + math.sqrt(eps0)) ** 2
        assert float(riq.norm_rule(n, high, eps0)) == pytest.approx(floor, rel=1e-12)
    assert high / low == pytest.approx((1 - eps0) / eps0**1.5, rel=1e-12)


def test_published_ranges_of_k():
    assert riq.k_bounds(102_760_448) == pytest.approx((2090.1, 2_069_223), rel=1e-4)
    assert riq.k_bounds(2_359_296) == pytest.approx((316.7, 313_535), rel=1e-4)


def test_distance_falls_and_is_convex_in_k_and_bits_rise():
    k = np.linspace(700.0, 9000.0, 200)
    for rule in (riq.norm_rule, riq.angle_rule):
        epsilon = np.asarray(rule(262_144.0, k, 0.01), np.float64)
        assert (np.diff(epsilon) < 0).all()
    epsilon = (0.01 + np.sqrt(262_144 / 24) / k) ** 2
    np.testing.assert_allclose(riq.norm_rule(262_144.0, k, 0.01), epsilon, rtol=1e-5)
    assert (np.diff(epsilon, 2) > 0).all()
    w = jnp.asarray(RNG(1).normal(size=(128, 128)), jnp.float32)
    bits = [entropy(riq.quantize_array(w, k).codes) for k in (30.0, 60.0, 120.0, 240.0, 480.0)]
    assert np.all(np.diff(bits) > 0.2)


def test_exact_angles_agree_with_the_simple_rule_where_small_and_stay_below_one():
    fine = riq.angle_rule(4096, 4096.0, 0.0) / riq.norm_rule(4096, 4096.0, 0.0)
    assert float(fine) == pytest.approx(1.0, abs=1e-4)
    theta = math.atan(math.sqrt(4096.0) / (math.sqrt(12.0) * 7.0))
    assert float(riq.angle_rule(4096, 7.0, 0.0)) == pytest.approx(1 - math.cos(theta), rel=1e-5)
    assert float(riq.angle_rule(4096, 1e-3, 0.0)) < 1.0 < float(riq.norm_rule(4096, 1e-3, 0.0))


@pytest.mark.parametrize(("deviation", "saving"), [(0.3, 4e-3), (0.1, 5e-4), (0.02, 5e-5)])
def test_exact_angles_are_optimal_and_save_next_to_nothing(deviation, saving):
    """Rates at equal product of cosines: no other angles are better, the simple rule is close."""
    sizes = np.array([65536, 524288, 1048576, 262144, 32768, 2560], float)

    def rate(epsilon):
        return (sizes * -np.log2(np.sin(np.arccos(1 - epsilon)))).sum() / sizes.sum()

    def at_deviation(rule):
        low, high = 1.0, 1e9
        for _ in range(80):
            k = math.sqrt(low * high)
            if float(riq.predicted_deviation(sizes, k, 0.0, rule)) < deviation:
                high = k
            else:
                low = k
        return high, np.asarray(rule(sizes, high, 0.0))

    with jax.enable_x64(True):
        k, exact = at_deviation(riq.angle_rule)
        assert float(riq.predicted_rate(sizes, k, 0.0, riq.angle_rule)) == pytest.approx(
            rate(exact)
        )
        _, simple = at_deviation(riq.norm_rule)
    assert rate(exact) <= rate(simple) <= rate(exact) + saving
    rng = RNG(20)
    for _ in range(20):  # move along the constraint: sum of log cosines stays
        logs = np.log1p(-exact) * np.exp(0.2 * rng.normal(size=6))
        logs *= np.log1p(-exact).sum() / logs.sum()
        assert rate(-np.expm1(logs)) > rate(exact)


# --- theory ---------------------------------------------------------------------------------


def test_independent_rotations_multiply_cosines():
    rng, n, trials = RNG(2), 256, 400
    angles = np.array([0.1, 0.2, 0.3, 0.25])
    x = np.tile(np.eye(n)[0], (trials, 1))
    for angle in angles:
        noise = rng.normal(size=(trials, n))
        noise -= (noise * x).sum(1, keepdims=True) * x
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        x = math.cos(angle) * x + math.sin(angle) * noise
    sizes, k = (1 - np.cos(angles)) * 24e6, 1e3  # norm_rule then returns 1 - cos
    predicted = 1 - float(riq.predicted_deviation(sizes, k, 0.0))
    assert predicted == pytest.approx(np.prod(np.cos(angles)), abs=1e-5)
    assert x[:, 0].mean() == pytest.approx(predicted, abs=0.002)


def test_distance_and_entropy_do_not_change_under_rotation():
    rng, n = RNG(3), 4096
    w = rng.normal(size=n)
    rotated = w
    for _ in range(3):
        rotated = hadamard(n) @ (rng.choice([-1.0, 1.0], n) * rotated) / math.sqrt(n)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(w))
    first, second = (
        riq.quantize_array(jnp.asarray(x.reshape(64, 64), jnp.float32), 100.0) for x in (w, rotated)
    )
    distances = [cosine_distance(x, q.codes) for x, q in ((w, first), (rotated, second))]
    assert distances[0] == pytest.approx(distances[1], rel=0.06)
    assert entropy(first.codes) == pytest.approx(entropy(second.codes), abs=0.05)


def test_norm_proportional_steps_are_the_cheapest_for_a_given_sum_of_distances():
    """Six Gaussian layers: the saving over equal relative precision, and no better neighbour."""
    rng = RNG(4)
    sizes = np.array([65536, 524288, 1048576, 262144, 32768, 2560])
    layers = [rng.normal(size=n) for n in sizes]
    k = 3000.0
    steps = np.array([np.linalg.norm(w) / k for w in layers])

    def bits(steps):
        codes = [quantized(w, s) for w, s in zip(layers, steps, strict=True)]
        return sum(entropy(q) * q.size for q in codes) / sizes.sum()

    def total(steps):
        return sum(n * s**2 / (24 * (w @ w)) for n, s, w in zip(sizes, steps, layers, strict=True))

    cheapest = bits(steps)
    equal = np.array([np.linalg.norm(w) / math.sqrt(w.size) for w in layers])
    equal *= math.sqrt(total(steps) / total(equal))
    p = sizes / sizes.sum()
    theory = 0.5 * (math.log2(6) + (p * np.log2(p)).sum())
    assert theory == pytest.approx(0.464, abs=5e-4)
    assert bits(equal) - cheapest == pytest.approx(theory, abs=0.03)
    for _ in range(6):
        other = steps * np.exp(0.3 * rng.normal(size=6))
        other *= math.sqrt(total(steps) / total(other))
        assert bits(other) > cheapest - 0.01


def heavy_mlp(rng, activation):
    sizes = [32, 256, 64, 512, 48, 16]
    gains = np.exp(rng.normal(size=5))
    params = [
        jnp.asarray(g * rng.standard_t(3, size=(i, o)) / math.sqrt(3 * i), jnp.float32)
        for g, i, o in zip(gains, sizes, sizes[1:], strict=False)
    ]

    def apply_fn(params, x):
        for w in params[:-1]:
            x = activation(x @ w)
        return x @ params[-1]

    return jax.jit(apply_fn), params, jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)


def heavy_conv(rng, activation):
    shapes = [(3, 3, 3, 16), (3, 3, 16, 64), (1, 1, 64, 128), (3, 3, 128, 16)]
    params = [
        jnp.asarray(
            math.exp(rng.normal()) * rng.standard_t(3, size=s) / math.sqrt(3 * math.prod(s[:3])),
            jnp.float32,
        )
        for s in shapes
    ]

    def apply_fn(params, x):
        for w in params:
            x = activation(
                jax.lax.conv_general_dilated(
                    x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return x

    return jax.jit(apply_fn), params, jnp.asarray(rng.normal(size=(16, 8, 8, 3)), jnp.float32)


@pytest.mark.parametrize("bound", [0.05, 0.005])
@pytest.mark.parametrize(
    ("network", "activation"),
    [(heavy_mlp, lambda x: x), (heavy_mlp, jax.nn.relu), (heavy_conv, jax.nn.relu)],
    ids=["linear", "relu", "conv"],
)
def test_riq_needs_fewer_bits_than_equal_precision_than_one_step(network, activation, bound):
    apply_fn, params, x = network(RNG(5), activation)
    qtree, info = riq.compress(apply_fn, params, x, max_deviation=bound, eps0=0.0)
    outputs = apply_fn(dequantize(qtree), x)
    measured = float(riq.example_deviation(apply_fn(params, x), outputs).mean())
    assert measured == pytest.approx(info.deviation, rel=1e-3)
    assert measured < bound
    chosen = [row.path for row in info.rows]
    weights = [np.asarray(w) for i, w in enumerate(params) if str(i) in chosen]

    @jax.jit
    def deviation(steps):
        steps = dict(zip(chosen, steps, strict=True))
        rounded = [
            jnp.round(w / steps[str(i)]) * steps[str(i)] if str(i) in steps else w
            for i, w in enumerate(params)
        ]
        return riq.example_deviation(apply_fn(params, x), apply_fn(rounded, x)).mean()

    def bits(relative):
        """At the largest factor of these steps that is feasible."""
        low, high = 1e-4, 10.0
        for _ in range(30):
            middle = math.sqrt(low * high)
            if float(deviation(jnp.asarray(middle * relative, jnp.float32))) < bound:
                low = middle
            else:
                high = middle
        return sum(
            entropy(quantized(w, low * s)) * w.size for w, s in zip(weights, relative, strict=True)
        )

    root_mean_squares = np.array([np.sqrt((w**2).mean()) for w in weights])
    ours = sum(entropy(q.codes) * q.size for q in jax.tree.leaves(qtree, is_leaf=_is_q) if _is_q(q))
    assert ours < bits(root_mean_squares) < bits(np.full(len(weights), root_mean_squares.mean()))


def _is_q(x):
    return hasattr(x, "codes")


# --- one leaf -------------------------------------------------------------------------------

HEAVY = RNG(6).standard_t(3, size=(96, 64)).astype(np.float32) + np.float32(0.3)


@pytest.mark.parametrize("factor", [0.125, 4096.0])
def test_scaling_scales_the_step_and_keeps_the_codes(factor):
    q, scaled = (riq.quantize_array(jnp.asarray(HEAVY * f), 150.0) for f in (1.0, factor))
    np.testing.assert_array_equal(q.codes, scaled.codes)
    np.testing.assert_allclose(scaled.qparams.scale, factor * q.qparams.scale, rtol=1e-6)


def test_order_shape_and_sign_do_not_matter():
    order = RNG(7).permutation(HEAVY.size)
    q = riq.quantize_array(jnp.asarray(HEAVY), 150.0)
    moved = riq.quantize_array(jnp.asarray(HEAVY.ravel()[order].reshape(24, 256)), 150.0)
    turned = riq.quantize_array(jnp.asarray(HEAVY.T), 150.0)
    mirrored = riq.quantize_array(jnp.asarray(-HEAVY), 150.0)
    # Sums in another order differ in the last place, which may move a code at a tie.
    for other, same in ((moved.codes.ravel(), q.codes.ravel()[order]), (turned.codes.T, q.codes)):
        assert np.mean(np.asarray(other) != np.asarray(same)) < 1e-3
    np.testing.assert_array_equal(q.codes, -mirrored.codes)


def test_stored_step_is_least_squares_and_leaves_the_angle():
    q = riq.quantize_array(jnp.asarray(HEAVY), 60.0)
    w, codes = HEAVY.astype(np.float64), np.asarray(q.codes, np.float64)
    scale = float(q.qparams.scale[0, 0])
    assert scale == pytest.approx((w * codes).sum() / (codes**2).sum(), rel=1e-6)
    epsilon = cosine_distance(w, codes)
    sine2 = 1 - (1 - epsilon) ** 2
    assert ((w - scale * codes) ** 2).sum() == pytest.approx(sine2 * (w**2).sum(), rel=1e-5)
    assert float(distortion.cosine_distance(jnp.asarray(HEAVY), dequantize(q))) == pytest.approx(
        epsilon, rel=1e-4
    )


def test_range_of_the_grid_is_that_of_the_codes():
    q = riq.quantize_array(jnp.asarray(HEAVY), 60.0)
    low, high = int(q.codes.min()), int(q.codes.max())
    assert (float(q.qparams.qmin[0, 0]), float(q.qparams.qmax[0, 0])) == (low, high)
    assert int(q.qparams.bits[0, 0]) == (high - low).bit_length()


def test_zeros_stay_zeros_and_a_pruned_tensor_pays_little_for_them():
    rng = RNG(8)
    w = rng.normal(size=(512, 512))
    w[rng.random(w.shape) < 0.9] = 0.0
    for k in (60.0, 240.0):
        q = riq.quantize_array(jnp.asarray(w, jnp.float32), k)
        codes = np.asarray(q.codes)
        assert (codes[w == 0.0] == 0).all()
        assert entropy(codes) <= 0.47 + 0.1 * entropy(codes[w != 0.0]) + 0.01


def test_counting_nonzeros_gives_a_pruned_tensor_the_step_of_its_survivors():
    rng = RNG(9)
    w = np.zeros((64, 64), np.float32)
    w.flat[:1024] = rng.normal(size=1024)
    pruned = riq.quantize_array(jnp.asarray(w), 50.0, eps0=0.05, ignore_zeros=True)
    dense = riq.quantize_array(jnp.asarray(w.flat[:1024].reshape(32, 32)), 50.0, eps0=0.05)
    np.testing.assert_array_equal(np.asarray(pruned.codes).flat[:1024], dense.codes.ravel())


@pytest.mark.parametrize(
    "w",
    [np.zeros((30, 20)), np.full((30, 20), 2.5), np.eye(30) * 1e-30, np.full((30, 20), -3e30)],
    ids=["zero", "constant", "tiny", "huge"],
)
def test_degenerate_leaves_come_back_finite_and_close(w):
    w = jnp.asarray(w, jnp.float32)
    q = riq.quantize_array(w, 100.0)
    np.testing.assert_allclose(dequantize(q), w, rtol=0.02)
    assert bool((q.qparams.scale > 0).all())


def test_each_layer_of_a_stacked_leaf_is_quantized_as_if_alone():
    rng = RNG(10)
    w = jnp.asarray(rng.normal(size=(3, 40, 32)) * [[[0.1]], [[1.0]], [[9.0]]], jnp.float32)
    stacked = riq.quantize_array(w, 80.0, stacked=1)
    assert stacked.qparams.scale.shape == (3, 1, 1)
    mapped = jax.vmap(lambda layer: riq.quantize_array(layer, 80.0))(w)
    for layer in range(3):
        alone = riq.quantize_array(w[layer], 80.0)
        for several in (stacked, mapped):
            np.testing.assert_array_equal(several.codes[layer], alone.codes)
            np.testing.assert_allclose(several.qparams.scale[layer], alone.qparams.scale, rtol=1e-6)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dequantize(layer)), 0, stacked)
    np.testing.assert_array_equal(scanned, dequantize(stacked))


def test_rate_estimate_is_entropy_and_a_table():
    codes = np.repeat([0, 1, -5, 7], [512, 256, 128, 128])
    assert riq.rate_bits(codes) == pytest.approx(1024 * 1.75 + 32 * 4)
    assert riq.rate_bits(np.zeros(1000)) == 32.0


def test_coded_size_stays_within_half_a_percent_of_the_entropy():
    w = jnp.asarray(RNG(11).normal(size=(1024, 512)), jnp.float32)
    codes = np.asarray(riq.quantize_array(w, 900.0).codes)
    tables = ans.fit_tables([codes], max_classes=1)
    per_lane = ans.lane_segments(entropy(codes) * codes.size, *codes.shape)
    stream = ans.encode(codes, ans.classify(codes, tables), tables, per_lane)
    payload = 8 * (stream.words.nbytes + stream.states.nbytes + stream.lengths.nbytes)
    assert len(tables.freqs[1]) <= 256
    ideal = entropy(codes) * codes.size
    assert ideal - 1 <= payload <= 1.005 * ideal + 64


# --- search ---------------------------------------------------------------------------------


def counted(threshold):
    calls = []

    def feasible(k):
        calls.append(k)
        return k >= threshold

    return feasible, calls


@pytest.mark.parametrize("threshold", [400.0, 5_000.0, 123_456.0, 300_000.0])
@pytest.mark.parametrize("search", [riq.bisection, riq.sweep])
def test_search_returns_a_feasible_k_just_above_the_threshold(search, threshold):
    low, high = riq.k_bounds(2_359_296)
    feasible, calls = counted(threshold)
    k = search(feasible, low, high)
    assert threshold <= k <= threshold * 1.005 + (5.0 if search is riq.sweep else 0.0)
    assert k in calls or k == high
    root = math.sqrt(high - low)
    limit = 11 if search is riq.bisection else root + 2 * math.ceil(math.sqrt(root)) + 6
    assert len(calls) <= limit


@pytest.mark.parametrize("search", [riq.bisection, riq.sweep])
def test_search_never_returns_an_infeasible_k_however_rough_the_model(search):
    rng = RNG(12)
    for _ in range(50):
        threshold, known = math.exp(rng.uniform(6, 12)), {}

        def feasible(k, threshold=threshold, known=known):
            return known.setdefault(k, k * math.exp(0.05 * rng.normal()) >= threshold)

        k = search(feasible, *riq.k_bounds(2_359_296))
        assert known.get(k, k == riq.k_bounds(2_359_296)[1])


def test_both_searches_agree_on_a_model():
    apply_fn, params, x = heavy_mlp(RNG(13), jax.nn.relu)
    found = [
        riq.compress(apply_fn, params, x, max_deviation=0.02, search=search)[1]
        for search in (riq.bisection, riq.sweep)
    ]
    assert all(info.deviation < 0.02 for info in found)
    assert found[0].k == pytest.approx(found[1].k, rel=0.03)


def test_search_compiles_the_model_once_and_evaluates_it_at_most_14_times():
    traces = []

    def apply_fn(params, x):
        traces.append(1)
        return jnp.tanh(x @ params["a"]) @ params["b"]

    rng = RNG(14)
    params = {
        "a": jnp.asarray(rng.normal(size=(32, 64)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(16, 32)), jnp.float32)
    _, info = riq.compress(apply_fn, params, x, max_deviation=0.01)
    assert len(traces) == 1
    assert info.evaluations <= 14


def linear(rng=15, dims=(48, 40)):
    rng = RNG(rng)
    w = jnp.asarray(rng.normal(size=dims), jnp.float32)
    return (lambda p, x: x @ p["w"]), {"w": w}, jnp.asarray(rng.normal(size=(24, 48)), jnp.float32)


def test_the_search_goes_on_below_the_published_range():
    """A few large weights carry the output; rounding all others away is feasible below k_min."""
    w = np.asarray(RNG(21).normal(size=(64, 64)) * 1e-2, np.float32)
    w[::8, 0] = 5.0
    x = jnp.asarray(1.0 + 0.1 * RNG(22).normal(size=(16, 64)), jnp.float32)
    _, info = riq.compress(
        lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, x, max_deviation=0.01, eps0=0.0
    )
    assert info.k < riq.k_bounds(64 * 64, 0.0)[0] / 1.5
    assert info.deviation < 0.01
    assert info.rows[0].nonzeros == 8


def test_confidence_costs_bits():
    apply_fn, params, x = linear()
    mean, confident = (
        riq.compress(apply_fn, params, x, max_deviation=0.01, standard_errors=z)[1]
        for z in (0.0, 2.0)
    )
    assert confident.deviation + 2 * confident.standard_error < 0.01
    assert confident.entropy_bits > mean.entropy_bits
    spread = np.asarray(
        riq.example_deviation(
            apply_fn(params, x), apply_fn(dequantize(riq.quantize(params, mean.k)), x)
        ),
        np.float64,
    )
    assert mean.standard_error == pytest.approx(spread.std(ddof=1) / math.sqrt(24), rel=1e-3)


def test_tighter_bounds_need_more_bits_and_the_trace_starts_at_the_floor():
    apply_fn, params, x = linear()
    infos = [
        riq.compress(apply_fn, params, x, max_deviation=d)[1] for d in (0.1, 0.03, 0.01, 0.003)
    ]
    assert np.all(np.diff([info.entropy_bits for info in infos]) > 0)
    assert infos[0].floor == pytest.approx(1e-4, rel=1e-3)
    assert infos[0].trace[0].k == pytest.approx(riq.k_bounds(48 * 40)[1])
    assert infos[-1].trace[0].deviation == pytest.approx(1.21e-4, rel=0.2)


def test_batches_are_the_same_as_one_batch_whatever_their_form():
    apply_fn, params, x = linear()
    whole = riq.compress(apply_fn, params, x, max_deviation=0.01)[1]
    for calib in ([x[:9], x[9:]], iter([x[:8], x[8:16], x[16:]])):
        parts = riq.compress(apply_fn, params, calib, max_deviation=0.01)[1]
        assert parts.k == pytest.approx(whole.k, rel=0.01)


def test_first_output_counts_and_deviation_fn_replaces_it():
    apply_fn, params, x = linear()
    plain = riq.compress(apply_fn, params, x, max_deviation=0.01)[1]
    for outputs in (lambda y: (y, -7.0 * x), lambda y: {"b": x[:, 0], "a": [y]}):
        several = functools.partial(lambda outputs, p, x: outputs(apply_fn(p, x)), outputs)
        info = riq.compress(several, params, x, max_deviation=0.01)[1]
        assert info.k == plain.k
    worst = riq.compress(
        apply_fn,
        params,
        x,
        max_deviation=0.01,
        deviation_fn=lambda y, z: riq.example_deviation(y, z).max(),
    )[1]
    assert worst.k > plain.k


def test_weights_alone_meet_a_bound_on_their_size_weighted_distance():
    rng = RNG(16)
    params = {
        "small": jnp.asarray(rng.normal(size=(32, 32)), jnp.float32),
        "large": jnp.asarray(5 * rng.laplace(size=(128, 96)), jnp.float32),
        "bias": jnp.ones(96),
    }
    qtree, info = riq.compress_weights(params, max_deviation=0.01)
    restored = dequantize(qtree)
    total = 32 * 32 + 128 * 96
    expected = sum(
        params[name].size / total * cosine_distance(params[name], restored[name])
        for name in ("small", "large")
    )
    assert info.deviation == pytest.approx(expected, rel=1e-3)
    assert 0.0098 < info.deviation < 0.01
    assert restored["bias"] is params["bias"]


def test_rows_say_what_became_of_each_leaf():
    apply_fn, params, x = linear()
    params = params | {"bias": jnp.ones(40)}
    qtree, info = riq.compress(apply_fn, params, x, max_deviation=0.01)
    (row,) = info.rows
    codes = np.asarray(qtree["w"].codes)
    assert (row.path, row.shape) == ("w", (48, 40))
    assert (row.nonzeros, row.levels) == ((codes != 0).sum(), len(np.unique(codes)))
    assert row.bits == int(codes.max() - codes.min()).bit_length()
    assert row.entropy_bits == pytest.approx(entropy(codes) * codes.size + 32 * row.levels)
    assert row.cosine_distance == pytest.approx(cosine_distance(params["w"], codes), rel=1e-3)
    assert row.predicted == pytest.approx((0.01 + math.sqrt(1920 / 24) / info.k) ** 2, rel=1e-5)
    assert info.predicted_deviation == pytest.approx(row.predicted, rel=1e-5)


# --- which leaves ---------------------------------------------------------------------------

SHAPES = {
    "conv1x1": (1, 1, 64, 128),
    "stack_bias": (24, 1024),
    "stack_kernel": (4, 32, 32),
    "stack_small": (4, 16, 16),
    "norm": (1024,),
    "one_output": (1024, 1),
    "small": (16, 32),
    "number": (),
}
TREE = {name: jnp.ones(shape) for name, shape in SHAPES.items()} | {"ids": jnp.ones((64, 64), int)}


def names_of(qtree):
    return {name for name, leaf in qtree.items() if _is_q(leaf)}


def test_default_takes_leaves_whose_layers_are_large_and_have_output_channels():
    qtree = riq.quantize(TREE, 100.0, stacked="stack")
    assert names_of(qtree) == {"conv1x1", "stack_kernel"}
    assert qtree["stack_kernel"].qparams.scale.shape == (4, 1, 1)
    assert names_of(riq.quantize(TREE, 100.0)) == {
        "conv1x1", "stack_kernel", "stack_bias", "stack_small",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("norm|conv", {"norm", "conv1x1"}),
        (lambda name: name == "small", {"small"}),
        ({"conv": False, ".": True}, set(SHAPES) - {"conv1x1"}),
    ],
    ids=["regex", "predicate", "mapping"],
)
def test_select_replaces_the_default_and_never_takes_integers(select, expected):
    assert names_of(riq.quantize(TREE, 100.0, select=select)) == expected


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    apply_fn, params, x = linear()
    params = {"w": params["w"], "deep": {"er": params["w"].at[3, 4].set(bad)}}
    with pytest.raises(ValueError, match="'deep/er' holds NaN or infinity"):
        riq.compress(apply_fn, params, x, max_deviation=0.01)
    with pytest.raises(ValueError, match="'deep/er' holds NaN or infinity"):
        riq.compress_weights(params, max_deviation=0.01)


@pytest.mark.parametrize(
    "params", [{}, {"w": jnp.ones((64, 64), int)}, {"w": jnp.float32(2.0)}, {"w": jnp.ones(4096)}],
    ids=["empty", "integer", "0-d", "1-d"],
)  # fmt: skip
def test_nothing_to_quantize_is_an_error_that_names_the_remedy(params):
    with pytest.raises(ValueError, match=r"no leaf to quantize.*select"):
        riq.quantize(params, 100.0)


def test_an_unreachable_bound_reports_the_best_that_can_be_reached():
    apply_fn, params, x = linear()
    with pytest.raises(UnreachableError, match=r"cannot be reached.*raise it, or lower eps0") as e:
        riq.compress(apply_fn, params, x, max_deviation=5e-5)
    qtree = riq.quantize(params, riq.k_bounds(48 * 40)[1])
    best = riq.example_deviation(apply_fn(params, x), apply_fn(dequantize(qtree), x)).mean()
    assert e.value.best == pytest.approx(float(best), rel=1e-3)
    _, info = riq.compress(apply_fn, params, x, max_deviation=5e-5, eps0=0.001)
    assert info.deviation < 5e-5


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        (np.ones((4, 7), np.float32), r"calib: apply_fn\(params, batch\) fails.*\(4, 7\)"),
        ([], "calib: no batch"),
        (np.ones((0, 48), np.float32), "leading axis of examples"),
        ((np.ones((4, 48)), np.ones((3, 48))), "leading axis of examples"),
    ],
    ids=["shape", "none", "empty", "ragged"],
)
def test_calibration_of_the_wrong_structure_is_named(calib, message):
    apply_fn, params, _ = linear()
    with pytest.raises(ValueError, match=message):
        riq.compress(apply_fn, params, calib, max_deviation=0.01)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda y: y.sum(), "one output per example or pass `deviation_fn`"),
        (lambda y: (), "returns no array"),
        (lambda y: y / 0.0, "outputs hold NaN or infinity"),
    ],
    ids=["scalar", "nothing", "nan"],
)
def test_outputs_that_cannot_be_compared_are_an_error(outputs, message):
    apply_fn, params, x = linear()
    with pytest.raises(ValueError, match=message):
        riq.compress(lambda p, x: outputs(apply_fn(p, x)), params, x, max_deviation=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_deviation": 0.0}, "max_deviation: must be positive"),
        ({"max_deviation": 0.01, "eps0": 1.0}, r"eps0: must be in \[0, 1\)"),
        ({"max_deviation": 0.01, "standard_errors": 2.0}, "at least two deviations"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    apply_fn, params, x = linear()
    with pytest.raises(ValueError, match=message):
        riq.compress(apply_fn, params, x[:1], **options)
