"""LLN attention: against numbers of its authors and all pairs of tokens in the log domain."""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lnq.attention import lln

A, B = lln.PUBLISHED


def compiled(form):
    """NumPy in, NumPy out; one program for each set of options that are not arrays."""

    @partial(jax.jit, static_argnums=1)
    def run(qkv, static, arrays):
        return form(*qkv, **dict(static), **arrays)

    def call(*qkv, **options):
        static = {n: x for n, x in options.items() if isinstance(x, bool | int | str | tuple)}
        arrays = {n: x for n, x in options.items() if n not in static}
        return jax.tree.map(np.asarray, run(qkv, tuple(sorted(static.items())), arrays))

    return call


attend = compiled(lln.lln_attention)
diag = compiled(lln.diagonal_attention)
attend_diag = compiled(lln.lln_diag_attention)
scales = compiled(lln.scales)


def numbers(shape, seed, mean=0.0, spread=1.0, dtype=np.float32):
    return np.random.default_rng(seed).normal(mean, spread, shape).astype(dtype)


def inputs(n, *leading, m=None, heads=4, groups=2, d=6, e=5, seed=0, spread=1.0):
    """Queries, keys and values, none of them around 0."""
    m = n if m is None else m
    q = numbers((*leading, n, heads, d), seed, 0.3, spread)
    k = numbers((*leading, m, groups, d), seed + 1, -0.7, 1.3 * spread)
    return q, k, numbers((*leading, m, groups, e), seed + 2, 2.0)


def with_gradients(form):
    """Outputs, and the gradients of their product with a cotangent."""

    @jax.jit
    def run(qkv, cotangent, options):
        out, back = jax.vjp(lambda *qkv: form(*qkv, **options), *qkv)
        return out, back(cotangent.astype(out.dtype))

    def call(qkv, cotangent, **options):
        return jax.tree.map(np.asarray, run(tuple(qkv), cotangent, options))

    return call


N = 37
MEASURED = {
    causal: with_gradients(partial(lln.lln_attention, causal=causal)) for causal in (False, True)
}


# The oracle: NumPy, float64, all pairs, logarithms.


def pairs(q, k, v, alpha, beta, seen=True, cotangent=None):
    """Outputs, and the gradients of their product with a cotangent; seen is ``[..., n, m]``."""
    repeats = q.shape[-2] // k.shape[-2]
    one_each = (*k.shape[:-3], 1, k.shape[-2], 1)
    alpha, beta = (
        np.repeat(np.broadcast_to(np.float64(a), one_each), repeats, -2) for a in (alpha, beta)
    )
    x, y = alpha * q, beta * np.repeat(np.float64(k), repeats, -2)
    v = np.repeat(np.float64(v), repeats, -2)
    exponents = x[..., :, None, :, :] + y[..., None, :, :, :]
    log_p = np.logaddexp.reduce(exponents, -1)
    shares = np.exp(exponents - log_p[..., None])
    p = np.where(np.asarray(seen)[..., None], log_p, -1e300)
    p = np.exp(p - p.max(-2, keepdims=True, initial=-1e300)) * np.asarray(seen)[..., None]
    p /= np.maximum(p.sum(-2, keepdims=True), 1e-300)
    out = np.einsum("...nmh,...mhe->...nhe", p, v)
    if cotangent is None:
        return out
    c = np.float64(cotangent)
    of_log_p = p * (np.einsum("...nhe,...mhe->...nmh", c, v) - (c * out).sum(-1)[..., :, None, :])
    dq = alpha * np.einsum("...nmh,...nmhd->...nhd", of_log_p, shares)
    dk = beta * np.einsum("...nmh,...nmhd->...mhd", of_log_p, shares)
    dv = np.einsum("...nmh,...nhe->...mhe", p, c)
    dk, dv = (a.reshape(*k.shape[:-1], repeats, -1).sum(-2) for a in (dk, dv))
    return out, (dq, dk, dv)


def whom(n, causal=False, real=True, ids=0):
    """Which query sees which key, ``[..., n, n]``."""
    real, ids = (np.broadcast_to(a, (*np.shape(a)[:-1], n)) for a in (real, ids))
    order = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
    return order & real[..., None, :] & (ids[..., :, None] == ids[..., None, :])


def matched(s_q, s_k):
    s = np.sqrt((s_q**2 * s_k**2 - B) / (2 * A))
    return s / s_q, s / s_k


def measured(q, k):
    return matched(*(np.float64(a).std(ddof=1) for a in (q, k)))


def close(found, expected, atol=2e-5, rtol=2e-5):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol, rtol=rtol), found, expected)


# The authors' numbers: queries, keys, values of 2 heads of 4 tokens, and what becomes of them.

GOLDEN = np.array(
    """
-1.1258398 -1.1523602 -0.2505786  -0.2158633 -0.7425482  0.5627214  -0.0933482  0.6870502 -0.8383154
-0.4338788  0.8487103  0.6920092   0.2596274 -0.1739610 -0.6787462   0.0008918  0.8418941 -0.4000342
-0.3160128 -2.1152194  0.4680964   0.9382607  0.4888698 -0.5692481   1.0394620  0.3581531  0.0732460
-0.1577124  1.4436601  0.2660494   0.9199714  1.1108161  1.2898741   1.1133184  0.2822672  0.4342257
 0.1664553  0.8743818 -0.1434738  -1.4781742  2.5672328 -0.4731198  -0.8024930 -1.2951862 -0.7501815
-0.1116093  0.9318267  1.2590092   0.3355508 -1.6293260 -0.5497437  -1.3119656  0.2064163 -0.3334479
 2.0049806  0.0537369  0.6180567  -0.4798343 -0.4996815 -1.0669804  -0.4288299  0.2329183  0.7968872
-0.4128022 -0.8410649 -2.3160419   1.1149396 -0.1406714  0.8057536  -0.1848416 -0.3701473 -1.2102815
""".split(),  # noqa: SIM905
    np.float32,
).reshape(2, 4, 3, 3)

