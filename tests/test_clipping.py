"""Clips and bit rules against the paper's tables, SciPy, samples, and slow obvious twins."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special

from lnq import clipping, quantizer

RNG = np.random.default_rng
WIDTHS = np.arange(1, 17)
DENSITIES = ("laplace", "gauss")
FAMILIES = [(kind, density) for kind in ("published", "grid") for density in DENSITIES]
NAMES = ["laplace", "gauss", "laplace_grid", "gauss_grid"]
CLIP = {key: getattr(clipping, f"{name}_clip") for key, name in zip(FAMILIES, NAMES, strict=True)}
MSE = {key: getattr(clipping, f"{name}_mse") for key, name in zip(FAMILIES, NAMES, strict=True)}

every_density = pytest.mark.parametrize("density", DENSITIES)
every_family = pytest.mark.parametrize("family", FAMILIES, ids="-".join)
# Shapes and dtypes are handled in one place for both densities.
every_kind = pytest.mark.parametrize("family", FAMILIES[::3], ids="-".join)
every_side = pytest.mark.parametrize("one_sided", [False, True], ids=["signed", "one-sided"])
every_precision = pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])

# In float32 exp(-u^2/2) has a relative error of u^2/2 roundings of its exponent, and u < 7: no
# clip and no error can be promised to less than 25 * 2^-24 from the pdf and as much from erfc.
SINGLE = 3e-6
# Half a unit of seven published digits is at most 5e-7 of the number.
DIGITS = 5e-7


def call(function, *arrays, one_sided=False, x64=True):
    """In float64 whatever it was; always shape [16], so that tests share compilations."""
    with jax.enable_x64(x64):
        *values, bits = np.broadcast_arrays(*arrays, WIDTHS)[:-1]
        values = [jnp.asarray(value, float) for value in values]
        found = function(*values, jnp.asarray(bits, "i4"), one_sided=one_sided)
        assert found.dtype == (jnp.float64 if x64 else jnp.float32)
        return np.asarray(found, np.float64)


@lru_cache
def unit_clips(family, one_sided=False, x64=True):
    """At 1 .. 16 bits."""
    return call(CLIP[family], 1.0, WIDTHS, one_sided=one_sided, x64=x64)


def unit_mse(family, clips, bits=WIDTHS, one_sided=False, x64=True):
    return call(MSE[family], clips, 1.0, bits, one_sided=one_sided, x64=x64)


# --- twins ----------------------------------------------------------------------------------


def tails(density, x):
    """Integrals of the density, times 1, t and t^2, over (x, inf)."""
    if density == "laplace":
        half = 0.5 * np.exp(-x)
        return half, (1 + x) * half, (x * x + 2 * x + 2) * half
    pdf, tail = np.exp(-x * x / 2) / math.sqrt(2 * math.pi), special.erfc(x / math.sqrt(2)) / 2
    return tail, pdf, x * pdf + tail


def side_mse(density, levels):
    """Error of the positive values on rising levels, the nearest taken; in closed form."""
    ends = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [60.0 + levels[-1]]])
    mass, first, second = (-np.diff(tail) for tail in tails(density, ends))
    return (second - 2 * levels * first + levels**2 * mass).sum()


def grid_mse(density, clip, bits, one_sided):
    codes = 2 ** int(bits)
    if one_sided:
        return side_mse(density, np.arange(codes) * clip / (codes - 1))
    levels = np.arange(codes // 2 + 1) * 2 * clip / (codes - 1)
    return side_mse(density, levels) + side_mse(density, levels[:-1])


def midpoint_mse(density, clip, bits):
    """The paper's own grid."""
    return 2 * side_mse(density, (np.arange(2 ** (bits - 1)) + 0.5) * 2 * clip / 2**bits)


def minimum(objective, near):
    options = {"xatol": 1e-10}
    return optimize.minimize_scalar(objective, bounds=(0.3 * near, 2 * near), options=options)


