"""Attention in Flax: linen and NNX, attention_fn and modules, against every weight written out."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lnq.attention.linen
import lnq.attention.nnx
from lnq.attention import attention_fn, lln_diag_attention
from lnq.attention.lln import PUBLISHED

BATCH, LENGTH, FEATURES, HEADS, HEAD = 2, 13, 6, 4, 4  # blocks are of 4
FIXED = {"alpha": 1.3, "beta": 0.7}
CAUSAL = np.tri(LENGTH, dtype=bool)
VALID = np.arange(LENGTH) < np.array([[9], [13]])

worlds = pytest.mark.parametrize("world", ["linen", "nnx, grouped"])
grouped = pytest.mark.parametrize("world", ["linen, grouped", "nnx, grouped"])
both = pytest.mark.parametrize("world", ["linen", "nnx"])
diagonals = pytest.mark.parametrize("diagonal", [True, False], ids=["with blocks", "alone"])


def close(found, wanted, atol=3e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=1e-4, atol=atol)


def numbers(shape, seed, mean=0.2, spread=1.0):
    return np.random.default_rng(seed).normal(mean, spread, shape).astype(np.float32)


X = numbers((BATCH, LENGTH, FEATURES), 0)


def parameters(world="linen"):
    groups = 2 if "grouped" in world else HEADS
    kernels = {
        "query": (FEATURES, HEADS, HEAD),
        "key": (FEATURES, groups, HEAD),
        "value": (FEATURES, groups, HEAD),
        "out": (HEADS, HEAD, FEATURES),
    }
    return {
        name: {
            "kernel": numbers(shape, i, 0.0, 0.5),
            "bias": numbers(shape[2:] if name == "out" else shape[1:], i + 5, 0.1, 0.3),
        }
        for i, (name, shape) in enumerate(kernels.items(), 1)
    }


LEARNED = {"scale": ("far_weight", "near_weight"), "ratio": ("far_weight",)}


def halves(near):
    """Parameters with weights to learn, as they start."""
    return parameters() | {name: jnp.full((HEADS, HEAD), 0.5) for name in LEARNED[near]}


# Every weight written out, in float64.


def project(params, *inputs):
    inputs = inputs if len(inputs) == 3 else (*inputs, *inputs[-1:] * (3 - len(inputs)))
    return [
        np.einsum("...nf,fhd->...nhd", np.float64(x), params[name]["kernel"]) + params[name]["bias"]
        for x, name in zip(inputs, ("query", "key", "value"), strict=True)
    ]


def unproject(params, x):
    return np.einsum("...nhd,hdf->...nf", x, params["out"]["kernel"]) + params["out"]["bias"]


def matched(s_q, s_k):
    s = np.sqrt((s_q**2 * s_k**2 - PUBLISHED[1]) / (2.0 * PUBLISHED[0]))
    return {"alpha": s / s_q, "beta": s / s_k}


def measured(q, k, valid=...):
    return matched(np.std(q[valid], ddof=1), np.std(k[valid], ddof=1))


def share(p):
    total = p.sum(-1, keepdims=True)
    return np.divide(p, total, out=np.zeros_like(p), where=total > 0.0)


def attention_weights(q, k, *, alpha, beta, seen=True, block=HEAD):
    """Of LLN attention and of softmax within blocks, ``[..., h, n, m]``."""
    k = np.repeat(k, q.shape[-2] // k.shape[-2], -2)
    q, k = (np.swapaxes(x, -2, -3) for x in (q, k))
    far = np.exp(alpha * q[..., :, None, :] + beta * k[..., None, :, :]).sum(-1) * seen
    near = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])) * seen
    i, j = (np.arange(x.shape[-2]) // block for x in (q, k))
    return share(far), share(near * (i[:, None] == j))


def average(p, v):
    return np.einsum("...hnm,...mhe->...nhe", p, np.repeat(v, p.shape[-3] // v.shape[-2], -2))


def expected(params, *inputs, parts=(0.5, 0.5), diagonal=True, valid=..., **options):
    """What a module gives; alpha and beta, unless given, measured on what is valid."""
    q, k, v = project(params, *inputs)
    options = (measured(q, k, valid) if "alpha" not in options else {}) | options
    far, near = (average(p, v) for p in attention_weights(q, k, **options))
    return unproject(params, parts[0] * far + parts[1] * near if diagonal else far)


# Flax's own modules with attention_fn.


def nnx_softmax(params, **options):
    groups = params["key"]["kernel"].shape[1]
    model = nnx.MultiHeadAttention(
        HEADS, FEATURES, HEADS * HEAD, None, groups, decode=False, rngs=nnx.Rngs(0), **options
    )
    nnx.update(model, params)
    return model


def attend(world, fn, *inputs, params=None, options=None, **call):
    params, options = params or parameters(world), {"attention_fn": fn} | (options or {})
    if world == "linen":
        module = nn.MultiHeadDotProductAttention(HEADS, qkv_features=HEADS * HEAD, **options)
        return module.apply({"params": params}, *inputs, **call)
    return nnx_softmax(params, **options)(*inputs, **call)


def test_every_argument_of_flax_has_its_name_and_place():
    ours = list(inspect.signature(attention_fn).parameters)
    theirs = list(inspect.signature(nn.dot_product_attention).parameters)
    assert ours[: len(theirs)] == theirs
    assert set(inspect.signature(nnx.dot_product_attention).parameters) <= set(ours)
    kinds = [p.kind for p in inspect.signature(attention_fn).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD not in kinds  # linen would drop the mask


@worlds
@diagonals
@pytest.mark.parametrize("slopes", [{}, FIXED], ids=["measured", "given"])
def test_modules_give_the_weighted_mean_of_projected_values(world, diagonal, slopes):
    params, fn = parameters(world), partial(attention_fn, diagonal=diagonal, **slopes)
    close(jax.jit(partial(attend, world, fn))(X), expected(params, X, diagonal=diagonal, **slopes))


@both
def test_modules_give_lln_diag_attention_of_what_they_project(world):
    seen = []

    def fn(query, key, value, **options):
        seen.append(lln_diag_attention(query, key, value))
        return attention_fn(query, key, value, **options)

    close(attend(world, fn, X), unproject(parameters(world), np.float64(seen[0])), 1e-6)


@both
@pytest.mark.parametrize("options", [{}, {"diagonal": False} | FIXED], ids=["measured", "given"])
@pytest.mark.parametrize("valid", [VALID, VALID[:, ::-1]], ids=["right", "left"])
def test_padding_is_left_out_as_a_mask_of_keys_and_as_one_of_pairs(world, options, valid):
    fn, x = partial(attention_fn, **options), np.where(valid[..., None], X, 3.0 * X - 2.0)
    keys = valid[:, None, None, :]
    wanted = expected(parameters(world), x, valid=valid, seen=keys, **options)[valid]
    for mask in (keys, np.float32(keys), nn.make_attention_mask(valid, valid)):
        close(np.asarray(attend(world, fn, x, mask=mask))[valid], wanted)


@pytest.mark.parametrize("pairs", [False, True])
@both
def test_what_is_in_padding_changes_nothing(world, pairs):
    keys = VALID[:, None, None, :]
    mask = nn.make_attention_mask(VALID, VALID) if pairs else keys
    fn = partial(attention_fn, **FIXED) if pairs else attention_fn
    before = attend(world, fn, X, mask=mask)
    after = attend(world, fn, np.where(VALID[..., None], X, np.float32(1e4)), mask=mask)
    assert np.any(before)
    close(np.asarray(after)[VALID], np.asarray(before)[VALID], 1e-5)


@diagonals
def test_a_mask_of_keys_stays_linear_and_one_of_pairs_does_not(diagonal):
    q = jnp.asarray(numbers((1, 67, 2, 4), 1))

    def sizes(mask):
        fn = partial(attention_fn, diagonal=diagonal)
        return str(jax.make_jaxpr(lambda q, mask: fn(q, q, q, mask=mask))(q, mask))

    assert "67,67" not in sizes(jnp.ones((1, 1, 1, 67)))
    assert "67,67" in sizes(jnp.ones((1, 1, 67, 67)))


@pytest.mark.parametrize(
    ("world", "diagonal"), [("linen", True), ("nnx", False), ("nnx, grouped", True)]
)
def test_a_causal_mask_is_is_causal(world, diagonal):
    fn = partial(attention_fn, diagonal=diagonal, chunk_size=4, **FIXED)
    wanted = expected(parameters(world), X, seen=CAUSAL, diagonal=diagonal, **FIXED)
    mask = nn.make_causal_mask(X[..., 0])
    close(jax.jit(partial(attend, world, fn))(X, mask=mask), wanted)
    if world == "linen":  # which never says it
        run = partial(attend, world, partial(fn, is_causal=True))
    else:
        run = partial(attend, world, fn, is_causal=True)
    close(jax.jit(run)(X), wanted)


@both
@pytest.mark.parametrize("queries", [1, LENGTH], ids=["of keys", "of pairs"])
def test_each_head_may_have_a_mask_of_its_own(world, queries):
    mask = np.random.default_rng(3).random((BATCH, HEADS, queries, LENGTH)) < 0.6
    mask[..., ::HEAD] = True  # each block has a key
    wanted = expected(parameters(world), X, seen=mask, **FIXED)
    close(attend(world, partial(attention_fn, **FIXED), X, mask=mask), wanted)


@both
@pytest.mark.parametrize("shape", [(2, 1, 13, 13), (1, 4, 1, 13), (13, 13)], ids=str)
def test_what_is_quadratic_may_be_refused(world, shape):
    mask, fn = np.ones(shape, bool), partial(attention_fn, quadratic=False)
    with pytest.raises(ValueError, match=r"^mask: .*is_causal=True, key_mask"):
        attend(world, fn, X, mask=mask)
    attend(world, fn, X, mask=np.ones((1, 1, 1, 13)))


@pytest.mark.parametrize("pairs", [False, True], ids=["linear", "quadratic"])
@diagonals
def test_all_that_forbids_forbids_together(pairs, diagonal):
    rng = np.random.default_rng(5)
    q, k, v = (numbers((BATCH, LENGTH, h, HEAD), h + i) for i, h in enumerate((4, 2, 2)))
    mask = rng.random((BATCH, HEADS if pairs else 1, LENGTH if pairs else 1, LENGTH)) < 0.7
    key_mask = rng.random((BATCH, LENGTH)) < 0.7
    ids = np.sort(rng.integers(0, 3, (BATCH, LENGTH)), -1)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    seen = mask & key_mask[:, None, None] & same & CAUSAL
    parts = attention_weights(*map(np.float64, (q, k)), seen=seen, block=5, **FIXED)
    far, near = (average(p, np.float64(v)) for p in parts)
    options = {"key_mask": key_mask, "segment_ids": ids, "block_size": 5, "chunk_size": 4}
    fn = partial(attention_fn, mask=mask, is_causal=True, diagonal=diagonal, **options, **FIXED)
    out = jax.jit(fn)(q, k, v)
    close(out, 0.5 * far + 0.5 * near if diagonal else far)


@pytest.mark.parametrize("pairs", [False, True], ids=["linear", "quadratic"])
def test_queries_that_see_no_key_give_zero_with_finite_gradients(pairs):
    q, k, v = (numbers((BATCH, LENGTH, 2, HEAD), i) for i in range(3))
    mask = np.ones((BATCH, 1, LENGTH if pairs else 1, LENGTH), bool)
    mask[0] = False

    def loss(qkv):
        out = attention_fn(*qkv, mask=mask)
        return jnp.sin(out).sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))((q, k, v))
    np.testing.assert_array_equal(out[0], 0.0)
    assert (np.asarray(out[1]) != 0.0).all()
    for grad in grads:
        np.testing.assert_array_equal(grad[0], 0.0)
        assert np.isfinite(grad).all()
        assert np.any(grad[1] != 0.0)


@pytest.mark.parametrize(("world", "lead"), [("linen", ()), ("nnx, grouped", (2, 3))])
def test_leading_axes_are_none_or_many(world, lead):
    x = numbers((*lead, LENGTH, FEATURES), 4)
    mask = np.random.default_rng(2).random((*lead, 1, 1, LENGTH)) < 0.7
    wanted = expected(parameters(world), x, seen=mask, **FIXED)
    fn = partial(attention_fn, **FIXED)
    close(jax.jit(lambda x: attend(world, fn, x, mask=mask))(x), wanted)


@both
def test_keys_of_another_sequence_need_no_blocks(world):
    other = numbers((BATCH, 9, FEATURES), 6)
    fn = partial(attention_fn, diagonal=False)
    close(attend(world, fn, X, other), expected(parameters(world), X, other, diagonal=False))
    for mask in (None, np.ones((BATCH, 1, LENGTH, 9), bool)):
        with pytest.raises(ValueError, match="length 9, must be q's 13"):
            attend(world, attention_fn, X, other, mask=mask)


# What Flax does around it.


@pytest.mark.parametrize(
    ("world", "diagonal"),
    [("linen", True), ("linen", False), ("nnx, grouped", True), ("nnx", False)],
)
def test_decoding_with_the_cache_of_flax_gives_the_whole_sequence(world, diagonal):
    params, fn = parameters(world), partial(attention_fn, diagonal=diagonal, **FIXED)
    room = jnp.zeros((BATCH, LENGTH + 2, FEATURES))
    if world == "linen":
        module = nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * HEAD, decode=True, attention_fn=fn
        )
        state = {"params": params, "cache": module.init(jax.random.key(0), room)["cache"]}
        apply = jax.jit(partial(module.apply, mutable="cache"))

        def turn(x):
            out, new = apply(state, x)
            state.update(new)
            return out
    else:
        model = nnx_softmax(params, attention_fn=fn)
        model.init_cache(room.shape)
        turn = partial(nnx.jit(lambda model, x: model(x, decode=True)), model)
    out = np.concatenate([turn(X[:, t : t + 1]) for t in range(LENGTH)], 1)
    close(out, expected(params, X, seen=CAUSAL, diagonal=diagonal, **FIXED))


@pytest.mark.parametrize("name", ["alpha", "segment_ids", "mask"])
def test_decoding_refuses_what_one_query_cannot_know(name):
    q, k = numbers((BATCH, 1, 2, HEAD), 1), numbers((BATCH, LENGTH, 2, HEAD), 2)
    options = {
        "alpha": {},
        "segment_ids": {"segment_ids": np.zeros((BATCH, LENGTH), int), **FIXED},
        "mask": {"mask": np.ones((BATCH, 2, 1, LENGTH), bool), **FIXED},
    }
    with pytest.raises(ValueError, match=f"^{name}: .*decoding"):
        attention_fn(q, k, k, **options[name])


def test_a_step_of_decoding_may_have_a_mask_for_each_head_without_blocks():
    q, k, v = (numbers((BATCH, n, 2, HEAD), i) for i, n in enumerate((1, LENGTH, LENGTH)))
    mask = np.random.default_rng(3).random((BATCH, 2, 1, LENGTH)) < 0.5
    far, _ = attention_weights(np.float64(q), np.float64(k), seen=mask, **FIXED)
    fn = partial(attention_fn, mask=mask, diagonal=False, **FIXED)
    close(jax.jit(fn)(q, k, v), average(far, v))


@both
def test_dropout_of_weights_is_refused_where_it_would_happen(world):
    options, key = {"dropout_rate": 0.1}, jax.random.key(0)
    call = {"dropout_rng": key} if world == "linen" else {"rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match=r"^dropout_rate: "):
        attend(world, attention_fn, X, options=options, deterministic=False, **call)
    out = attend(world, attention_fn, X, options=options, deterministic=True)
    close(out, expected(parameters(), X))


@pytest.mark.parametrize(
    "name", ["bias", "einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"]
)
def test_what_has_no_linear_form_is_refused(name):
    q = numbers((1, 5, 2, HEAD), 1)
    with pytest.raises(ValueError, match=f"^{name}: "):
        attention_fn(q, q, q, **{name: jnp.einsum})


def test_a_precision_for_each_operand_is_refused():
    q = numbers((1, 5, 2, HEAD), 1)
    with pytest.raises(ValueError, match=r"^precision: must be the same"):
        attention_fn(q, q, q, precision=("default", "highest"))


def test_einsums_that_linen_makes_are_refused():
    options = {"qk_attn_weights_einsum_cls": lambda: jnp.einsum}
    with pytest.raises(ValueError, match=r"^qk_attn_weights_einsum: "):
        attend("linen", attention_fn, X, options=options)


@both
@pytest.mark.parametrize("shape", [(2, 13), (3, 1, 1, 13), (2, 1, 13, 12), (2, 1, 1, 1, 13)])
def test_a_mask_that_does_not_fit_is_named(world, shape):
    with pytest.raises(ValueError, match=r"^mask: .* must broadcast to .*\(2, 4, 13, 13\)"):
        attend(world, attention_fn, X, mask=np.ones(shape, bool))


def test_one_slope_without_the_other_is_refused():
    q = numbers((1, 5, 2, HEAD), 1)
    for given in ({"alpha": 1.0}, {"beta": 1.0}):
        with pytest.raises(ValueError, match=r"^alpha, beta: give both"):
            attention_fn(q, q, q, **given)


def sown(world, fn, **call):
    if world == "linen":
        out, state = attend(world, fn, X, sow_weights=True, mutable=["intermediates"], **call)
        return out, state["intermediates"]["attention_weights"][0]

    @nnx.capture(nnx.Intermediate)
    def forward(model):
        return model(X, sow_weights=True, **call)

    out, state = forward(nnx_softmax(parameters(world), attention_fn=fn))
    return out, state["attention_weights"][0]


@both
@diagonals
@pytest.mark.parametrize("pairs", [False, True], ids=["linear", "quadratic"])
def test_sown_weights_are_shares_and_give_the_output(world, diagonal, pairs):
    params, fn = parameters(world), partial(attention_fn, diagonal=diagonal, **FIXED)
    mask = np.random.default_rng(7).random((BATCH, 1, 1, LENGTH)) < 0.7
    mask[..., ::HEAD] = True
    mask = mask & CAUSAL if pairs else mask
    out, p = sown(world, fn, mask=mask)
    q, k, v = project(params, X)
    far, near = attention_weights(q, k, seen=mask, **FIXED)
    close(p, 0.5 * far + 0.5 * near if diagonal else far, 1e-6)
    close(np.sum(p, -1), np.ones((BATCH, HEADS, LENGTH)))
    close(out, unproject(params, average(np.float64(p), v)))


def test_weights_of_channels_have_no_attention_weights_to_sow():
    half = np.full((HEADS, HEAD), 0.5, np.float32)
    with pytest.raises(ValueError, match=r"^weights: "):
        sown("linen", partial(attention_fn, weights=(half, half)))


@worlds
def test_options_bound_by_partial_are_kept(world):
    parts = [numbers((HEADS, HEAD), i) for i in (1, 2)]
    fn = partial(attention_fn, weights=tuple(parts), block_size=3, chunk_size=5, **FIXED)
    wanted = expected(parameters(world), X, parts=parts, block=3, **FIXED)
    close(jax.jit(partial(attend, world, fn))(X), wanted)


def test_a_dtype_bound_by_partial_is_not_kept():
    out = attend("linen", partial(attention_fn, dtype=jnp.bfloat16), X)
    close(out, expected(parameters(), X))  # linen gives its own dtype=None


@both
def test_a_jitted_function_is_inspected_right(world):
    names = ("dropout_rate", "deterministic", "is_causal")
    fn = jax.jit(partial(attention_fn, **FIXED), static_argnames=names)
    seen = VALID[:, None, None, :]
    close(attend(world, fn, X, mask=seen), expected(parameters(), X, seen=seen, **FIXED))


@both
def test_half_precision_is_that_of_the_module(world):
    out = attend(world, attention_fn, X, options={"dtype": jnp.bfloat16})
    assert out.dtype == jnp.bfloat16
    wanted = expected(parameters(), X)
    close(out, wanted, 0.05)
    assert np.abs(np.float64(out) - wanted).max() > 1e-4  # it was


@pytest.mark.parametrize(
    ("dtype", "promote"),
    [(jnp.bfloat16, None), (jnp.float16, nnx.nn.dtypes.promote_dtype)],
    ids=["bfloat16", "float16"],
)
def test_dtype_is_that_of_the_result(dtype, promote):
    q, k, v = (numbers((1, LENGTH, 2, HEAD), i) for i in range(3))
    out = jax.jit(partial(attention_fn, dtype=dtype, promote_dtype=promote))(q, k, v)
    assert out.dtype == dtype
    q, k, v = map(np.float64, (q, k, v))
    far, near = (average(p, v) for p in attention_weights(q, k, **measured(q, k)))
    close(out, 0.5 * far + 0.5 * near, 0.03)


@pytest.mark.parametrize(
    ("world", "precision"),
    [
        ("linen", "highest"),
        ("nnx", jax.lax.Precision.HIGHEST),
        ("linen", ("highest", "highest")),
    ],
)
def test_precision_is_that_of_every_product(world, precision):
    def products(precision):
        options = {"precision": precision}
        jaxpr = str(jax.make_jaxpr(lambda x: attend(world, attention_fn, x, options=options))(X))
        return jaxpr.count("= dot_general["), jaxpr.count("(Precision.HIGHEST, Precision.HIGHEST)")

    count, highest = products(precision)
    assert highest == count == 4 + 4  # of the module and ours
    assert products(None) == (count, 0)


def test_no_gradient_flows_through_measured_slopes():
    q, k, v = (numbers((BATCH, LENGTH, 2, HEAD), i) for i in range(3))
    slopes = {name: float(a) for name, a in measured(q, k, VALID).items()}

    def gradient(**options):
        fn = partial(attention_fn, mask=VALID[:, None, None], **options)
        return jax.jit(jax.grad(lambda qkv: jnp.sin(fn(*qkv)).sum()))((q, k, v))

    for found, wanted in zip(gradient(), gradient(**slopes), strict=True):
        close(found, np.float64(wanted))


# Modules.


class Linen:
    """A linen module with its variables, called as one of NNX."""

    def __init__(self, params, **options):
        self.variables = {"params": params}
        self.module = lnq.attention.linen.LLNAttention(
            HEADS, params["key"]["kernel"].shape[1], HEADS * HEAD, **options
        )
        self.apply = jax.jit(self.module.apply, static_argnames=("train", "mutable"))

    def __call__(self, *inputs, mutable=("attention_stats", "cache"), **call):
        if not mutable:
            return self.apply(self.variables, *inputs, **call)
        out, new = self.apply(self.variables, *inputs, mutable=mutable, **call)
        self.variables |= new
        return out

    @property
    def stats(self):
        return [self.variables["attention_stats"][f"{name}_std"] for name in ("query", "key")]

    @property
    def cache(self):
        return self.variables["cache"]


class Nnx:
    """The same around one of NNX."""

    def __init__(self, params, **options):
        self.model = lnq.attention.nnx.LLNAttention(
            HEADS,
            FEATURES,
            qkv_features=HEADS * HEAD,
            num_kv_heads=params["key"]["kernel"].shape[1],
            rngs=nnx.Rngs(0),
            **options,
        )
        nnx.update(self.model, params)
        self.apply = nnx.jit(lambda model, *x, **call: model(*x, **call), static_argnames="train")
        if options.get("decode"):
            self.model.init_cache(X.shape)

    def __call__(self, *inputs, **call):
        return self.apply(self.model, *inputs, **call)

    @property
    def stats(self):
        return [self.model.query_std[...], self.model.key_std[...]]

    @property
    def cache(self):
        return nnx.to_pure_dict(nnx.state(self.model, nnx.Cache))


def make(world, params=None, **options):
    kind = Linen if world.startswith("linen") else Nnx
    return kind(params or parameters(world), **options)


def test_parameters_are_those_of_softmax():
    for options in ({}, {"normalize_qk": True}, {"use_bias": False}):
        ours = lnq.attention.linen.LLNAttention(HEADS, qkv_features=8, **options)
        theirs = nn.MultiHeadDotProductAttention(HEADS, qkv_features=8, **options)
        shapes = [
            jax.eval_shape(module.init, jax.random.key(0), X)["params"] for module in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]
        kinds = (lnq.attention.nnx.LLNAttention, partial(nnx.MultiHeadAttention, decode=False))
        shapes = [
            jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model)))
            for model in (
                nnx.eval_shape(
                    lambda kind=kind, options=options: kind(
                        HEADS, FEATURES, qkv_features=8, num_kv_heads=2, rngs=nnx.Rngs(0), **options
                    )
                )
                for kind in kinds
            )
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("world", "near"), [("linen", "average"), ("nnx", "none")])
def test_a_checkpoint_of_softmax_gives_what_attention_fn_gives(world, near):
    theirs = {"normalize_qk": True}
    params = parameters(world) | {
        name: {"scale": numbers((HEAD,), i, 1.0, 0.3)}
        for i, name in enumerate(("query_ln", "key_ln"))
    }
    fn = partial(attention_fn, diagonal=near == "average", key_mask=VALID)
    wanted = attend(world, fn, X, params=params, options=theirs)
    close(make(world, params, near=near, **theirs)(X, key_mask=VALID), np.float64(wanted), 1e-6)


@pytest.mark.parametrize(
    ("world", "near", "causal"),
    [
        ("linen, grouped", "average", True),
        ("nnx, grouped", "average", True),
        ("nnx, grouped", "none", False),
    ],
)
def test_modules_are_what_is_written_out(world, near, causal):
    ids = np.sort(np.random.default_rng(5).integers(0, 3, (BATCH, LENGTH)), -1)
    seen = VALID[:, None, None] & (ids[:, None, :, None] == ids[:, None, None])
    model = make(world, near=near, causal=causal, block_size=5, chunk_size=3)
    options = {"seen": seen & CAUSAL if causal else seen, "valid": VALID, "block": 5}
    wanted = expected(parameters(world), X, diagonal=near != "none", **options)
    close(model(X, key_mask=VALID, segment_ids=ids), wanted)


@grouped
def test_cross_attention_is_that_of_keys_and_values_given(world):
    keys, values = (numbers((BATCH, 9, FEATURES), i) for i in (6, 7))
    params = parameters(world)
    model = make(world, near="none")
    close(model(X, keys), expected(params, X, keys, diagonal=False))
    close(model(X, keys, values), expected(params, X, keys, values, diagonal=False))
    with pytest.raises(ValueError, match="length 9, must be q's 13"):
        make(world)(X, keys)


@both
@pytest.mark.parametrize("stats", ["head", "example"])
def test_deviations_are_of_each_head_or_of_each_example(world, stats):
    params = parameters(f"{world}, grouped")
    q, k, v = project(params, X)
    far = np.zeros((BATCH, LENGTH, HEADS, HEAD))
    for b in range(BATCH):
        for h in range(HEADS):
            g = h // 2
            at = slice(None) if stats == "head" else b
            slopes = measured(q[at, ..., 2 * g : 2 * g + 2, :], k[at, ..., g, :])
            p, _ = attention_weights(
                q[b, :, [h]].swapaxes(0, 1), k[b, :, [g]].swapaxes(0, 1), **slopes
            )
            far[b, :, h] = average(p, v[b, :, [g]].swapaxes(0, 1))[:, 0]
    close(make(world, params, near="none", stats=stats)(X), unproject(params, far))


@both
@pytest.mark.parametrize("near", ["scale", "ratio"])
def test_learned_weights_start_as_the_average_and_are_of_each_channel(world, near):
    r, p = (numbers((HEADS, HEAD), i, 0.5, 0.5) for i in (3, 4))
    given = parameters() | dict(zip(LEARNED[near], (r, p), strict=False))
    model = make(world, given, near=near)
    if world == "linen":
        made = jax.jit(model.module.init)(jax.random.key(0), X)["params"]
    else:
        made = nnx.to_pure_dict(nnx.state(make(world, near=near).model))
    assert made.keys() == given.keys()
    for name in LEARNED[near]:
        np.testing.assert_array_equal(made[name], np.full((HEADS, HEAD), 0.5))
    wanted = expected(parameters(), X, parts=(r, p if near == "scale" else 1.0 - r))
    close(model(X), wanted)


# Kept deviations.


@pytest.mark.parametrize(
    ("world", "stats"), [("linen, grouped", "head"), ("nnx, grouped", "global")]
)
def test_kept_deviations_are_used_then_moved_and_only_in_training(world, stats):
    params, model = parameters(world), make(world, momentum=0.8, stats=stats)
    groups = 2 if stats == "head" else 1
    kept = np.ones((2, groups))
    for seed in (1, 2):
        x = numbers(X.shape, seed, 0.0, seed)
        out = model(x, key_mask=VALID, train=True)
        if stats == "global":
            wanted = expected(params, x, seen=VALID[:, None, None], **matched(*kept[:, 0]))
            close(out, wanted)
        new = [
            [np.std(part, ddof=1) for part in np.split(a[VALID], groups, 1)]
            for a in project(params, x)[:2]
        ]
        kept = 0.8 * kept + 0.2 * np.array(new)
        close(np.ravel(model.stats), kept.ravel(), 1e-6)
    model(X, train=False)
    if "linen" in world:
        model(X, train=True, mutable=False)
    close(np.ravel(model.stats), kept.ravel(), 1e-6)


@both
def test_with_kept_deviations_and_only_then_the_past_is_blind_to_the_future(world):
    later = np.where(np.arange(LENGTH)[:, None] < 7, X, 2.0 * X + 1.0)
    for momentum in (0.9, None):
        model = make(world, causal=True, momentum=momentum)
        before, after = (np.asarray(model(x))[:, :7] for x in (X, later))
        if momentum is None:
            assert np.abs(before - after).max() > 1e-4
        else:
            np.testing.assert_array_equal(before, after)


@both
def test_no_gradient_flows_through_deviations(world):
    params = parameters()
    if world == "linen":
        module = make(world, momentum=0.5).module

        def moved(params, x):
            return module.apply({"params": params}, x, train=True, mutable=["attention_stats"])[1]
    else:
        graph, _, rest = nnx.split(make(world, momentum=0.5).model, nnx.Param, ...)

        def moved(params, x):
            model = nnx.merge(graph, nnx.State(params), rest, copy=True)
            model(x, train=True)
            return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def total(params, x):
        return sum(jnp.sum(std) for std in jax.tree.leaves(moved(params, x)))

    both = jax.jit(jax.value_and_grad(total, (0, 1)))
    (before, gradients), (after, _) = both(params, X), both(params, 2.0 * X)
    assert abs(before - after) > 0.1
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, 0.0)


# Decoding.


@pytest.mark.parametrize(
    ("world", "near"),
    [("linen", "average"), ("nnx, grouped", "scale")],
)
def test_a_prompt_then_tokens_give_the_whole_sequence_from_a_cache_of_one_size(world, near):
    params = parameters(world)
    parts = (0.5, 0.5)
    if near == "scale":
        parts = [numbers((HEADS, HEAD), i) for i in (1, 2)]
        params |= dict(zip(LEARNED[near], parts, strict=True))
    kept = {
        name: np.full((1, 1, 1), value, np.float32)
        for name, value in {"query_std": 0.8, "key_std": 1.7}.items()
    }
    options = {"near": near, "causal": True, "momentum": 0.9, "chunk_size": 4}
    model = make(world, params, decode=True, **options)
    if world == "linen":  # the cache begins by itself
        model.variables["attention_stats"] = kept
        empty = jax.eval_shape(model.module.init, jax.random.key(0), X)["cache"]
    else:
        nnx.update(model.model, kept)
        empty = model.cache
    assert max(a.size for a in jax.tree.leaves(empty)) <= BATCH * HEADS * HEAD * (HEAD + 1)
    outs = []
    for part in np.split(X, np.cumsum([5, 1, 1, 1]), 1):  # and 5
        outs.append(model(part))
        assert jax.tree.map(jnp.shape, model.cache) == jax.tree.map(lambda a: a.shape, empty)
    options = {"diagonal": near != "none", "parts": parts, **matched(0.8, 1.7)}
    close(np.concatenate(outs, 1), expected(params, X, seen=CAUSAL, **options))
    for found, given in zip(model.stats, kept.values(), strict=True):
        np.testing.assert_array_equal(found, given)


def test_nnx_decodes_when_the_call_says_so_and_starts_anew_with_a_new_cache():
    model = make("nnx", near="none", causal=True, momentum=0.9).model
    options = {"diagonal": False, **matched(1.0, 1.0)}
    wanted = expected(parameters(), X[:, :12], seen=CAUSAL[:12, :12], **options)
    call = nnx.jit(lambda model, x: model(x, decode=True))
    for _ in range(2):
        model.init_cache((BATCH, 1, FEATURES))
        close(np.concatenate([call(model, x) for x in (X[:, :6], X[:, 6:12])], 1), wanted)


@both
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decode": True, "causal": True}, "^decode: needs kept deviations; give momentum"),
        ({"decode": True, "momentum": 0.9}, "^decode: needs causal=True"),
        ({"momentum": 0.9, "stats": "example"}, "^stats: 'example' has none to keep"),
        ({"stats": "heads"}, "^stats: must be one of global, head, example, not 'heads'"),
        ({"near": "mean"}, "^near: must be one of none, average, scale, ratio, not 'mean'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_contradict_each_other_are_named(world, options, words):
    with pytest.raises(ValueError, match=words):
        make(world, **options)(X)


@both
@pytest.mark.parametrize("sizes", [(4, 4, 6), (4, 3, 16)], ids=["features", "groups"])
def test_heads_that_do_not_divide_are_named(world, sizes):
    heads, groups, features = sizes
    options = {"num_kv_heads": groups, "qkv_features": features}
    if world == "linen":
        made = lnq.attention.linen.LLNAttention(heads, **options).init
        made = partial(made, jax.random.key(0), X)
    else:
        made = partial(lnq.attention.nnx.LLNAttention, heads, FEATURES, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match=r"num_(kv_)?heads"):
        made()


@both
def test_a_cache_takes_tokens_of_its_batch_that_are_all_real(world):
    model = make(world, causal=True, momentum=0.9, decode=True)
    if world == "linen":
        made = jax.eval_shape(model.module.init, jax.random.key(0), X)
        model.variables["cache"] = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype), made["cache"]
        )
    for name in ("key_mask", "segment_ids"):
        with pytest.raises(ValueError, match="cache holds real tokens of one segment"):
            model(X, **{name: np.ones((BATCH, LENGTH), int)})
    with pytest.raises(ValueError, match=r"^cache: is of a batch \(2,\), not \(1,\)"):
        model(X[:1])
    with pytest.raises(ValueError, match="length 13, must be q's 9"):
        model(X[:, :9], X)


def test_nnx_refuses_what_it_would_not_use_and_wants_a_cache():
    for name, value in {"dropout_rate": 0.1, "attention_fn": attention_fn}.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            make("nnx", **{name: value})
    model = make("nnx", causal=True, momentum=0.9)
    with pytest.raises(ValueError, match="call init_cache first"):
        model.model(X, decode=True)
    with pytest.raises(ValueError, match="needs causal=True"):
        make("nnx", momentum=0.9).model(X, decode=True)


# Training and transformations.


@both
def test_half_parameters_stay_half_and_are_summed_in_float32(world):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), parameters())
    x = jnp.asarray(X, jnp.bfloat16)
    model = make(world, params, param_dtype=jnp.bfloat16, momentum=0.9)
    out = model(x, train=True)
    assert out.dtype == jnp.bfloat16
    assert all(std.dtype == jnp.float32 for std in model.stats)
    exact = jax.tree.map(np.float64, params)
    close(out, expected(exact, np.float64(x), **matched(1.0, 1.0)), 0.08)
    if world == "linen":
        made = jax.eval_shape(model.module.init, jax.random.key(0), x)["params"]
    else:
        made = nnx.state(model.model, nnx.Param)
    assert {a.dtype for a in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("world", "near"), [("linen", "scale"), ("nnx", "ratio")])
def test_steps_down_the_gradient_lower_a_loss_and_move_the_learned_weights(world, near):
    target, optimizer = np.roll(X, 1, 1), optax.sgd(0.1)
    model = make(world, halves(near), near=near, momentum=0.9)
    if world == "linen":
        kept = dict.fromkeys(("query_std", "key_std"), jnp.ones((1, 1, 1)))
        variables = model.variables | {"attention_stats": kept}
        state = variables, optimizer.init(variables["params"])

        def loss(params, kept):
            variables = {"params": params, "attention_stats": kept}
            out, new = model.module.apply(variables, X, train=True, mutable=["attention_stats"])
            return jnp.mean((out - target) ** 2), new

        @jax.jit
        def turn(variables, opt_state):
            params = variables["params"]
            value_and_grad = jax.value_and_grad(loss, has_aux=True)
            (value, new), grads = value_and_grad(params, variables["attention_stats"])
            updates, opt_state = optimizer.update(grads, opt_state)
            return value, ({"params": optax.apply_updates(params, updates), **new}, opt_state)

        losses = []
        for _ in range(5):
            value, state = turn(*state)
            losses.append(value)
        learned, stats = state[0]["params"], jax.tree.leaves(state[0]["attention_stats"])
    else:
        tuned = nnx.Optimizer(model.model, optimizer, wrt=nnx.Param)

        @nnx.jit
        def turn(model, tuned):
            def loss(model):
                return jnp.mean((model(X, train=True) - target) ** 2)

            value, grads = nnx.value_and_grad(loss)(model)
            tuned.update(model, grads)
            return value

        losses = [turn(model.model, tuned) for _ in range(5)]
        learned, stats = nnx.to_pure_dict(nnx.state(model.model)), model.stats
    assert losses[-1] < 0.8 * losses[0]
    for name in LEARNED[near]:
        assert (np.abs(learned[name] - 0.5) > 1e-6).all()
    assert all(np.any(std != 1.0) for std in stats)


@both
def test_state_may_be_donated(world):
    model = make(world, halves("scale"), near="scale", causal=True, momentum=0.9, decode=True)
    if world == "linen":
        state = jax.jit(model.module.init)(jax.random.key(0), X) | model.variables
        assert state["cache"]["near"]["length"] == 0  # init appends nothing
        np.testing.assert_array_equal(state["cache"]["far"]["sums"], 0.0)

        def turn(state, x):
            mutable = ["attention_stats", "cache"]
            out, new = model.module.apply(state, x, train=True, mutable=mutable)
            return out, {"params": state["params"], **new}
    else:
        graph, state = nnx.split(model.model)

        def turn(state, x):
            model = nnx.merge(graph, state, copy=True)
            return model(x, train=True), nnx.state(model)

    turn, state = jax.jit(turn, donate_argnums=0), jax.tree.map(jnp.asarray, state)
    out, state = turn(state, X)
    close(out, expected(parameters(), X, seen=CAUSAL, **matched(1.0, 1.0)))
    again, _ = turn(state, X)
    assert np.abs(out - again).max() > 1e-3  # there are keys before it now


def test_a_model_of_nnx_survives_split_and_merge():
    model = make("nnx", causal=True, momentum=0.9, decode=True)
    model(X[:, :6], train=False)
    graph, params, rest = nnx.split(model.model, nnx.Param, ...)
    assert nnx.to_pure_dict(rest).keys() == {"query_std", "key_std", "cached_far", "cached_near"}
    again = nnx.merge(graph, params, rest, copy=True)
    np.testing.assert_array_equal(model.apply(again, X[:, 6:12]), model(X[:, 6:12]))
    assert again.cached_near["length"][...] == 12


def test_layers_of_linen_may_be_scanned_and_computed_again():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            attention = lnq.attention.linen.LLNAttention(
                HEADS, qkv_features=HEADS * HEAD, momentum=0.9
            )
            return x + attention(x, train=True), None

    axes = {"params": 0, "attention_stats": 0}
    stack = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=2)()
    made = jax.jit(stack.init)(jax.random.key(0), X, None)

    def scanned(params):
        (x, _), new = stack.apply(made | {"params": params}, X, None, mutable=["attention_stats"])
        return jnp.sin(x).sum(), (x, new["attention_stats"])

    def looped(params):
        x, stats = X, []
        for i in range(2):
            layer = jax.tree.map(lambda a, i=i: a[i], made | {"params": params})
            (x, _), new = Layer().apply(layer, x, None, mutable=["attention_stats"])
            stats.append(new["attention_stats"])
        return jnp.sin(x).sum(), (x, jax.tree.map(lambda *a: jnp.stack(a), *stats))

    found, wanted = (jax.jit(jax.grad(f, has_aux=True))(made["params"]) for f in (scanned, looped))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(a, np.float64(b))
        assert np.any(np.asarray(a) != 0.0)