GOLDEN_OUT = {
    (lln.lln_diag_attention, False): """
 0.5031617  0.5248114 -0.1796622   0.6413839  0.4806943 -0.0755900
 0.4693850  0.5255497 -0.2263546   1.0657265  0.3068252  0.3655752
-0.7917444 -1.0733566 -0.5934955  -0.7894821 -1.1419862 -0.6682244
-0.7661711 -0.2344422 -0.5392219  -0.4690367 -0.7762209 -0.9950063""",
    (lln.lln_attention, False): """
 0.9185835  0.3557790  0.2151702   0.9683886  0.3423793  0.2589083
 0.9080924  0.3592020  0.2045311   1.0181346  0.3313831  0.2969248
-0.7942983 -1.2774024 -0.7536292  -0.7755264 -1.2467834 -0.7668649
-0.4699460 -0.5356467 -0.9607441  -0.7532318 -1.1822946 -0.7797311""",
    (lln.lln_diag_attention, True): """
-0.0933482  0.6870502 -0.8383154  -0.0614527  0.7394571 -0.6899791
 0.1474698  0.6462288 -0.5866509   1.0657265  0.3068252  0.3655752
-0.8024930 -1.2951862 -0.7501815  -0.8238384 -1.2322734 -0.7327216
-0.9950985 -0.3673315 -0.3388535  -0.4690367 -0.7762209 -0.9950063""",
    (lln.lln_attention, True): """
-0.0933482  0.6870502 -0.8383154  -0.0688230  0.7273470 -0.7242563
 0.2642620  0.6005602 -0.5160615   1.0181346  0.3313831  0.2969248
-0.8024930 -1.2951862 -0.7501815  -0.8039711 -1.2908295 -0.7489724
-0.9278007 -0.8014252 -0.5600073  -0.7532318 -1.1822946 -0.7797311""",
}


def golden_inputs():
    return np.moveaxis(GOLDEN, (2, 0), (0, 2))[:, None]  # [3, 1, 4, 2, 3]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("form", [lln.lln_attention, lln.lln_diag_attention])
def test_outputs_are_those_of_the_authors(form, causal):
    expected = np.array(GOLDEN_OUT[form, causal].split(), np.float64).reshape(2, 4, 3)
    run = {lln.lln_attention: attend, lln.lln_diag_attention: attend_diag}[form]
    found = run(*golden_inputs(), causal=causal)
    np.testing.assert_allclose(found[0], expected.swapaxes(0, 1), rtol=0, atol=1e-5)


def test_the_oracle_gives_them_too():
    q, k, v = golden_inputs()
    expected = np.array(GOLDEN_OUT[lln.lln_attention, True].split(), np.float64).reshape(2, 4, 3)
    found = pairs(q, k, v, *measured(q, k), whom(4, causal=True))
    np.testing.assert_allclose(found[0], expected.swapaxes(0, 1), rtol=0, atol=1e-6)


def test_alpha_and_beta_are_those_of_the_authors():
    q, k, _ = golden_inputs()
    alpha, beta = (a.item() for a in scales(q, k))
    assert alpha == pytest.approx(2.083616, abs=2e-6)
    assert beta == pytest.approx(2.211505, abs=2e-6)


# How steep the exponentials are.


@pytest.mark.parametrize(
    ("s_q", "s_k", "alpha", "beta"),
    [
        (1.0, 1.0, 2.1355, 2.1355),
        (0.5, 0.5, 2.3705, 2.3705),
        (1.5, 1.5, 2.8467, 2.8467),
        (2.0, 2.0, 3.7097, 3.7097),
        (3.0, 3.0, 5.5159, 5.5159),
        (0.1, 0.1, 10.93, 10.93),
        (0.5, 2.0, 4.271, 1.0677),
    ],
)
def test_factors_are_the_published_ones(s_q, s_k, alpha, beta):
    assert list(map(float, lln.moment_match(s_q, s_k))) == pytest.approx([alpha, beta], rel=1e-4)


def test_factors_give_the_variance_that_softmax_has():
    s_q, s_k = np.float32(np.meshgrid([0.2, 1.0, 2.5], [0.3, 1.7]))
    alpha, beta = lln.moment_match(s_q, s_k, 0.2, -0.3)
    close(alpha * s_q, beta * s_k)
    close(0.2 * ((alpha * s_q) ** 2 + (beta * s_k) ** 2) - 0.3, (s_q * s_k) ** 2)


def test_the_factor_of_what_does_not_vary_is_1():
    alpha, beta = lln.moment_match(np.float32([0.0, 0.5, 0.0]), np.float32([0.5, 0.0, 0.0]))
    steep = np.sqrt(-B / (2 * A)) / 0.5
    close((alpha, beta), (np.array([1.0, steep, 1.0]), np.array([steep, 1.0, 1.0])))


def test_constants_of_a_size_between_two_lie_between_theirs():
    for size, fitted in lln.FITTED.items():
        assert lln.constants(size) == pytest.approx(fitted, rel=1e-12)
    share = np.log(48 / 32) / np.log(64 / 32)
    between = [
        (1 - share) * x + share * y for x, y in zip(lln.FITTED[32], lln.FITTED[64], strict=True)
    ]
    assert lln.constants(48) == pytest.approx(between, rel=1e-12)


def test_constants_beyond_the_table_are_those_at_its_ends():
    assert lln.constants(8) == pytest.approx(lln.FITTED[16])
    assert lln.constants(256) == pytest.approx(lln.FITTED[128])