def test_the_twin_is_the_integral():
    pdfs = {
        "laplace": lambda x: 0.5 * math.exp(-abs(x)),
        "gauss": lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    }
    for density, pdf in pdfs.items():  # 2 bits at a clip of 3; each of four integrals to 1e-10
        error = sum(
            integrate.quad(lambda x, y, f: (x - y) ** 2 * f(x), *ends, (y, pdf), epsabs=1e-10)[0]
            for y, *ends in ((-4, -60, -3), (-2, -3, -1), (0, -1, 1), (2, 1, 60))
        )
        assert grid_mse(density, 3.0, 2, False) == pytest.approx(error, abs=4e-10)


# Max (1960) and Lloyd: the optimum uniform quantizer of 4 .. 32 levels for the normal density.
@pytest.mark.parametrize(
    ("bits", "step", "mse"),
    [(2, 0.9957, "0.1188"), (3, 0.5860, "0.03744"), (4, 0.3352, "0.01154"), (5, 0.1881, "0.00350")],
)
def test_the_twin_finds_the_classical_steps(bits, step, mse):
    best = minimum(lambda clip: midpoint_mse("gauss", clip, bits), 2.5)
    assert best.x * 2 / 2**bits == pytest.approx(step, abs=5e-5)  # half a unit of the last digit
    assert f"{best.fun:.{len(mse) - 2}f}" == mse


# --- clips and errors -----------------------------------------------------------------------

TABLES = {  # unit clips and errors at 1 .. 8 bits (grids: from 2 on), from the specification
    ("published", "laplace"): (
        (1.862817, 2.830683, 3.897229, 5.028640, 6.204766, 7.413126, 8.645620, 9.896760),
        (0.5996434, 0.2848778, 0.1197024, 0.04602149)  # noqa: RUF005
        + (1.657183e-2, 5.678767e-3, 1.872518e-3, 5.988534e-4),
        (2.830683, 3.897229, 5.028640, 6.204766, 7.413126, 8.645620, 9.896760, 11.162685),
    ),
    ("published", "gauss"): (
        (1.239905, 1.710635, 2.151593, 2.559136, 2.936201, 3.286914, 3.615114, 3.924036),
        (0.2150104, 0.08714848, 0.03142944, 0.01049325)  # noqa: RUF005
        + (3.322594e-3, 1.012917e-3, 3.002152e-4, 8.707790e-5),
        (1.710635, 2.151593, 2.559136, 2.936201, 3.286914, 3.615114, 3.924036, 4.216330),
    ),
    ("grid", "laplace"): (
        (2.575551, 3.773947, 4.960145, 6.165663, 7.391147, 8.633587, 9.890332),
        (4.139893e-1, 1.439891e-1, 5.052055e-2, 1.738135e-2, 5.819651e-3, 1.896240e-3, 6.027284e-4),
        (3.486401, 4.819915, 6.098037, 7.358589, 8.617835, 9.882652, 11.155544),
    ),
    ("grid", "gauss"): (
        (1.572578, 2.106385, 2.539560, 2.926279, 3.281653, 3.612346, 3.922611),
        (1.494311e-1, 4.063825e-2, 1.186404e-2, 3.525959e-3, 1.042853e-3, 3.045785e-4, 8.770692e-5),
        (1.952309, 2.473879, 2.898728, 3.270115, 3.607461, 3.920501, 4.214679),
    ),
}
CODE_TABLES = {  # the authors' constants
    ("laplace", False): (1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89),
    ("laplace", True): (2.83, 3.89, 5.02, 6.2, 7.41, 8.64, 9.89, 11.16),
    ("gauss", False): (1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92),
    ("gauss", True): (1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92),  # and 4.2, of one decimal
}


@every_family
@every_precision
def test_clips_and_errors_are_those_of_the_tables(family, x64):
    *tables, relu = TABLES[family]
    known = slice(8 - len(relu), 8)
    rtol = DIGITS if x64 else DIGITS + SINGLE
    clips = unit_clips(family, x64=x64)
    for found, table in zip((clips, unit_mse(family, clips, x64=x64)), tables, strict=True):
        np.testing.assert_allclose(found[known], table, rtol=rtol)
    np.testing.assert_allclose(unit_clips(family, True, x64)[known], relu, rtol=rtol)


@every_density
@every_side
def test_the_codes_constants_are_ours_rounded_or_cut_after_two_decimals(density, one_sided):
    table = np.array(CODE_TABLES[density, one_sided])
    lost = unit_clips(("published", density), one_sided)[: len(table)] - table
    assert (lost > -0.005).all()
    assert (lost < 0.01).all()


