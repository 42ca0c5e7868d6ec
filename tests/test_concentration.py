"""Concentration against NumPy in float64, closed forms and published numbers."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import linen as nn
from flax import nnx
from matplotlib.figure import Figure

from lnq.attention import attention_fn, concentration
from lnq.attention.concentration import softmax
from lnq.attention.lln import FITTED

D = 64
log_attention = jax.jit(concentration.log_attention, static_argnums=2)


def pairs(seed, n=512, repeats=2):
    """``[repeats, q or k, n, d]``, standard normal."""
    return jax.random.normal(jax.random.key(seed), (repeats, 2, n, D))


def stack(leaves):
    return jax.tree.map(lambda *x: np.stack(x), *leaves)


# Kernels.

FEATURES = {
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
    "square": np.square,
    "exp": np.exp,
}


def small():
    q, k = np.random.default_rng(0).normal(size=(2, 3, 7, 5)) * [[[[1.3]]], [[[0.6]]]] + 0.2
    return q, k[:, :4]


@pytest.mark.parametrize("name", FEATURES)
def test_feature_kernels_are_products_of_their_features(name):
    q, k = small()
    weights = FEATURES[name](q) @ FEATURES[name](k).swapaxes(-1, -2)
    expected = weights / weights.sum(-1, keepdims=True)
    found = concentration.attention_matrix(q, k, getattr(concentration, name))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)


def test_softmax_and_lln_are_their_formulas():
    q, k = small()
    logits = np.einsum("bnd,bmd->bnm", q, k) / np.sqrt(5)
    expected = scipy.special.log_softmax(logits, -1)
    np.testing.assert_allclose(log_attention(q, k), expected, atol=2e-6)
    sums = np.exp(2.0 * q[:, :, None] + 0.7 * k[:, None]).sum(-1)
    expected = np.log(sums / sums.sum(-1, keepdims=True))
    np.testing.assert_allclose(
        log_attention(q, k, concentration.lln(2.0, 0.7)), expected, atol=2e-6
    )


@pytest.mark.parametrize("scale", [3.0, 300.0], ids=["warm", "cold"])
def test_lln_is_exact_where_products_of_features_underflow(scale):
    q, k = scale * np.random.default_rng(1).normal(size=(2, 6, 3)).astype(np.float32)
    expected = scipy.special.logsumexp(q[:, None] + k[None].astype(float), -1)
    products = np.exp(q - q.max(-1, keepdims=True)) @ np.exp(k - k.max(-1, keepdims=True)).T
    assert (products.min() == 0) == (scale == 300.0)
    np.testing.assert_allclose(concentration.exp(q, k), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("constants", "a", "b"),
    [({}, 0.14855178144710912, -0.35487039130661086), ({"a": 0.2, "b": -0.3}, 0.2, -0.3)],
    ids=["published", "own"],
)
def test_matched_lln_has_the_factors_of_its_constants(constants, a, b):
    q, k = map(jnp.float32, small())
    s_q, s_k = (np.std(x, ddof=1, dtype=float) for x in (q, k))
    s = np.sqrt((s_q**2 * s_k**2 - b) / (2 * a))
    found = concentration.lln_matched(q, k, **constants)
    np.testing.assert_allclose(found, concentration.lln(s / s_q, s / s_k)(q, k), atol=1e-5)


def test_performer_is_softmax_on_average():
    q, k = 0.7 * np.random.default_rng(2).normal(size=(2, 3, 4)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.lax.map(jax.jit(lambda key: concentration.performer(key, 16)(q, k)), keys)
    draws = np.exp(np.asarray(draws))
    error = draws.std(0) / np.sqrt(len(draws))
    np.testing.assert_array_less(np.abs(draws.mean(0) - np.exp(q @ k.T / 2)), 4 * error)
    assert error.max() < 0.2


def test_directions_are_normal_and_orthogonal_within_blocks():
    found = concentration._directions(jax.random.key(0), 1000, jnp.zeros(4))
    assert found.shape == (1000, 4)
    products = np.einsum("bid,bjd->bij", *2 * [found.reshape(250, 4, 4)])
    np.testing.assert_allclose(products[:, ~np.eye(4, dtype=bool)], 0.0, atol=1e-5)
    np.testing.assert_allclose(np.cov(found.T), np.eye(4), atol=0.1)
    assert scipy.stats.kstest(np.ravel(found), "norm").pvalue > 0.01


# Measures.


def test_masked_keys_are_as_if_removed():
    q, k = small()
    mask = np.array([1.0, 0, 1, 1])
    found = log_attention(q, k, concentration.elu, mask[None, None])
    kept = log_attention(q, k[:, mask > 0], concentration.elu)
    assert (found[..., 1] == -jnp.inf).all()
    np.testing.assert_allclose(found[..., mask > 0], kept, atol=1e-6)
    np.testing.assert_allclose(concentration.entropy(found), concentration.entropy(kept), rtol=1e-6)
    for a, b in zip(*map(concentration.log_normal, (found, kept)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rows_that_see_nothing_are_not_counted():
    q, k = small()
    q, k, n = q[0, :4], k[0], 3
    padded = log_attention(q, k, mask=np.outer([1, 1, 1, 0], [1, 1, 1, 0]))
    found, alone = (concentration.measure(log_p) for log_p in (padded, log_attention(q[:n], k[:n])))
    np.testing.assert_allclose(found.entropy, alone.entropy, rtol=1e-6)
    np.testing.assert_allclose(found.gap, alone.gap, rtol=1e-5)
    np.testing.assert_allclose(found.log.variance, alone.log.variance, rtol=1e-5)


def test_measures_of_a_batch_are_those_of_scipy():
    log_p = np.asarray(log_attention(*np.random.default_rng(3).normal(size=(2, 2, 9, 4)) * 1.4))
    p = np.exp(log_p, dtype=float)
    found, flat = concentration.measure(log_p), log_p.reshape(2, -1)
    np.testing.assert_allclose(found.entropy, scipy.stats.entropy(p, axis=-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found.variance, 81 * p.reshape(2, -1).var(-1), rtol=1e-5)
    second = np.sort(np.abs(np.linalg.eigvals(p)))[:, -2]
    np.testing.assert_allclose(found.gap, 1 - second, atol=1e-6)
    np.testing.assert_allclose(found.log.mean, flat.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found.log.variance, flat.var(-1), rtol=1e-5)
    np.testing.assert_allclose(found.log.skew, scipy.stats.skew(flat, axis=-1), atol=1e-5)
    kurtosis = scipy.stats.kurtosis(flat, axis=-1)
    np.testing.assert_allclose(found.log.excess_kurtosis, kurtosis, atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_gap_of_many_tokens_is_that_of_all_eigenvalues(scale):
    q, k = scale * np.random.default_rng(4).normal(size=(2, 128, 16))
    p = scipy.special.softmax(q @ k.T / 4, -1)
    second = np.sort(np.abs(np.linalg.eigvals(p)))[-2]
    np.testing.assert_allclose(concentration.spectral_gap(p), 1 - second, atol=1e-7)


N = 256
RING = np.roll(np.eye(N), 1, 1)
HALVES = np.kron(np.eye(2), np.full((N // 2, N // 2), 2 / N))
TOYS = {  # log P, entropy, gap
    "one key for all": (np.log(np.eye(N)[[3] * N] * (1 - N * 1e-6) + 1e-6), 0.004, 1.0),
    "a key for each": (np.log(RING * (1 - N * 1e-6) + 1e-6), 0.004, 0.0003),
    "all keys": (np.full((N, N), -np.log(N)), np.log(N), 1.0),
    "a permutation": (np.where(RING, 0.0, -np.inf), 0.0, 0.0),
    "itself": (np.where(np.eye(N), 0.0, -np.inf), 0.0, 0.0),
    "two groups": (np.where(HALVES, -np.log(N / 2), -np.inf), np.log(N / 2), 0.0),
}


@pytest.mark.parametrize(("log_p", "entropy", "gap"), TOYS.values(), ids=TOYS)
def test_toys_show_what_biased_and_unbiased_mean(log_p, entropy, gap):
    found = concentration.measure(log_p)
    np.testing.assert_allclose(found.entropy, entropy, atol=5e-4)
    np.testing.assert_allclose(found.gap, gap, atol=5e-5)


def test_logit_variance_is_the_mean_over_rows_of_any_queries_and_keys():
    rng = np.random.default_rng(5)
    q, k = rng.normal(size=(2, 3, 40, 6)) * np.exp(rng.normal(size=(2, 1, 1, 6))) + 0.5
    expected = np.var(np.einsum("bnd,bmd->bnm", q, k) / np.sqrt(6), -1).mean(-1)
    np.testing.assert_allclose(concentration.logit_variance(q, k), expected, rtol=1e-5)


def test_temperature_is_that_of_isotropic_logits():
    q, k = np.array([0.5, 3.0])[:, None, None] * pairs(0, 2048, 1)[0]
    np.testing.assert_allclose(concentration.temperature(q, k), 1 / 1.5, rtol=0.01)
    np.testing.assert_allclose(concentration.logit_variance(q, k), 1.5**2, rtol=0.02)


def test_compiled_is_as_it_is():
    def found(q, k):
        log_p = concentration.log_attention(q, k, concentration.lln_matched)
        measured = concentration.entropy(log_p), concentration.log_normal(log_p)
        return log_p, measured, concentration.temperature(q, k)

    q, k = map(jnp.float32, small())
    q = q[:, :4]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found(q, k), jax.jit(found)(q, k))


def test_half_precision_is_measured_in_single():
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in small())
    found = log_attention(q, k, concentration.lln_matched)
    single = log_attention(*(x.astype(jnp.float32) for x in (q, k)), concentration.lln_matched)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, single)


# Gaussian queries and keys.


@pytest.mark.parametrize(
    ("s", "rtol", "atol"),
    [(0.5, 0.01, 0.01), (0.75, 0.01, 0.01), (1, 0.01, 0.01), (1.25, 0.03, 0.01)],
)
def test_softmax_is_log_normal(s, rtol, atol):
    log_p = log_attention(*s * pairs(0, 1024, 1)[0], softmax)
    found = concentration.log_normal(log_p)
    np.testing.assert_allclose(found.variance, s**4, rtol=rtol)
    np.testing.assert_allclose(found.mean, -np.log(1024) - s**4 / 2, atol=atol)
    assert abs(found.skew) < 0.15
    np.testing.assert_allclose(found.excess_kurtosis, 0.1, atol=0.05)
    # of n P, whose largest entries are missing from any one matrix
    np.testing.assert_allclose(concentration.variance(log_p), np.expm1(s**4), rtol=0.03 + s**4 / 10)
    np.testing.assert_allclose(
        concentration.entropy(log_p), concentration.entropy_of(s**4, 1024), atol=0.03
    )


CURVE = {0.5: 0.0056, 1.125: 0.019, 3.125: 0.128, 6.125: 0.436, 10.125: 1.03, 18: 2.45, 32: 5.36}


def test_log_variance_of_lln_is_a_curve_that_fenton_and_wilkinson_leave():
    @jax.jit
    def variances(total, pairs):
        def one(pair):
            numerators = concentration.exp(*jnp.sqrt(total / 2) * pair)
            log_p = numerators - jax.nn.logsumexp(numerators, -1, keepdims=True)
            return jnp.var(log_p), jnp.var(numerators)

        return jnp.mean(jnp.stack(jax.lax.map(one, pairs)), 1)

    draws = pairs(1, 1024, 4)
    found, numerator = np.transpose([variances(total, draws) for total in CURVE])
    np.testing.assert_allclose(found, list(CURVE.values()), rtol=0.05)
    ratio = np.array([concentration.fenton_wilkinson(total, D) for total in CURVE]) / numerator
    np.testing.assert_allclose(ratio[:2], 1, atol=0.07)
    assert (ratio[2:] > 1.6).all()


def test_fenton_and_wilkinson_are_right_about_narrow_sums():
    sums = np.exp(np.random.default_rng(6).normal(size=(100_000, D)) * np.sqrt(0.5)).sum(-1)
    expected = np.log(sums).var()
    np.testing.assert_allclose(concentration.fenton_wilkinson(0.5, D), expected, rtol=0.02)


def test_constants_of_heads_of_64_are_the_published_ones():
    fit = concentration.fit_constants(D, jax.random.key(0), n=512)
    assert 0.143 <= fit.a <= 0.154
    assert -0.38 <= fit.b <= -0.32


@pytest.mark.parametrize("d", [16, 128])
def test_constants_in_use_are_those_of_the_fit(d):
    fit = concentration.fit_constants(d, jax.random.key(0))
    np.testing.assert_allclose(fit, FITTED[d], rtol=5e-3)


def test_a_line_is_fitted_by_least_squares():
    options = {"n": 32, "points": 5, "repeats": 3, "low": 1.0, "high": 4.0}
    fit = concentration.fit_constants(4, jax.random.key(7), **options)
    totals = np.repeat(np.linspace(1, 4, 5), 3)
    found = []
    for total, key in zip(totals, jax.random.split(jax.random.key(7), 15), strict=True):
        q, k = np.sqrt(total / 2) * np.asarray(jax.random.normal(key, (2, 32, 4)), float)
        sums = np.exp(q) @ np.exp(k).T
        found.append(np.log(sums / sums.sum(-1, keepdims=True)).var())
    np.testing.assert_allclose(fit, np.polyfit(totals, found, 1), rtol=1e-4)


MATCHED = {  # s: log-variance and entropy of softmax and of LLN, gap of softmax; n = 512
    0.5: [0.062, 6.207, 0.103, 6.176, 0.988],
    1.0: [1.009, 5.740, 0.896, 5.411, 0.940],
    1.5: [5.350, 4.030, 6.368, 2.583, 0.738],
}
LLN_GAPS = {0.5: 0.985, 1.0: 0.878, 1.5: 0.493}
"""Medians of seven draws; one draw may be 0.2 away."""


@pytest.mark.parametrize("s", MATCHED)
def test_matched_lln_concentrates_where_softmax_does(s):
    kernels = softmax, concentration.lln_matched
    exact, lln = (
        stack([concentration.measure(log_attention(*s * pair, kernel)) for pair in pairs(0)])
        for kernel in kernels
    )
    found = exact.log.variance, exact.entropy, lln.log.variance, lln.entropy, exact.gap
    np.testing.assert_allclose(np.mean(found, 1), MATCHED[s], rtol=0.15)
    np.testing.assert_allclose(lln.gap.mean(), LLN_GAPS[s], rtol=0.15)


def test_entropy_and_gap_rise_with_the_temperature():
    stds = [2.0, 1.5, 1.0, 0.75, 0.5]
    kernels = {"softmax": softmax, "LLN": concentration.lln_matched}
    rows = concentration.sweep(kernels, stds, jax.random.key(2), n=128, repeats=7)
    assert [row[:2] for row in rows] == [(name, std) for name in kernels for std in stds]
    for name in kernels:
        entropies, gaps, variances, temperatures = np.transpose(
            [
                [row.entropy, row.gap, row.variance, row.temperature]
                for row in rows
                if row.kernel == name
            ]
        )
        assert (np.diff(entropies) > 0).all()
        assert (np.diff(gaps) > 0).all()
        assert (np.diff(variances) < 0).all()
        np.testing.assert_allclose(temperatures, np.array(stds) ** -2.0)


def test_a_row_of_a_sweep_is_the_median_of_its_draws():
    (row,) = concentration.sweep(
        {"x²": concentration.square}, [1.7], jax.random.key(3), n=20, d=3, repeats=3
    )
    draws = 1.7 * np.asarray(jax.random.normal(jax.random.key(3), (3, 2, 20, 3)), float)
    weights = np.array([q**2 @ (k**2).T for q, k in draws])
    p = weights / weights.sum(-1, keepdims=True)
    entropy = np.median(scipy.stats.entropy(p, axis=-1).mean(-1))
    gap = np.median(1 - np.sort(np.abs(np.linalg.eigvals(p)))[:, -2])
    variance = np.median(np.log(p).var((-2, -1)))
    np.testing.assert_allclose(row[3:], [entropy, gap, variance], rtol=1e-4)


@pytest.mark.parametrize("name", ["relu", "square"])
def test_homogeneous_features_do_not_feel_the_temperature(name):
    with jax.enable_x64(True):
        draw, kernel = (
            np.random.default_rng(8).normal(size=(2, 128, D)),
            getattr(concentration, name),
        )
        found = [concentration.measure(log_attention(*s * draw, kernel)) for s in (2.0, 1.5, 0.25)]
        for one in found[1:]:
            np.testing.assert_allclose(one.entropy, found[0].entropy, atol=1e-10)
            np.testing.assert_allclose(one.gap, found[0].gap, atol=1e-10)


@pytest.mark.parametrize("sigma2", [0.25, 1.0, 2.0])
def test_gap_of_softmax_is_that_of_independent_entries(sigma2):
    draws = pairs(4, repeats=7)
    gaps = [
        concentration.spectral_gap(jnp.exp(log_attention(*sigma2**0.25 * pair, softmax)))
        for pair in draws
    ]
    expected = 1 - np.sqrt((np.exp(sigma2) - 1) / 512)
    np.testing.assert_allclose(concentration.gap_of(sigma2, 512), expected, rtol=1e-6)
    np.testing.assert_allclose(np.median(gaps), expected, atol=0.01)


STEEPER = {  # alpha = beta: Var(ln P), entropy; s = 1, n = 512
    1.0: (0.055, 6.207),
    1.5: (0.262, 6.039),
    2.0: (0.731, 5.552),
    2.1355: (0.91, 5.36),
    2.5: (1.515, 4.76),
    3.0: (2.64, 3.90),
}


def test_steeper_exponentials_concentrate():
    @jax.jit
    def moments(alpha, pair):
        log_p = log_attention(*pair, concentration.lln(alpha, alpha))
        return concentration.log_normal(log_p).variance, concentration.entropy(log_p)

    found = [[moments(alpha, pair) for pair in pairs(0)] for alpha in STEEPER]
    variances, entropies = np.mean(found, 1).T
    expected = np.transpose(list(STEEPER.values()))
    np.testing.assert_allclose(variances, expected[0], rtol=0.1)
    np.testing.assert_allclose(entropies, expected[1], rtol=0.05)


# Drawings.


def test_a_sweep_is_drawn_as_a_curve_for_each_kernel():
    rows = [
        concentration.SweepRow(name, std, 1 / std**2, 5 * std, std / 2, 0.0)
        for name in ("A", "B")
        for std in (0.5, 1.0)
    ]
    axes = Figure().subplots(1, 2)
    assert concentration.draw_sweep(axes, rows) is axes
    for ax, ys in zip(axes, ([2.5, 5.0], [0.25, 0.5]), strict=True):
        assert [line.get_label() for line in ax.lines] == ["A", "B"]
        for line in ax.lines:
            np.testing.assert_array_equal(line.get_data(), [[4.0, 1.0], ys])


def test_the_normal_is_drawn_over_the_histogram():
    values = np.random.default_rng(9).normal(-7, 0.5, (200, 200))
    values[0, 0] = -np.inf
    ax = concentration.draw_log_normal(Figure().subplots(), values)
    x, density = ax.lines[0].get_data()
    np.testing.assert_allclose(density, scipy.stats.norm(-7, 0.5).pdf(x), atol=0.02)
    (outline,) = ax.patches
    x, y = outline.get_xy().T
    np.testing.assert_allclose(abs(np.trapezoid(y, x)), 1)


# Models.

LENGTH, HEADS, WIDTH = 5, 2, 6


def tokens():
    return jax.random.normal(jax.random.key(0), (3, LENGTH, WIDTH))


@functools.cache
def linen_params():
    return jax.jit(nn.MultiHeadDotProductAttention(HEADS).init)(jax.random.key(1), tokens())


def linen_model(attention_fn):
    layer, params = (
        nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn),
        linen_params(),
    )
    parts = (params["params"][name] for name in ("query", "key"))
    return partial(layer.apply, params), [(part["kernel"], part["bias"]) for part in parts]


def nnx_model(attention_fn):
    layer = nnx.MultiHeadAttention(
        HEADS, WIDTH, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(1)
    )
    return layer, [(part.kernel[...], part.bias[...]) for part in (layer.query, layer.key)]


MODELS = {
    "linen": (linen_model, nn.dot_product_attention),
    "nnx": (nnx_model, nnx.dot_product_attention),
}
every_model = pytest.mark.parametrize(("model", "own"), MODELS.values(), ids=MODELS)


@every_model
def test_a_recorder_keeps_queries_and_keys_and_changes_nothing(model, own):
    recorder, mask = concentration.Recorder(own), nn.make_causal_mask(tokens()[..., 0])
    apply, projections = model(recorder)
    found = apply(tokens(), mask=mask), apply(-tokens())
    without, _ = model(own)
    np.testing.assert_array_equal(found, (without(tokens(), mask=mask), without(-tokens())))
    causal, free = recorder.calls
    for sign, call in ((1, causal), (-1, free)):
        for kept, (kernel, bias) in zip(call[:2], projections, strict=True):
            expected = np.einsum("bnw,whd->bhnd", sign * tokens(), kernel)
            expected += np.asarray(bias)[None, :, None]
            np.testing.assert_allclose(kept, expected, atol=1e-5)
    np.testing.assert_array_equal(causal.mask[:, 0], np.tri(LENGTH, dtype=bool)[None].repeat(3, 0))
    assert free.mask is None


def test_what_was_recorded_can_be_measured():
    recorder = concentration.Recorder(nn.dot_product_attention)
    apply, _ = linen_model(recorder)
    mask = nn.make_causal_mask(tokens()[..., 0])
    _, sown = apply(tokens(), mask=mask, sow_weights=True, mutable="intermediates")
    (call,) = recorder.calls
    (expected,) = sown["intermediates"]["attention_weights"]
    found = concentration.attention_matrix(call.q, call.k, mask=call.mask)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_shared_keys_are_repeated_and_causality_is_a_mask():
    def own(query, key, value, bias=None, mask=None, is_causal=False):
        return value

    q, k = np.random.default_rng(0).normal(size=(2, 3, LENGTH, 4, 6))
    recorder = concentration.Recorder(own)
    assert recorder(q, k[..., :2, :], k, is_causal=True) is k
    recorder(q, k, k, None, np.arange(LENGTH)[None] < 3, is_causal=True)
    shared, masked = recorder.calls
    np.testing.assert_array_equal(shared.q, q.swapaxes(1, 2).astype(np.float32))
    np.testing.assert_array_equal(shared.k, k[..., [0, 0, 1, 1], :].swapaxes(1, 2).astype("f"))
    below = np.tri(LENGTH, dtype=bool)
    np.testing.assert_array_equal(shared.mask, np.broadcast_to(below, (3, 4, LENGTH, LENGTH)))
    np.testing.assert_array_equal(masked.mask, np.asarray(shared.mask) & (np.arange(LENGTH) < 3))


def test_one_function_is_recorded_in_both_worlds():
    recorder = concentration.Recorder(attention_fn)
    for model in (linen_model, nnx_model):
        np.testing.assert_array_equal(
            model(recorder)[0](tokens()), model(attention_fn)[0](tokens())
        )
    assert [call.mask for call in recorder.calls] == [None, None]


@every_model
def test_a_recorder_refuses_tracers(model, own):
    recorder = concentration.Recorder(own)
    apply, _ = model(recorder)
    with pytest.raises(ValueError, match=r"query: it is traced.*without `jit`"):
        jax.jit(lambda x: apply(x))(tokens())
    assert not recorder.calls


# Errors.

BAD = {
    "a vector": (lambda: log_attention(jnp.ones(3), jnp.ones(3)), r"q, k: expected q \[..., n, d"),
    "heads in the middle": (
        lambda: log_attention(jnp.ones((5, 2, 3)), jnp.ones((4, 2, 3))),
        r"got \(5, 2, 3\) and \(4, 2, 3\); move heads",
    ),
    "two sizes of heads": (lambda: log_attention(jnp.ones((5, 2)), jnp.ones((5, 3))), "q, k: "),
    "cross-attention": (lambda: concentration.measure(jnp.zeros((2, 3))), r"p: .*got \(2, 3\)"),
    "a gap in jit": (lambda: jax.jit(concentration.measure)(jnp.eye(3)), "p: .*traced; leave `jit"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