def deviations(x, mask, groups, stats):
    """One set of numbers after another."""
    x = np.float64(x).reshape(*x.shape[:-2], groups, -1)
    if stats == "global":
        return x[mask].std(ddof=1).reshape((1,) * x.ndim)
    if stats == "head":
        s = [x[mask][:, g].std(ddof=1) for g in range(groups)]
        return np.reshape(s, (*(1,) * (x.ndim - 2), groups, 1))
    s = np.zeros((*x.shape[:-3], 1, groups, 1))
    for *i, _, g, _ in np.ndindex(s.shape):
        s[(*i, 0, g, 0)] = x[tuple(i)][mask[tuple(i)]][:, g].std(ddof=1)
    return s


@pytest.mark.parametrize("stats", ["global", "head", "example"])
def test_statistics_are_unbiased_deviations_of_real_tokens(stats):
    q, k, _ = inputs(11, 3, m=7)
    q, k = q * np.float32([1, 2, 4, 8])[:, None], k * np.float32([[[1]], [[2]], [[3]]])[..., None]
    query_mask, key_mask = (np.random.default_rng(3).random((3, n)) < 0.7 for n in (11, 7))
    s_q, s_k = deviations(q, query_mask, 2, stats), deviations(k, key_mask, 2, stats)
    found = scales(q, k, stats=stats, query_mask=query_mask, key_mask=key_mask)
    expected = matched(s_q, s_k)
    sizes = {"global": (1, 1, 1, 1), "head": (1, 1, 2, 1), "example": (3, 1, 2, 1)}
    assert found[0].shape == found[1].shape == sizes[stats]
    close(found, expected)


def test_statistics_of_one_number_or_of_none_give_factors_of_1():
    q, k, _ = inputs(2, heads=1, groups=1, d=1)
    for mask in (np.array([True, False]), np.array([False, False])):
        assert [x.item() for x in scales(q, k, query_mask=mask, key_mask=mask)] == [1.0, 1.0]


def test_attention_measures_as_it_is_told():
    q, k, v = inputs(N, 2)
    k *= np.float32([1, 2])[:, None]
    factors = scales(q, k, stats="head", constants=(0.2, -0.3))
    found = attend(q, k, v, stats="head", constants=(0.2, -0.3))
    close(found, pairs(q, k, v, *factors))
    assert np.abs(found - attend(q, k, v)).max() > 1e-2


def test_no_gradient_goes_through_statistics():
    q, k, v = inputs(N)
    alpha, beta = scales(q, k)
    c = numbers((N, 4, 5), 7)
    found = MEASURED[False]((q, k, v), c)
    close(found, pairs(q, k, v, alpha, beta, cotangent=c))

    def through(q):
        s_q, s_k = (jnp.std(x, ddof=1) for x in (q, k))
        alpha, beta = lln.moment_match(s_q, s_k)
        return jnp.vdot(c, lln.lln_attention(q, k, v, alpha=alpha, beta=beta))

    assert np.abs(jax.jit(jax.grad(through))(q) - found[1][0]).max() > 1e-2


# One attention, in every order of summing.

CUTS = [slice(0, 8), slice(8, 9), slice(9, N)]


def whole(causal=False, chunk_size=5, packed=True):
    def form(q, k, v, *, segment_ids, **options):
        options["segment_ids"] = segment_ids if packed else None
        return lln.lln_attention(q, k, v, causal=causal, chunk_size=chunk_size, **options)

    return form


def written_out(causal):
    def form(q, k, v, *, alpha, beta, key_mask, segment_ids):
        seen = key_mask[:, None, :] & (segment_ids[:, :, None] == segment_ids[:, None, :])
        seen &= np.tri(N, dtype=bool)[None] | (not causal)
        return lln.quadratic_attention(q, k, v, mask=seen[:, None], alpha=alpha, beta=beta)

    return form


def shards(q, k, v, *, alpha, beta, key_mask, segment_ids):
    first, second, third = (
        lln.summarize(k[:, i], v[:, i], beta=beta, key_mask=key_mask[:, i]) for i in CUTS
    )
    return lln.read(lln.merge(third, lln.merge(first, second)), q, alpha=alpha)


def parts(q, k, v, *, key_mask, segment_ids, **factors):
    state, outs = lln.init_state((2,), 2, 6, 5), []
    for i in (slice(0, 9), slice(9, N)):
        masks = {"key_mask": key_mask[:, i], "segment_ids": segment_ids[:, i]}
        out, state = lln.extend(state, q[:, i], k[:, i], v[:, i], chunk_size=5, **factors, **masks)
        outs.append(out)
    return jnp.concatenate(outs, 1)


def steps(q, k, v, *, alpha, beta, key_mask, segment_ids):
    def turn(state, token):
        out, state = lln.step(state, *token, alpha=alpha, beta=beta)
        return state, out

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v)]
    return jnp.moveaxis(lax.scan(turn, lln.init_state((2,), 2, 6, 5), tokens)[1], 0, 1)


ids = np.stack([np.repeat([7, 3, 9, 1, 0], [1, 2, 13, 1, 20]), np.repeat([4, 2], [10, 27])])
keep = np.random.default_rng(5).random((2, N)) < 0.7
keep[:, 0] = [False, True]
MASKS = {
    "all": (np.ones((2, N), bool), 0 * ids),
    "padded": (keep, 0 * ids),
    "hidden": (keep & [[False], [True]], 0 * ids),
    "packed": (np.ones((2, N), bool), ids),
    "packed-padded": (keep, ids),
}