@every_precision
def test_laplace_clip_is_lamberts_function_at_any_width(x64):
    """Bins of less than one included: :func:`allocate_bins` gives such."""
    bits = np.array([-10.0, -3.3, 0.0, 0.01, 1.0, 2.58496, 5.3, 7.9, 11.7, 16.0])
    with jax.enable_x64(x64):
        clips = clipping.laplace_clip(jnp.full(10, 1.7), jnp.asarray(bits, float))
    # At -10 bits the clip errs as its logarithm -13 does, absolutely: 13 eps.
    expected = 1.7 * special.lambertw(3 * 4.0**bits).real
    np.testing.assert_allclose(clips, expected, rtol=1e-14 if x64 else 2e-6)
    assert float(clipping.laplace_clip(1.0, 0)) == pytest.approx(1.0499, abs=5e-5)


@every_precision
def test_gauss_clip_is_the_root_of_the_condition_at_any_width(x64):
    bits = np.array([1.0, 1.01, 1.5, 2.58496, 3.3, 5.3, 7.9, 11.7, 14.2, 16.0])

    def slope(u, m):
        pdf = np.exp(-u * u / 2) * math.sqrt(2 / math.pi)
        return u * special.erfc(u / 2**0.5) + u / (3 * 4**m) - pdf

    roots = [optimize.brentq(slope, 0.1, 9.0, (m,), xtol=1e-15, rtol=1e-15) for m in bits]
    with jax.enable_x64(x64):
        clips = clipping.gauss_clip(jnp.full(10, 1.7), jnp.asarray(bits, float))
    rtol = SINGLE * 2.0**-29 if x64 else SINGLE
    np.testing.assert_allclose(clips, 1.7 * np.array(roots), rtol=rtol)


@every_precision
def test_the_gaussian_tail_does_not_cancel(x64):
    clips = 0.625 * np.arange(16)  # the same numbers in float32

    def tail(c):
        return integrate.quad(lambda t: t * t * math.exp(-c * t - t * t / 2), 0, 60 / (c + 1))[0]

    expected = np.exp(-(clips**2) / 2) * math.sqrt(2 / math.pi) * [tail(c) for c in clips]
    found = unit_mse(("published", "gauss"), clips, 100, x64=x64)  # bits: no other error is left
    # quad's own 1.5e-8; in float32 the exponent is up to 45 at the clip, as in SINGLE.
    np.testing.assert_allclose(found, expected, rtol=1.5e-8 if x64 else 45 * 2.0**-24)


@every_density
def test_one_sided_is_signed_with_one_bit_more(density):
    family = ("published", density)
    signed, relu = unit_clips(family), unit_clips(family, one_sided=True)
    np.testing.assert_allclose(relu[:-1], signed[1:], rtol=1e-14)
    half = unit_mse(family, signed) / 2
    np.testing.assert_allclose(unit_mse(family, signed, WIDTHS - 1, True), half, rtol=1e-14)


@every_density
@every_side
def test_published_clips_are_stationary_minima(density, one_sided):
    family = ("published", density)
    clips = unit_clips(family, one_sided)
    with jax.enable_x64(True):
        bits, ones = jnp.asarray(WIDTHS, "i4"), jnp.ones(16)
        slope = jax.grad(lambda clip: MSE[family](clip, ones, bits, one_sided=one_sided).sum())
        assert np.abs(slope(jnp.asarray(clips))).max() < 1e-9
    least = unit_mse(family, clips, one_sided=one_sided)
    for factor in (0.95, 1.05):
        assert (unit_mse(family, factor * clips, one_sided=one_sided) > least).all()


@every_family
def test_clips_scale_with_the_spread_and_errors_with_its_square(family):
    spread, clip = 0.3 * 2.0 ** np.arange(-8, 8), np.linspace(0.5, 9.0, 16)
    eps = np.finfo(float).eps
    np.testing.assert_allclose(
        call(CLIP[family], spread, WIDTHS), spread * unit_clips(family), rtol=2 * eps
    )
    # Clip and spread are rounded, which e^(-u^2/2) sees 81 times as large.
    scaled = call(MSE[family], spread * clip, spread, WIDTHS)
    np.testing.assert_allclose(scaled, spread**2 * unit_mse(family, clip), rtol=100 * eps)


