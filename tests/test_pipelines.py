"""The best model within a budget: what is promised of its size, its loss and its steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lnq
from lnq import distortion, pipelines, tree
from lnq.quantizer import QTensor

CHOICES = ((8, 8), (4, 8), (2, 8))
FAST = {"choices": CHOICES, "rows": 256, "batch": 32}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(5)(x.reshape(len(x), -1))


@functools.cache
def model():
    """A net with statistics that are its own, and examples with a trend."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(96, 8, 8, 3)) + np.linspace(-1, 1, 8)[:, None])
    variables = Net().init(jax.random.key(0), x[:1])
    drawn = iter(rng.uniform(0.5, 1.5, (8, 16)).astype(np.float32))
    variables = tree.map_named(
        lambda name, w: w if "kernel" in name or "Dense" in name else next(drawn)[: w.size],
        variables,
    )
    return jax.jit(Net().apply), jax.tree.map(jnp.asarray, variables), x


@functools.cache
def scored(pipeline):
    said = []
    method = {"light": pipelines.light, "advanced": pipelines.advanced}[pipeline]
    apply_fn, variables, x = model()
    options = FAST | ({"steps": 20} if pipeline == "advanced" else {})
    budget = 0.2
    qtree, info = method(
        apply_fn, variables, x, budget=budget, progress=lambda *args: said.append(args), **options
    )
    return qtree, info, said


def file_bytes(qtree):
    """Codes of fixed width, and every other number in 32 bits."""
    total = 0
    for _, leaf in tree.named_leaves(qtree):
        if isinstance(leaf, QTensor):
            spread = np.asarray(leaf.qparams.qmax - leaf.qparams.qmin).max()
            bits = int(np.log2(spread + 1))
            total += leaf.codes.size * bits / 8 + 4 * leaf.qparams.scale.size
            total += 4 * leaf.qparams.zero_point.size + 8 * len(leaf.acts)
        else:
            total += 4 * leaf.size
    return total


def divergence(qtree):
    apply_fn, variables, x = model()
    out = jax.jit(lnq.quantized(apply_fn))(qtree, x)
    return float(distortion.kl(apply_fn(variables, x), out))


BOTH = pytest.mark.parametrize("pipeline", ["light", "advanced"])


@pytest.mark.slow
@BOTH
def test_the_whole_file_fits_the_budget_and_is_counted_right(pipeline):
    qtree, info, _ = scored(pipeline)
    _, variables, _ = model()
    size = 4 * sum(w.size for w in jax.tree.leaves(variables))
    assert info.bytes == pytest.approx(file_bytes(qtree), abs=3)  # codes end on whole bytes
    assert info.fraction == info.bytes / size <= 0.2
    weights = {name: dict(tree.named_leaves(variables))[name].size for name in info.widths}
    bits = sum(n * info.widths[name][0] for name, n in weights.items())
    assert info.paper_fraction == pytest.approx(bits / (32 * sum(weights.values())))


@BOTH
def test_what_is_reported_is_the_loss_of_what_is_returned(pipeline):
    qtree, info, _ = scored(pipeline)
    last = info.steps[-1]
    assert divergence(qtree) == pytest.approx(last.after if last.kept else last.before, rel=1e-3)
    for step, following in itertools.pairwise(info.steps):
        begins = step.after if step.kept else step.before
        assert following.before == pytest.approx(begins, rel=0.02, abs=1e-6), following
    assert all(step.after < step.before for step in info.steps[1:] if step.kept)


def test_steps_come_in_the_papers_order():
    names = {p: [step.name for step in scored(p)[1].steps] for p in ("light", "advanced")}
    assert names["light"] == ["allocate", "reconstruct"]
    assert names["advanced"] == ["allocate", "refit", "reconstruct", "tune biases"]


def test_widths_are_the_best_of_all_within_the_budget():
    _, info, _ = scored("light")
    found = info.scored
    _, variables, _ = model()
    room = 0.2 * 4 * sum(w.size for w in jax.tree.leaves(variables)) - found.rest
    loss, cost = found.scores.loss, found.scores.cost[0]
    tried = itertools.product(range(len(CHOICES)), repeat=len(loss))
    rows = np.arange(len(loss))
    least = min(loss[rows, list(c)].sum() for c in tried if cost[rows, list(c)].sum() <= room)
    assert info.allocation.loss == pytest.approx(least)
    assert info.allocation.status == "optimal"


def test_gradients_are_worth_it():
    assert divergence(scored("advanced")[0]) < divergence(scored("light")[0])


@BOTH
def test_scores_serve_other_budgets_without_a_fit(pipeline):
    _, info, _ = scored(pipeline)
    apply_fn, variables, x = model()
    method = getattr(pipelines, pipeline)
    said = []
    more = {"refit": False} if pipeline == "advanced" else {}
    _, small = method(
        apply_fn,
        variables,
        x,
        budget=0.16,
        scored=info.scored,
        progress=lambda *args: said.append(args[2]),
        **more,
    )
    assert small.fraction <= 0.16 < info.fraction
    assert not any(text.startswith(("fit", "score")) for text in said)
    assert any(text.startswith("fit") for *_, text in scored(pipeline)[2])