FORMS = {
    "written-out": (with_gradients(written_out(False)), False, list(MASKS)),
    "linear": (with_gradients(whole(packed=False)), False, ["all", "padded", "hidden"]),
    "shards": (with_gradients(shards), False, ["all", "padded", "hidden"]),
    "both-ends": (with_gradients(whole()), False, list(MASKS)),
    "causal-written-out": (with_gradients(written_out(True)), True, list(MASKS)),
    "chunks-of-5": (with_gradients(whole(True, 5)), True, list(MASKS)),
    "chunks-of-37": (with_gradients(whole(True, 100)), True, list(MASKS)),
    "parts": (with_gradients(parts), True, list(MASKS)),
    "steps": (with_gradients(steps), True, ["all"]),
}


def given(form, qkv, cotangent, alpha=1.7, beta=2.1, mask="all", **masks):
    key_mask, segment_ids = MASKS[mask]
    alpha, beta = (np.broadcast_to(np.float32(a), (2, 1, 2, 1)) for a in (alpha, beta))
    masks = {"key_mask": key_mask, "segment_ids": segment_ids, **masks}
    return FORMS[form][0](qkv, cotangent, alpha=alpha, beta=beta, **masks)


@pytest.mark.parametrize(
    ("form", "mask"), [(form, mask) for form, (*_, masks) in FORMS.items() for mask in masks]
)
def test_outputs_and_gradients_are_those_of_all_pairs(form, mask):
    q, k, v = inputs(N, 2)
    alpha = np.array([[1.7, 2.3], [0.9, 1.2]])[:, None, :, None]
    beta = np.array([[2.1, 1.2], [1.6, 0.8]])[:, None, :, None]
    c = numbers((2, N, 4, 5), 9)
    found = given(form, (q, k, v), c, alpha, beta, mask)
    seen = whom(N, FORMS[form][1], *MASKS[mask])
    close(found, pairs(q, k, v, alpha, beta, seen, c), atol=5e-5)
    assert not np.any(found[0][~seen.any(-1)])


@pytest.mark.parametrize("form", ["both-ends", "chunks-of-5"])
def test_packed_segments_are_as_each_by_itself(form):
    q, k, v = inputs(N, 2)
    found, _ = given(form, (q, k, v), numbers((2, N, 4, 5), 9), mask="packed")
    for i, bounds in enumerate([[0, 1, 3, 16, 17, N], [0, 10, N]]):
        for start, stop in itertools.pairwise(bounds):
            alone = [x[i, start:stop] for x in (q, k, v)]
            expected = pairs(*alone, 1.7, 2.1, whom(stop - start, FORMS[form][1]))
            close(found[i, start:stop], expected)


def test_a_prompt_of_packed_segments_hands_over_the_last():
    q, k, v = inputs(N, 2)
    factors = {"alpha": 1.7, "beta": 2.1}
    start = lln.init_state((2,), 2, 6, 5)
    _, state = jax.jit(lln.extend)(start, q, k, v, **factors, segment_ids=ids)
    new = inputs(1, 2, seed=20)
    out, _ = jax.jit(lln.step)(state, *(x[:, 0] for x in new), **factors)
    for i, begin in enumerate([17, 10]):
        keys, values = (
            np.concatenate([x[i, begin:], y[i]]) for x, y in zip((k, v), new[1:], strict=True)
        )
        close(out[i], pairs(new[0][i], keys, values, **factors)[0])


@pytest.mark.parametrize(
    ("leading", "causal"), [((), False), ((), True), ((2, 3), False), ((2, 1, 3), True)]
)
def test_any_leading_axes(leading, causal):
    q, k, v = inputs(11, *leading)
    q *= np.exp(numbers((*leading, 1, 1, 1), 7))
    key_mask = np.random.default_rng(3).random((*leading, 11)) < 0.7
    found = attend(q, k, v, causal=causal, key_mask=key_mask, stats="example", chunk_size=1)
    factors = matched(*(deviations(x, key_mask, 2, "example") for x in (q, k)))
    assert found.shape == (*leading, 11, 4, 5)
    close(found, pairs(q, k, v, *factors, whom(11, causal, key_mask)), atol=1e-4)


def test_mapping_over_examples_is_measuring_each():
    qkv = inputs(N, 2)
    qkv[0][1] *= 3.0
    mapped = jax.vmap(partial(lln.lln_attention, stats="head"))
    close(jax.jit(mapped)(*qkv), attend(*qkv, stats="example"))


def test_queries_may_be_others_than_keys():
    n = 11
    q, k, v = inputs(n, 2, m=N)
    found = attend(q, k, v, key_mask=keep)
    factors = matched(np.float64(q).std(ddof=1), np.float64(k)[keep].std(ddof=1))
    close(found, pairs(q, k, v, *factors, keep[:, None, :]))
    real = np.arange(n) % 3 != 1
    found = attend(q, k, v, query_mask=np.stack([real, real]))
    close(found, pairs(q, k, v, *measured(q[:, real], k)))


def test_heads_that_share_keys_are_as_with_copies_of_them():
    q, k, v = inputs(11, 2)
    copies = [np.repeat(x, 2, -2) for x in (k, v)]
    run = partial(attend_diag, alpha=1.7, beta=2.1, block_size=4)
    close(run(q, k, v), run(q, *copies))
    assert np.abs(run(q, k, v) - run(q, k, v[:, :, ::-1])).max() > 0.1