@every_density
@every_side
def test_grid_clips_minimise_the_exact_error_at_every_width(density, one_sided):
    clips = unit_clips(("grid", density), one_sided)
    mse = unit_mse(("grid", density), clips, one_sided=one_sided)
    for bits in (*range(1, 11), 12, 16):
        clip = clips[bits - 1]
        twin = partial(grid_mse, density, bits=bits, one_sided=one_sided)
        # The twin's sums round at 1e-16 of the variance; the error is 4e-9 of it at 16 bits.
        assert twin(clip) <= minimum(twin, clip).fun * (1 + 1e-7)
        assert mse[bits - 1] == pytest.approx(twin(clip), rel=1e-7)
    single = unit_clips(("grid", density), one_sided, x64=False)
    np.testing.assert_allclose(single, clips, rtol=SINGLE)


@every_density
@every_side
@every_precision
def test_grid_errors_are_exact_at_any_clip(density, one_sided, x64):
    """Also where all is cut off, and where one cell holds everything."""
    clips = np.geomspace(0.01, 1e6, 16).astype(np.float64 if x64 else np.float32)
    for shift in (0, 5, 11):
        bits = np.roll(WIDTHS, shift)
        found = unit_mse(("grid", density), clips, bits, one_sided, x64)
        pairs = zip(clips.astype(np.float64), bits, strict=True)
        expected = [grid_mse(density, clip, m, one_sided) for clip, m in pairs]
        # 5e-7 is what the two terms promise where cells are more than the quadrature's panels.
        np.testing.assert_allclose(found, expected, rtol=5e-7 if x64 else 5e-7 + SINGLE)


def test_the_model_is_too_optimistic_by_known_factors():
    # Half a unit of the last digit of the errors that the specification asks of samples.
    assert midpoint_mse("laplace", 5.028640, 4) == pytest.approx(0.0510, abs=5e-5)
    assert midpoint_mse("gauss", 2.559136, 4) == pytest.approx(0.01174, abs=5e-6)
    for column, density in enumerate(DENSITIES):
        clips, mse, _ = TABLES["published", density]
        for bits, ratios in ((2, ("1.40", "1.47")), (4, ("1.11", "1.12")), (8, ("1.007",) * 2)):
            ratio = midpoint_mse(density, clips[bits - 1], bits) / mse[bits - 1]
            assert f"{ratio:.{len(ratios[column]) - 2}f}" == ratios[column]


@every_density
def test_exact_clips_pay_at_few_bits_only(density):
    published = unit_mse(("grid", density), unit_clips(("published", density)))
    regret = published / unit_mse(("grid", density), unit_clips(("grid", density))) - 1
    assert (regret >= 0).all()
    assert regret[0] > 0.1
    assert 0.001 < regret[1] < 0.0175  # published: at most 1.7%, in two digits
    assert (regret[3:] < 1e-3).all()


# --- samples --------------------------------------------------------------------------------


@lru_cache
def samples(density):
    """A million, of a density twice as wide, and their weights.

    Plain samples would say nothing of 8 bits: 50 of a million are in the tail that matters.
    """
    rng = RNG(0)
    if density == "laplace":
        x = 2 * rng.laplace(size=1_000_000).astype(np.float32)
        return jnp.asarray(x), 2 * np.exp(-0.5 * np.abs(x.astype(np.float64)))
    x = 2 * rng.normal(size=1_000_000).astype(np.float32)
    return jnp.asarray(x), 2 * np.exp(-0.375 * x.astype(np.float64) ** 2)


def squared_errors(x, step, qmin, qmax, zero_point=0.0):
    """Of the library's own quantizer."""
    grid = quantizer.make_qparams([step], qmin=qmin, qmax=qmax, zero_point=zero_point)
    error = np.asarray(quantizer.fake_quant(x, grid), np.float64) - np.asarray(x, np.float64)
    return error**2