def test_a_budget_out_of_reach_says_what_can_be_reached():
    apply_fn, variables, x = model()
    found = scored("light")[1].scored
    with pytest.raises(lnq.UnreachableError, match=r"smallest is 0\.\d+: raise `budget`") as error:
        pipelines.light(apply_fn, variables, x, budget=0.05, scored=found)
    _, info = pipelines.light(apply_fn, variables, x, budget=error.value.best, scored=found)
    assert set(info.widths.values()) == {(2, 8)}
    assert info.fraction == pytest.approx(error.value.best, rel=1e-3)


@BOTH
def test_the_program_has_a_time_limit(pipeline):
    found = scored("light")[1].scored
    with pytest.raises(ValueError, match="time_limit: must be more than 0 seconds, not 0"):
        getattr(pipelines, pipeline)(*model(), scored=found, time_limit=0)


def test_a_coded_budget_bounds_the_file(tmp_path):
    apply_fn, variables, x = model()
    size = 4 * sum(w.size for w in jax.tree.leaves(variables))
    qtree, info = pipelines.light(
        apply_fn, variables, x, budget=0.7, coded=True, scored=scored("light")[1].scored
    )
    assert lnq.save(tmp_path / "m.lnq", qtree) == info.bytes <= 0.7 * size


def test_swaps_do_not_break_a_coded_budget(tmp_path):
    apply_fn, variables, x = model()
    size = 4 * sum(w.size for w in jax.tree.leaves(variables))
    qtree, info = pipelines.advanced(
        apply_fn,
        variables,
        x,
        budget=0.62,
        coded=True,
        refit=False,
        swaps=8,
        scored=scored("light")[1].scored,
    )
    assert lnq.save(tmp_path / "m.lnq", qtree) == info.bytes <= 0.62 * size
    with pytest.raises(
        lnq.UnreachableError, match=r"budget: 0\.4 of .* smallest is 0\.5\d"
    ) as error:
        pipelines.light(
            apply_fn, variables, x, budget=0.4, coded=True, scored=scored("light")[1].scored
        )
    assert error.value.best > 0.5


@pytest.mark.slow
def test_biases_are_tuned_by_the_distance_that_was_given():
    """One output: the default divergence would see nothing."""
    rng = np.random.default_rng(5)
    params = {"a": rng.normal(size=(6, 16)), "b": rng.normal(size=(1, 16)), "c": np.ones((16, 1))}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    x = np.float32(rng.normal(size=(200, 6)))

    def regression(params, x):
        return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]

    _, info = pipelines.advanced(
        regression,
        params,
        x,
        budget=1.0,
        choices=((2, 8),),
        distance=distortion.mse,
        second_order=False,
        weights="fixed",
        steps=0,
        refit=False,
        swaps=0,
    )
    assert info.steps[-1].name == "tune biases"
    assert info.steps[-1].after < 0.99 * info.steps[-1].before


@pytest.mark.slow
def test_fits_are_saved_and_not_made_again():
    apply_fn, variables, x = model()
    saved, said = [], []
    options = FAST | {"choices": CHOICES[:2], "steps": 0, "second_order": False}
    first = pipelines.score(
        apply_fn,
        variables,
        x,
        on_site=lambda s: saved.append({choice: dict(fits) for choice, fits in s.items()}),
        **options,
    )
    half = saved[len(saved) // 2]
    assert 0 < sum(map(len, half.values())) < 6
    again = pipelines.score(
        apply_fn, variables, x, state=half, progress=lambda *a: said.append(a[2]), **options
    )
    np.testing.assert_allclose(again.scores.loss, first.scores.loss, rtol=1e-5, atol=1e-9)
    made = [text for text in said if text.startswith("fit")]
    assert len(made) < len(saved)


def test_a_skipped_leaf_stays_float():
    apply_fn, variables, x = model()
    options = FAST | {"choices": CHOICES[:2]}
    qtree, info = pipelines.light(apply_fn, variables, x, budget=0.9, skip="Conv_0", **options)
    assert "params/Conv_0/kernel" not in info.widths
    assert not isinstance(qtree["params"]["Conv_0"]["kernel"], QTensor)
    assert isinstance(qtree["params"]["Conv_1"]["kernel"], QTensor)


@pytest.mark.parametrize("choices", [(), ((8, 0),), ((17, 8),)])
def test_choices_are_pairs_of_widths(choices):
    apply_fn, variables, x = model()
    with pytest.raises(ValueError, match="choices: must be pairs of widths"):
        pipelines.score(apply_fn, variables, x, choices=choices)


def test_a_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match="no leaf of params meets data"):
        pipelines.light(lambda p, x: x + p["b"], {"b": jnp.ones((1, 3))}, np.ones((8, 3)))
    apply_fn, variables, x = model()
    with pytest.raises(ValueError, match="no layer to give a width to"):
        pipelines.light(apply_fn, variables, x, skip="")


def test_a_step_with_nothing_to_repair_says_so():
    params = {"layers": jax.random.normal(jax.random.key(0), (2, 12, 12))}
    x = jax.random.normal(jax.random.key(3), (64, 12))

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    options = {"budget": 0.35, "rows": 64, "choices": CHOICES[:2]}
    qtree, info = pipelines.light(scanned, params, x, **options)
    _, (name, before, after, kept) = info.steps
    assert (name, after, kept) == ("reconstruct", before, False)
    assert before == pytest.approx(info.steps[0].after, rel=1e-3)
    assert info.widths == {"layers": (4, 8)}
    assert qtree["layers"].codes.dtype == jnp.int8