# What does not change.


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_outputs_are_means_of_values(causal):
    q, k, v = inputs(N, 2, spread=2.0)
    np.testing.assert_allclose(attend(q, k, np.ones_like(v), causal=causal), 1.0, rtol=1e-6)
    out = attend(q, k, v, causal=causal).reshape(2, N, 2, 2, 5)
    least, most = np.minimum.accumulate(v, 1), np.maximum.accumulate(v, 1)
    if not causal:
        least, most = least[:, -1:], most[:, -1:]
    assert (out >= least[..., None, :] - 1e-5).all()
    assert (out <= most[..., None, :] + 1e-5).all()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_an_offset_of_all_keys_of_a_head_cancels(causal):
    q, k, v = inputs(N, 2)
    run = partial(attend, causal=causal, alpha=1.7, beta=2.1)
    close(run(q, k + np.float32([3.0, -5.0])[:, None], v), run(q, k, v), atol=1e-4)
    run = partial(attend, causal=causal)
    close(run(q, k - np.float32(5.0), v), run(q, k, v), atol=1e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_what_queries_gain_in_size_keys_may_lose(causal):
    q, k, v = inputs(N, 2)
    run = partial(attend, causal=causal)
    close(run(np.float32(3.0) * q, k / np.float32(3.0), v), run(q, k, v), atol=1e-4)
    assert np.abs(run(np.float32(3.0) * q, k, v) - run(q, k, v)).max() > 1e-2


def test_offsets_of_a_feature_of_keys_do_not():
    q, k, v = inputs(N, 2)
    moved = k + np.float32([1.0, 0, 0, 0, 0, 0])
    run = partial(attend, alpha=1.7, beta=2.1)
    assert np.abs(run(q, moved, v) - run(q, k, v)).max() > 1e-2


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_offsets_of_a_query_cancel_where_its_factor_is_given(causal):
    q, k, v = inputs(N, 2)
    moved = q + numbers((2, N, 4, 1), 5, 0.0, 10.0)
    run = partial(attend, causal=causal)
    close(run(moved, k, v, alpha=1.7, beta=2.1), run(q, k, v, alpha=1.7, beta=2.1), atol=1e-4)
    assert np.abs(run(moved, k, v) - run(q, k, v)).max() > 1e-2


def test_the_order_of_keys_is_nothing_and_of_queries_that_of_outputs():
    q, k, v = inputs(N, 2)
    order = np.random.default_rng(1).permutation(N)
    expected = attend(q, k, v)
    close(attend(q, k[:, order], v[:, order]), expected)
    close(attend(q[:, order], k, v), expected[:, order])


def test_the_first_causal_output_is_the_first_value_and_the_last_that_of_all():
    q, k, v = inputs(N, 2)
    causal, full = (attend(q, k, v, causal=c) for c in (True, False))
    close(causal[:, 0], np.repeat(v[:, 0], 2, 1), atol=1e-6)
    close(causal[:, -1], full[:, -1])
    assert np.abs(causal[:, -2] - full[:, -2]).max() > 1e-3


CAUSAL = {
    "lln": partial(given, "chunks-of-5"),
    "one-chunk": partial(given, "chunks-of-37"),
    "diag": with_gradients(partial(lln.diagonal_attention, block_size=5, causal=True)),
}


@pytest.mark.parametrize("form", CAUSAL)
def test_nothing_later_is_seen(form):
    run = CAUSAL[form]
    early, late = inputs(N, 2), inputs(N, 2, seed=30, spread=9.0)
    for now in (1, 13, N - 1):
        mixed = [
            np.concatenate([a[:, :now], b[:, now:]], 1) for a, b in zip(early, late, strict=True)
        ]
        c = numbers((2, N, 4, 5), 9) * (np.arange(N) < now)[:, None, None]
        (out, gradients), (other, others) = run(early, c), run(mixed, c)
        np.testing.assert_array_equal(out[:, :now], other[:, :now])
        assert (out[:, now:] != other[:, now:]).any()
        for a, b in zip(gradients, others, strict=True):
            np.testing.assert_array_equal(a[:, :now], b[:, :now])
            assert not np.any(b[:, now:])


# Masks.


@pytest.mark.parametrize(
    ("stats", "causal"), [("global", False), ("head", False), ("example", True)]
)
def test_a_masked_token_is_as_one_that_was_never_there(stats, causal):
    qkv = inputs(N, 2)
    mask = np.stack([np.random.default_rng(i).permutation(N) >= 8 for i in range(2)])
    kept = [x[mask].reshape(2, N - 8, *x.shape[2:]) for x in qkv]
    found = attend(*qkv, key_mask=mask, stats=stats, causal=causal)[mask]
    close(found, attend(*kept, stats=stats, causal=causal).reshape(found.shape))


MASKED = {
    "measured": MEASURED[False],
    "causal": partial(given, "chunks-of-5"),
    "diag": with_gradients(partial(lln.diagonal_attention, block_size=5)),
}


@pytest.mark.parametrize("content", [1e4, 1e30, -np.inf, np.inf, np.nan], ids=str)
@pytest.mark.parametrize("form", MASKED)
def test_what_masked_keys_hold_is_nothing(form, content):
    q, k, v = inputs(N, 2)
    gone = ~keep[..., None, None]
    c = numbers((2, N, 4, 5), 9) * ~gone
    expected, gradients = MASKED[form]((q, k, v), c, key_mask=keep)
    queries = np.where(gone, np.float32(1e4), q)  # these have outputs, though nobody wants them
    filled = (np.where(gone, np.float32(content), x) for x in (k, v))
    out, others = MASKED[form]((queries, *filled), c, key_mask=keep)
    np.testing.assert_array_equal(out[keep], expected[keep])
    for a, b in zip(others, gradients, strict=True):
        np.testing.assert_array_equal(a[keep], b[keep])
        assert not np.any(a[~keep])


@pytest.mark.parametrize("form", MASKED)
def test_without_a_key_outputs_are_0_and_so_are_gradients_statistics_included(form):
    out, gradients = MASKED[form](inputs(N, 2), numbers((2, N, 4, 5), 9), key_mask=keep & False)
    assert not np.any(out)
    assert not any(map(np.any, gradients))


# Blocks.


@with_gradients
def softmax(q, k, v, *, seen):
    return jax.nn.dot_product_attention(q, k, v, mask=seen)


@pytest.mark.parametrize("n", [3, 15, N])
def test_blocks_are_softmax_attention_that_sees_only_them(n):
    rng = np.random.default_rng(n)
    qkv = inputs(n, 2, e=6)
    c = numbers((2, n, 4, 6), 9)
    block = np.arange(n) // 5
    everything = np.ones((2, n), bool), np.zeros((2, n), np.int32)
    some = rng.random((2, n)) < 0.7, rng.integers(0, 2, (2, n))
    for causal in (False, True):
        run = with_gradients(partial(lln.diagonal_attention, block_size=5, causal=causal))
        for masks in (everything, some):
            seen = whom(n, causal, *masks) & whom(n, ids=block)
            any_key = seen.any(-1)[..., None, None]
            out, gradients = run(qkv, c, key_mask=masks[0], segment_ids=masks[1])
            expected, others = softmax(qkv, c * any_key, seen=seen[:, None])
            close(out, expected * any_key)
            close(gradients, others)


def test_a_block_has_as_many_tokens_as_a_key_has_features():
    qkv = inputs(N, 2)
    np.testing.assert_array_equal(diag(*qkv), diag(*qkv, block_size=6))
    assert np.any(diag(*qkv) != diag(*qkv, block_size=5))


def test_blocks_written_out_are_those_of_any_mask():
    q, k, v = inputs(N, 2)
    seen = whom(N, True, keep, ids)
    found = jax.jit(partial(lln.quadratic_diagonal_attention, block_size=5))(
        q, k, v, mask=seen[:, None]
    )
    close(found, diag(q, k, v, key_mask=keep, segment_ids=ids, causal=True, block_size=5))


@pytest.mark.parametrize("cuts", [(0, 37), (0, 5, 6, 10, 11, 18, 37)], ids=str)
def test_blocks_may_be_filled_a_few_tokens_at_a_time(cuts):
    q, k, v = inputs(N, 2)
    run, outs = jax.jit(lln.extend_diagonal), []
    block = lln.init_block((2,), 2, 6, 5, block_size=5)
    for start, stop in itertools.pairwise(cuts):
        out, block = run(block, *(x[:, start:stop] for x in (q, k, v)))
        outs.append(np.asarray(out))
    assert int(block.length) == N
    close(np.concatenate(outs, 1), diag(q, k, v, causal=True, block_size=5))


def test_the_newest_token_finds_its_block_in_a_cache():
    q, k, v = inputs(N, 2)
    expected = diag(q, k, v, causal=True, block_size=5)
    run = compiled(partial(lln.last_block_attention, block_size=5))
    for now in (0, 4, 5, 22, N - 1):
        real = np.stack([np.arange(N) <= now, np.arange(N) <= N // 2])
        query = np.stack([q[0, now], q[1, N // 2]])[:, None]
        found = run(query, k, v, key_mask=real)
        close(found[:, 0], np.stack([expected[0, now], expected[1, N // 2]]))


def test_halves_of_both_are_added():
    q, k, v = inputs(N, 2)
    masks = {"key_mask": keep, "segment_ids": ids}
    far, _ = given("chunks-of-5", (q, k, v), numbers((2, N, 4, 5), 9), **masks)
    near = diag(q, k, v, **masks, causal=True, block_size=5)
    options = {"alpha": 1.7, "beta": 2.1, "chunk_size": 5}
    found = attend_diag(q, k, v, **masks, causal=True, block_size=5, **options)
    close(found, 0.5 * (far + near), atol=1e-5)


def test_each_head_may_weigh_them_in_its_own_way():
    q, k, v = inputs(N, 2)
    far, near = attend(q, k, v), diag(q, k, v, block_size=5)
    r, p, half = numbers((4, 5), 1), numbers((4, 5), 2), np.full((4, 5), 0.5, np.float32)
    for weights in ((r, p), (r, 1.0 - r), (half, half)):
        run = jax.jit(lambda *args: lln.combine(*args[:2], args[2:]))
        close(run(far, near, *weights), weights[0] * far + weights[1] * near, atol=1e-6)
    found = jax.jit(partial(lln.lln_diag_attention, block_size=5))(q, k, v, weights=(r, p))
    close(found, r * far + p * near)
    close(lln.combine(far, near, (0.0, 2.0)), 2.0 * near)


# Where numbers are hard.

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize(
    ("causal", "dtype"),
    [(False, dtype) for dtype in DTYPES] + [(True, jnp.float32), (True, jnp.bfloat16)],
)
def test_long_steep_sequences_are_exact_and_have_gradients(causal, dtype):
    n = 4096
    rounded = [numbers((n, 1, 64), seed, 0.0, 2.0).astype(dtype) for seed in range(3)]
    run = with_gradients(partial(lln.lln_attention, causal=causal))
    out, gradients = run(rounded, numbers((n, 1, 64), 9))
    for x in (out, *gradients):
        assert x.dtype == dtype
        assert np.isfinite(np.float32(x)).all()
    q, k, v = (x.astype(np.float32) for x in rounded)
    keys, queries = (slice(64), slice(64)) if causal else (slice(n), slice(100, 102))
    seen = np.tri(64, dtype=bool) if causal else True
    expected = pairs(q[queries], k[keys], v[keys], *measured(q, k), seen)
    eps = float(jnp.finfo(dtype).eps)
    close(np.float32(out[queries]), expected, atol=1e-4 + eps, rtol=1e-4 + eps)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_is_only_that_of_numbers_coming_in_and_going_out(dtype):
    halves = [x.astype(dtype) for x in inputs(N, 2)]
    wide = [x.astype(np.float32) for x in halves]
    for run in (partial(attend, causal=True), diag):
        out = run(*halves)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, run(*wide).astype(dtype))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_one_far_key_late_in_a_chunk_hides_nothing_before_it(causal):
    q, k, v = inputs(N, 2, spread=6.0)
    k[:, 28] += 200.0
    c = numbers((2, N, 4, 5), 9)
    found = given("chunks-of-5" if causal else "linear", (q, k, v), c, 2.0, 1.5)
    expected = pairs(q, k, v, 2.0, 1.5, whom(N, causal), c)
    close(found, expected, atol=5e-4, rtol=5e-4)
    far = np.repeat(v[:, 28], 2, 1)
    np.testing.assert_allclose(expected[0][:, -1], far, atol=1e-6)  # it is all there is
    if causal:
        assert np.abs(expected[0][:, 27] - far).max() > 0.1


def outliers(name, q, k):
    """Keys that outdo others of their chunk by e^100 and more, where these matter to somebody."""
    if name == "each-more":  # for each query another key
        k += 20.0 * np.arange(N, dtype=np.float32)[:, None, None]
    elif name == "each-less":
        k -= 20.0 * np.arange(N, dtype=np.float32)[:, None, None]
    elif name == "by-feature":  # for each feature another token
        k += 60.0 * numbers((N, 1, 6), 11)
        q += 30.0 * numbers((N, 1, 6), 12)
    elif name == "before-borders":  # of segments, which begin behind these
        k[:, [0, 2, 9, 15, 16]] += 100.0
    elif name == "behind-borders":
        k[:, [1, 3, 10, 16, 17]] += 100.0
    elif name == "masked":
        k[~keep] += 500.0
    return q, k


@pytest.mark.parametrize("form", ["chunks-of-5", "chunks-of-37", "both-ends"])
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("each-more", "all"),
        ("each-less", "padded"),
        ("by-feature", "all"),
        ("by-feature", "packed-padded"),
        ("before-borders", "packed"),
        ("behind-borders", "packed"),
        ("masked", "packed-padded"),
    ],
)
def test_outliers_anywhere_in_a_chunk_leave_every_row_exact(form, name, mask):
    q, k, v = inputs(N, 2, spread=2.0)
    q, k = outliers(name, q, k)
    c = numbers((2, N, 4, 5), 9)
    found = given(form, (q, k, v), c, mask=mask)
    seen = whom(N, FORMS[form][1], *MASKS[mask])
    close(found, pairs(q, k, v, 1.7, 2.1, seen, c), atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 33, 64])
def test_chunks_of_any_size_give_the_same(chunk_size):
    q, k, v = inputs(150, spread=6.0)
    factors = {"alpha": 0.9, "beta": 1.1}
    found = attend(q, k, v, causal=True, chunk_size=chunk_size, **factors)
    close(found, pairs(q, k, v, **factors, seen=whom(150, True)), atol=2e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("flat", ["q", "k", "qk"])
def test_what_does_not_vary_is_no_difficulty(flat, causal):
    q, k, v = inputs(N)
    steep = np.sqrt(-B / (2 * A))
    alpha, beta = (steep / float(x.std(ddof=1)) for x in (q, k))
    if "q" in flat:
        q, alpha = np.full_like(q, 0.1), 1.0
    if "k" in flat:
        k, beta = np.full_like(k, -3.3), 1.0
    out, gradients = MEASURED[causal]((q, k, v), numbers((N, 4, 5), 9))
    close(out, pairs(q, k, v, alpha, beta, whom(N, causal)))
    assert all(np.isfinite(x).all() for x in gradients)
    if "k" in flat:
        count = np.arange(1, N + 1)[:, None, None] if causal else N
        mean = (v.cumsum(0) if causal else v.sum(0, keepdims=True)) / count
        close(out, np.broadcast_to(np.repeat(mean, 2, 1), out.shape))


ALL = {
    "lln": lln.lln_attention,
    "causal": partial(lln.lln_attention, causal=True),
    "packed": lambda q, k, v: lln.lln_attention(
        q, k, v, segment_ids=jnp.zeros(q.shape[:-2], jnp.int32)
    ),
    "diag": lln.diagonal_attention,
    "lln-diag": lln.lln_diag_attention,
    "written-out": partial(lln.quadratic_attention, alpha=1.7, beta=2.1),
    "extend": lambda q, k, v: lln.extend(
        lln.init_state(k.shape[:-3], 2, 6, 5), q, k, v, alpha=1.7, beta=2.1
    )[0],
    "extend-diag": lambda q, k, v: lln.extend_diagonal(
        lln.init_block(k.shape[:-3], 2, 6, 5), q, k, v
    )[0],
}


@pytest.mark.parametrize("form", ALL)
def test_one_token_gives_its_value(form):
    q, k, v = inputs(1, 2)
    close(compiled(ALL[form])(q, k, v), np.repeat(v, 2, -2), atol=1e-6)


@pytest.mark.parametrize("form", ALL)
def test_no_token_is_a_sequence(form):
    assert jax.eval_shape(ALL[form], *inputs(0, 2)).shape == (2, 0, 4, 5)


def test_without_keys_there_is_0():
    q, k, v = inputs(3, m=0)
    nothing = compiled(lln.read)(lln.init_state((), 2, 6, 5), q, alpha=1.7)
    for out in (attend(q, k, v), nothing):
        np.testing.assert_array_equal(out, np.zeros((3, 4, 5)))


@pytest.mark.parametrize("form", ALL)
def test_float32_is_as_it_is_beside_float64(form):
    with jax.enable_x64(True):
        for dtype in (np.float32, np.float64):
            out = jax.eval_shape(ALL[form], *(x.astype(dtype) for x in inputs(11, 2)))
            assert out.dtype == dtype


@pytest.mark.parametrize("form", ["lln", "extend"])
def test_float64_is_exact(form):
    with jax.enable_x64(True):
        q, k, v = (np.float64(x) for x in inputs(11, 2))
        factors = (1.7, 2.1) if form == "extend" else measured(q, k)
        found = compiled(ALL[form])(q, k, v)
        expected = pairs(q, k, v, *factors, whom(11, form == "extend"))
        close(found, expected, atol=1e-13, rtol=1e-13)


def test_steps_may_be_taken_in_either_precision():
    for x64, dtype in ((False, np.float32), (True, np.float32), (True, np.float64)):
        with jax.enable_x64(x64):
            q, k, v = (x[0].astype(dtype) for x in inputs(1))
            state = lln.init_state((), 2, 6, 5)
            out, state = jax.eval_shape(partial(lln.step, alpha=1.7, beta=2.1), state, q, k, v)
            assert out.dtype == state.peak.dtype == state.sums.dtype == dtype


# Cost.


def compiled_cost(form, n):
    """Bytes and operations; a loop counts as one turn."""
    x = jax.ShapeDtypeStruct((n, 1, 64), jnp.float32)
    program = jax.jit(form).lower(x, x, x).compile()
    memory, operations = program.memory_analysis(), program.cost_analysis()
    size = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    counts = {"flops": operations["flops"], "exponentials": operations["transcendentals"]}
    return SimpleNamespace(size=size, **counts)


@pytest.mark.parametrize("form", ["lln", "causal"])
def test_twice_the_tokens_cost_twice_as_much_also_with_gradients(form):
    grad = jax.value_and_grad(lambda *qkv: ALL[form](*qkv).sum(), (0, 1, 2))
    once, twice = (compiled_cost(grad, n) for n in (4096, 8192))
    assert twice.size < 2.3 * once.size
    assert twice.flops < 2.3 * once.flops
    assert twice.size < 40 * 4 * 8192 * 64  # and nowhere near one number a pair


def test_a_chunk_takes_exponentials_by_its_logarithm_not_by_its_length():
    def exponentials(chunk_size):  # of a token and a feature
        form = partial(lln.lln_attention, causal=True, chunk_size=chunk_size, alpha=2.0, beta=2.0)
        return compiled_cost(form, 1024).exponentials / (chunk_size * 64)  # a loop is one turn

    assert exponentials(64) < 2 * np.log2(64)
    assert exponentials(256) < exponentials(64) + 4


def test_all_pairs_cost_four_times_as_much():
    once, twice = (compiled_cost(ALL["written-out"], n) for n in (4096, 8192))
    assert twice.size > 3.5 * once.size
    assert twice.flops > 3.5 * once.flops


# Refusals.


def shaped(*shapes):
    return [np.zeros(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize("form", [lln.lln_attention, lln.diagonal_attention])
@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((9, 6), (9, 6), (9, 6)), {}, r"^q, k, v: .*\(9, 6\).* split the last axis into heads"),
        (((2, 9, 4, 6), (9, 4, 6), (9, 4, 6)), {}, r"^q, k, v: .*as many axes"),
        (((9, 4, 6), (9, 2, 6), (9, 4, 6)), {}, r"^v: \(9, 4, 6\) .*heads of k: \(9, 2, 6\)"),
        (((9, 4, 6), (9, 2, 6), (8, 2, 6)), {}, r"^v: \(8, 2, 6\) .*length"),
        (((9, 4, 6), (9, 2, 5), (9, 2, 6)), {}, r"^k: axis -1.* is 5; q has 6"),
        (((3, 9, 4, 6), (2, 9, 2, 6), (2, 9, 2, 6)), {}, r"^k: leading axes \(2,\).*\(3,\)"),
        (((9, 4, 6), (9, 3, 6), (9, 3, 6)), {}, r"^k: axis -2, 3 heads, must divide q's 4"),
        (((9, 4, 6), (8, 2, 6), (8, 2, 6)), {"causal": True}, r"^k: axis -3, length 8, .*q's 9"),
        (
            ((9, 4, 6), (8, 2, 6), (8, 2, 6)),
            {"segment_ids": np.zeros(9, np.int32)},
            r"^k: axis -3, length 8, .*segment_ids",
        ),
    ],
)
def test_axes_that_do_not_fit_are_named(form, shapes, options, message):
    with pytest.raises(ValueError, match=message):
        form(*shaped(*shapes), **options)


def test_blocks_need_as_many_queries_as_keys_and_a_token_each():
    q, k, v = inputs(9, m=8)
    for form in (lln.diagonal_attention, lln.lln_diag_attention):
        with pytest.raises(ValueError, match=r"^k: axis -3, length 8, .*blocks"):
            form(q, k, v)
        for size in (0, -3):
            with pytest.raises(ValueError, match=f"^block_size: must be at least 1, not {size}"):
                form(q[:8], k, v, block_size=size)


@pytest.mark.parametrize("given", ["alpha", "beta"])
def test_one_factor_alone_is_refused(given):
    with pytest.raises(ValueError, match=r"^alpha, beta: give both, or none"):
        lln.lln_attention(*inputs(9), **{given: 2.0})


def test_statistics_have_one_of_three_names():
    q, k, v = inputs(9)
    for form in (partial(lln.scales, q, k), partial(lln.lln_attention, q, k, v)):
        with pytest.raises(ValueError, match=r"^stats: must be one of global, .*, not 'batch'"):
            form(stats="batch")