@every_density
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_million_samples_on_the_librarys_grids_have_the_exact_error(density, bits):
    x, weights = samples(density)
    half = 2 ** (bits - 1)
    paper = unit_clips(("published", density))[bits - 1]
    signed, relu = (unit_clips(("grid", density), side)[bits - 1] for side in (False, True))
    step, expected = 2 * signed / (2 * half - 1), grid_mse(density, signed, bits, False)
    cases = [
        (x, (2 * paper / 2**bits, -half, half - 1, -0.5), midpoint_mse(density, paper, bits)),
        (x, (step, -half, half - 1), expected),
        (x, (step, 1 - half, half), expected),
        (
            jax.nn.relu(x),
            (relu / (2 * half - 1), 0, 2 * half - 1),
            grid_mse(density, relu, bits, True),
        ),
    ]
    for values, grid, expected in cases:
        terms = weights * squared_errors(values, *grid)
        deviation = terms.std() / 1000  # of the mean
        assert deviation < 0.005 * expected  # or the next line would say little
        assert terms.mean() == pytest.approx(expected, abs=4 * deviation)


@every_density
def test_clipping_beats_the_full_range_by_the_published_factors(density):
    """The factors are of one draw of 10^5 samples; its range must have been a likely one."""
    gains = {"laplace": (13.7, 5.9, 3.8, 1.27), "gauss": (4.0, 2.9, 1.95, 1.32)}[density]
    quantiles = np.log([0.001, 0.999]) / 1e5  # of the largest of as many samples
    tail = -np.expm1(quantiles)
    ranges = -np.log(tail) if density == "laplace" else math.sqrt(2) * special.erfcinv(tail)
    draw = RNG(2).laplace(size=10**5) if density == "laplace" else RNG(2).normal(size=10**5)
    draw = jnp.asarray(draw, "f4")
    full = float(jnp.abs(draw).max())
    assert ranges[0] < full < ranges[1]
    for bits, gain in zip((2, 3, 4, 8), gains, strict=True):
        clip = unit_clips(("published", density))[bits - 1]
        low, high = (midpoint_mse(density, c, bits) for c in ranges)
        assert low < gain * midpoint_mse(density, clip, bits) < high
        codes = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, -0.5)
        clipped, whole = (squared_errors(draw, 2 * c / 2**bits, *codes) for c in (clip, full))
        assert clipped.mean() < whole.mean()


# --- bits of channels -----------------------------------------------------------------------

SPREADS = RNG(3).lognormal(sigma=0.8, size=64)


def noise(alpha, bits):
    """Relative to 4 bits everywhere."""
    return (alpha**2 * 4.0 ** -np.asarray(bits, np.float64)).mean() / (alpha**2 / 256).mean()


def slow_published(alpha, bits, max_bits):
    target = bits
    for _ in range(10):
        bins = len(alpha) * 2**target * alpha ** (2 / 3) / (alpha ** (2 / 3)).sum()
        widths = np.clip(np.round(np.log2(bins)), 0, max_bits)
        if abs(bits - widths.mean()) <= 0.01:
            break
        target += (bits - widths.mean()) / 2
    return widths


def slow_greedy(alpha, bits, max_bits):
    widths = np.zeros(len(alpha), int)
    for _ in range(min(round(len(alpha) * bits), len(alpha) * max_bits)):
        priority = np.where(widths < max_bits, alpha**2 * 4.0**-widths, -1.0)
        widths[priority.argmax()] += 1
    return widths


@pytest.mark.parametrize("bits", [2.0, 5.3])
def test_bins_meet_the_budget_and_the_noise_is_the_ratio_of_means(bits):
    with jax.enable_x64(True):
        bins = np.asarray(clipping.allocate_bins(jnp.asarray(SPREADS), bits))
    assert bins.sum() == pytest.approx(64 * 2**bits, rel=1e-14)
    ratio = (SPREADS ** (2 / 3)).mean() ** 3 / (SPREADS**2).mean()
    measured = (SPREADS**2 / bins**2).mean() / (SPREADS**2 / 4**bits).mean()
    assert measured == pytest.approx(ratio, rel=1e-12)
    assert measured < 1
    rng = RNG(4)
    for _ in range(10):  # no other split of the same bins is better
        other = bins * np.exp(0.1 * rng.normal(size=64))
        other *= bins.sum() / other.sum()
        assert (SPREADS**2 / other**2).sum() > (SPREADS**2 / bins**2).sum()


@pytest.mark.parametrize("max_bits", [8, 5])
@pytest.mark.parametrize("bits", [0.0, 1.0, 3.3, 5.0])
def test_rounded_bits_are_those_of_the_authors_loop(bits, max_bits):
    with jax.enable_x64(True):
        found = clipping.published_bits(jnp.asarray(SPREADS), bits, max_bits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, slow_published(SPREADS, bits, max_bits))


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0])
def test_rounded_bits_nearly_average_to_the_target(bits):
    for seed in range(5):
        alpha = jnp.asarray(RNG(seed).lognormal(sigma=0.8, size=64), "f4")
        found = clipping.published_bits(alpha, bits).mean()
        assert float(found) == pytest.approx(bits, abs=0.05)  # the specification's allowance


@pytest.mark.parametrize("max_bits", [8, 5])
@pytest.mark.parametrize("bits", [0.0, 0.4, 3.3, 5.0])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_greedy_bits_are_those_of_the_loop(bits, max_bits, ties):
    alpha = np.exp2(np.round(np.log2(SPREADS))) if ties else SPREADS.astype(np.float32)
    found = clipping.greedy_bits(jnp.asarray(alpha, "f4"), bits, max_bits)
    assert found.dtype == jnp.int32
    assert int(found.sum()) == round(64 * bits)
    np.testing.assert_array_equal(found, slow_greedy(alpha.astype(np.float64), bits, max_bits))


def test_rules_compare_as_published_on_log_normal_channels():
    """In the specification 0.533, 0.474 and 0.409 on one draw; the order holds on any."""
    for seed in range(5):
        alpha = RNG(seed).lognormal(sigma=0.8, size=64)
        real = np.log2(np.asarray(clipping.allocate_bins(jnp.asarray(alpha, "f4"), 4)))
        rounded = clipping.published_bits(jnp.asarray(alpha, "f4"), 4)
        greedy = clipping.greedy_bits(jnp.asarray(alpha, "f4"), 4)
        assert int(greedy.sum()) == 256
        water = 4 + np.log2(alpha) - np.log2(alpha).mean()  # real-valued optimum of the mean width
        assert real.mean() < 4
        assert noise(alpha, water) < noise(alpha, greedy) < noise(alpha, real) < 1
        same_storage = clipping.greedy_bits(jnp.asarray(alpha, "f4"), float(rounded.mean()))
        assert int(same_storage.sum()) == int(rounded.sum())
        assert noise(alpha, same_storage) <= noise(alpha, rounded)


RULES = [clipping.allocate_bins, clipping.published_bits, clipping.greedy_bits]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@every_rule
def test_permuted_channels_take_their_bits_along(rule):
    order = RNG(5).permutation(64)
    alpha = jnp.asarray(SPREADS, "f4")
    # The sum of 64 weights may come out 32 roundings off in another order.
    np.testing.assert_allclose(rule(alpha[order], 3.3), rule(alpha, 3.3)[order], rtol=2e-6)


@every_rule
@pytest.mark.parametrize("bits", [0.0, 3.0, 8.0])
def test_equal_channels_get_equal_bits(rule, bits):
    expected = 2**bits if rule is clipping.allocate_bins else bits
    # Without any spread greedy fills one channel after the other.
    for alpha in (0.7, 3e18, 0.0)[: 2 if rule is clipping.greedy_bits else 3]:
        np.testing.assert_allclose(rule(jnp.full(64, alpha), bits), expected, rtol=1e-6)
    np.testing.assert_allclose(rule(jnp.array([0.3]), bits), expected, rtol=1e-6)  # alone


def test_channels_without_spread_come_last():
    alpha = jnp.array([0.0, 1.0, 0.0, 2.0])
    assert clipping.allocate_bins(alpha, 3)[::2].tolist() == [0.0, 0.0]
    assert clipping.published_bits(alpha, 3)[::2].tolist() == [0, 0]
    assert clipping.greedy_bits(alpha, 3).tolist() == [0, 6, 0, 6]
    assert clipping.greedy_bits(alpha, 5).tolist() == [4, 8, 0, 8]
    assert clipping.greedy_bits(alpha, 8).tolist() == [8, 8, 8, 8]


# --- histogram ------------------------------------------------------------------------------


def slow_kld_clip(counts, limit, bits):
    levels, best = min(2**bits, len(counts)), (math.inf, 0)
    for step in range(64):
        kept = levels + (len(counts) - levels) * step // 63
        p, q = list(counts[:kept]), [0.0] * kept
        p[-1] += sum(counts[kept:])
        for level in range(levels):
            bins = [j for j in range(kept) if j * levels // kept == level and counts[j]]
            for j in bins:
                q[j] = sum(counts[i] for i in bins) / len(bins)
        divergence = sum(
            a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q))) if b else math.inf
            for a, b in zip(p, q, strict=True)
            if a
        )
        best = min(best, (divergence, kept))
    return limit * best[1] / len(counts)


HISTOGRAMS = {
    "laplace": np.histogram(np.abs(RNG(6).laplace(size=20_000)), 200, (0, 12.0))[0],
    "gauss": np.histogram(np.abs(RNG(7).normal(size=20_000)), 200, (0, 5.0))[0],
    "gaps": np.histogram(np.abs(RNG(8).standard_t(2, size=500)), 200, (0, 40.0))[0],
}


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_kld_clip_is_that_of_the_slow_loop(name):
    counts = HISTOGRAMS[name]
    for bits in (2, 3, 4, 7):
        with jax.enable_x64(True):
            found = float(clipping.kld_clip(jnp.asarray(counts, float), 2.5, bits))
        assert found == pytest.approx(slow_kld_clip(counts.tolist(), 2.5, bits), rel=1e-12)


def test_kld_clip_of_more_levels_than_bins_is_the_limit():
    assert float(clipping.kld_clip(jnp.asarray(HISTOGRAMS["gauss"], "f4"), 2.5, 8)) == 2.5


def test_kld_clip_is_scale_free_and_maps_over_channels():
    counts = jnp.asarray(
        np.stack([HISTOGRAMS["laplace"], HISTOGRAMS["gauss"], np.zeros(200)]), "f4"
    )
    limits = jnp.array([12.0, 5.0, 0.0])
    mapped = jax.jit(jax.vmap(lambda *row: clipping.kld_clip(*row, 4)))(counts, limits)
    for row in range(2):
        alone = clipping.kld_clip(7.0 * counts[row], float(limits[row]), 4)
        np.testing.assert_allclose(mapped[row], alone, rtol=1e-6)
    assert mapped[2] == 0.0


# --- promises of every function -------------------------------------------------------------

B = jnp.asarray(RNG(9).uniform(0.5, 2.0, 16), "f4")
CALLS = {
    **{f"{k}-{d}-clip": lambda bits, f=f: f(B, bits) for (k, d), f in CLIP.items()},
    **{f"{k}-{d}-mse": lambda bits, f=f: f(2.0 * B, B, bits) for (k, d), f in MSE.items()},
    "allocate_bins": lambda bits: clipping.allocate_bins(B, bits),
    "published_bits": lambda bits: clipping.published_bits(B, bits),
    "greedy_bits": lambda bits: clipping.greedy_bits(B, bits),
    "kld_clip": lambda bits: clipping.kld_clip(jnp.asarray(HISTOGRAMS["gaps"], "f4"), 2.0, bits),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_compilation_serves_all_widths_and_equals_the_plain_call(name):
    traces = []

    @jax.jit
    def jitted(bits):
        traces.append(1)
        return CALLS[name](bits)

    for bits in (1, 4, 7):
        # Inlined, the same operations may be fused otherwise: of no more error than SINGLE.
        np.testing.assert_allclose(jitted(jnp.int32(bits)), CALLS[name](bits), rtol=SINGLE)
    assert len(traces) == 1


@every_kind
def test_widths_broadcast_against_spreads_and_vmap_maps_over_both(family):
    bits = jnp.array([[2], [8]])
    for found in (
        CLIP[family](B, bits),
        jax.vmap(lambda m: jax.vmap(CLIP[family], (0, None))(B, m))(bits[:, 0]),
    ):
        expected = unit_clips(family)[[1, 7], None] * np.asarray(B)
        np.testing.assert_allclose(found, expected, rtol=SINGLE)
    found = MSE[family](jnp.full((2, 1), 3.0), B, bits)
    expected = [unit_mse(family, 3.0 / np.asarray(B), m) * B**2 for m in (2, 8)]
    np.testing.assert_allclose(found, expected, rtol=2 * SINGLE)  # clip and spread rounded, too


@every_kind
def test_arrays_of_half_precision_are_computed_in_single(family):
    b = B.astype(jnp.bfloat16)
    assert jax.eval_shape(CLIP[family], b, 4).dtype == jnp.float32
    assert jax.eval_shape(MSE[family], b, b, 4).dtype == jnp.float32
    expected = unit_clips(family)[3] * np.asarray(b, np.float64)
    np.testing.assert_allclose(CLIP[family](b, 4), expected, rtol=SINGLE)


@every_family
@every_side
def test_a_channel_without_spread_has_no_clip_and_no_error(family, one_sided):
    assert not call(CLIP[family], 0.0, WIDTHS, one_sided=one_sided, x64=False).any()
    assert not call(MSE[family], 0.0, 0.0, WIDTHS, one_sided=one_sided, x64=False).any()
    if family[0] == "grid":  # zero is a level
        assert not call(MSE[family], 5.0, 0.0, WIDTHS, one_sided=one_sided, x64=False).any()
    everything = unit_mse(family, 0.0, one_sided=one_sided, x64=False)  # a clip of zero cuts it all
    variance = (2.0 if "laplace" in family else 1.0) * (0.5 if one_sided else 1.0)
    np.testing.assert_allclose(everything, variance, rtol=SINGLE)


def test_published_clips_have_a_gradient_in_spread_and_width():
    """dW/dM = W / (1 + W) * log 4."""
    value, slopes = jax.value_and_grad(clipping.laplace_clip, (0, 1))(2.0, 3.0)
    unit = float(value) / 2
    assert float(slopes[0]) == pytest.approx(unit, rel=1e-6)
    assert float(slopes[1]) == pytest.approx(2 * unit / (1 + unit) * math.log(4), rel=1e-6)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("published-gauss-clip", (0, 17, math.nan), "number from 1 to 16, not {}; choose a width"),
        ("published-laplace-clip", (-0.5, 16.5), "number from 0 to 16, not {}; choose a width"),
        ("grid-laplace-clip", (0, 17, 4.5, math.nan), "whole number from 1 to 16, not {}; choose"),
        ("grid-gauss-clip", (0, np.float32(2.5)), "whole number from 1 to 16, not {}; choose"),
        ("allocate_bins", (-1, 20), "number from 0 to 16, not {}"),
        ("published_bits", (-1, 9), "from 0 to max_bits = 8, not {}; lower it or raise max_bits"),
        ("greedy_bits", (-1, 9), "from 0 to max_bits = 8, not {}; lower it or raise max_bits"),
        ("kld_clip", (0, 9), "whole number from 1 to 8, not {}"),
    ],
)
def test_widths_out_of_range_are_named_with_the_remedy(name, bits, message):
    for width in bits:
        with pytest.raises(ValueError, match=f"bits: must be .*{message.format(width)}"):
            CALLS[name](width)


@pytest.mark.parametrize("rule", [clipping.published_bits, clipping.greedy_bits])
@pytest.mark.parametrize("max_bits", [0, 17, 2.5])
def test_a_widest_channel_out_of_range_is_an_error(rule, max_bits):
    with pytest.raises(ValueError, match=f"max_bits: must be a whole number .*, not {max_bits}"):
        rule(B, 1, max_bits)


@every_rule
@pytest.mark.parametrize("shape", [(2, 3), (), (0,)], ids=str)
def test_spreads_of_another_shape_are_an_error(rule, shape):
    with pytest.raises(ValueError, match=r"alpha: must have one axis .*not shape \(.*jax.vmap"):
        rule(jnp.ones(shape), 2)


def test_a_histogram_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"counts: must have one axis of bins, not shape \(2, 9\)"):
        clipping.kld_clip(jnp.ones((2, 9)), 1.0, 4)
