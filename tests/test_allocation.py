"""The integer program against enumeration, a dynamic program and published solutions."""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from lnq import allocation
from lnq.allocation import allocate_bits, front, local_search
from lnq.types import UnreachableError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import draw_front


def totals(table, choices):
    """Sums over sites of what each choice takes from a table, ``[..., s, c]``."""
    return table[..., np.arange(table.shape[-2]), choices].sum(-1)


def enumerated(loss, cost, budget, ties=(), pairs=None):
    """Least loss of all choices within the budgets, infinite if there is none; and the choice."""
    cost, budget = np.reshape(cost, (-1, *loss.shape)), np.reshape(budget, -1)
    choices = np.array(list(itertools.product(range(loss.shape[1]), repeat=len(loss))))
    for tie in ties:
        choices = choices[(choices[:, list(tie)] == choices[:, [tie[0]]]).all(1)]
    value = totals(loss, choices)
    for (s, t), term in (pairs or {}).items():
        value = value + term[choices[:, s], choices[:, t]]
    for table, limit in zip(cost, budget, strict=True):
        value = np.where(totals(table, choices) <= limit * (1 + 1e-12), value, np.inf)
    return value.min(), choices[value.argmin()]


def dynamic(loss, cost, budget):
    """Least loss with whole costs, from a table over every cost up to the budget."""
    table = np.zeros(budget + 1)
    for losses, costs in zip(loss, cost, strict=True):
        ways = [
            np.concatenate([np.full(min(c, budget + 1), np.inf), table[: max(budget + 1 - c, 0)]])
            + loss
            for loss, c in zip(losses, costs, strict=True)
        ]
        table = np.min(ways, axis=0)
    return table.min()


def random_program(seed, sites=None, choices=None, costs=1, negative=False):
    """Losses that fall and costs that rise with the choice, with noise; a budget in between."""
    rng = np.random.default_rng(seed)
    sites, choices = sites or rng.integers(2, 9), choices or rng.integers(1, 4)
    loss = np.exp(rng.normal(0, 2, (sites, 1)) - np.arange(choices)) * rng.random((sites, choices))
    loss -= rng.random((sites, choices)) * negative
    cost = rng.integers(1, 30, (costs, sites, 1)) * np.arange(1, choices + 1)
    cost = cost + rng.integers(0, 5, cost.shape)
    least, most = cost.min(2).sum(1), cost.max(2).sum(1)
    return loss, cost, least + rng.uniform(0.1, 0.9) * (most - least)


def check(loss, cost, budget, choice, info, ties=(), pairs=None):
    """All that can be said of an answer without solving the program."""
    cost = np.reshape(cost, (-1, *loss.shape))
    terms = [term[choice[s], choice[t]] for (s, t), term in (pairs or {}).items()]
    assert info.loss == pytest.approx(totals(loss, choice) + sum(terms), rel=1e-12, abs=1e-300)
    np.testing.assert_allclose(np.reshape(info.cost, -1), totals(cost, choice), rtol=1e-12)
    assert (np.reshape(info.cost, -1) <= np.reshape(budget, -1) * (1 + 1e-11)).all()
    assert np.shape(info.cost) == np.shape(budget)
    assert all(len(set(choice[list(tie)].tolist())) == 1 for tie in ties)
    assert info.status == "optimal"
    assert info.bound <= info.loss
    assert 0.0 <= info.gap <= 1e-9 or info.loss == 0.0
    assert choice.dtype == np.int64


# Against all choices, one by one.


@pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative"])
@pytest.mark.parametrize("seed", range(30))
def test_no_choice_within_the_budget_is_better(seed, negative):
    loss, cost, budget = random_program(seed, negative=negative)
    choice, info = allocate_bits(loss, cost[0], budget[0])
    best, _ = enumerated(loss, cost, budget)
    assert info.loss == pytest.approx(best, rel=1e-12)
    check(loss, cost, budget[0], choice, info)


@pytest.mark.parametrize("seed", range(20))
def test_several_budgets_hold_together(seed):
    loss, cost, budget = random_program(seed, choices=3, costs=2 + seed % 2)
    best, _ = enumerated(loss, cost, budget)
    if np.isinf(best):
        with pytest.raises(UnreachableError, match="together"):
            allocate_bits(loss, cost, budget)
    else:
        choice, info = allocate_bits(loss, cost, budget)
        assert info.loss == pytest.approx(best, rel=1e-12)
        check(loss, cost, budget, choice, info)


@pytest.mark.parametrize("seed", range(15))
def test_tied_sites_take_the_best_choice_in_common(seed):
    loss, cost, budget = random_program(seed, sites=6, choices=3)
    ties = [[(4, 1)], [(0, 5, 2)], [(0, 3), (4, 1, 2)]][seed % 3]
    choice, info = allocate_bits(loss, cost, budget, ties=[*ties, ()])
    best, _ = enumerated(loss, cost, budget, ties)
    assert info.loss == pytest.approx(best, rel=1e-12)
    check(loss, cost, budget, choice, info, ties)


@pytest.mark.parametrize("seed", range(20))
def test_pair_terms_of_any_sign_are_counted(seed):
    loss, cost, budget = random_program(seed, choices=2 + seed % 2)
    rng, shape = np.random.default_rng(seed), (loss.shape[1],) * 2
    ends = itertools.permutations(range(len(loss)), 2)
    pairs = {(s, t): rng.normal(0, loss.max() / 2, shape) for s, t in ends if rng.random() < 0.5}
    ties = [(0, 1)] if seed % 4 == 0 else []
    choice, info = allocate_bits(loss, cost, budget, pairs=pairs, ties=ties)
    best, _ = enumerated(loss, cost, budget, ties, pairs)
    assert info.loss == pytest.approx(best, rel=1e-9)
    check(loss, cost, budget, choice, info, ties, pairs)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_that_add_nothing_or_only_to_one_site_leave_an_additive_program(seed):
    loss, cost, budget = random_program(seed, sites=6, choices=3)
    nothing = {(s, t): np.zeros((3, 3)) for s, t in itertools.combinations(range(6), 2)}
    choice, info = allocate_bits(loss, cost, budget, pairs=nothing)
    assert info.loss == pytest.approx(allocate_bits(loss, cost, budget)[1].loss, rel=1e-12)
    diagonal = {(s, s): np.diag(row) for s, row in enumerate(loss)}
    choice, info = allocate_bits(np.zeros((6, 3)), cost, budget, pairs=diagonal)
    check(loss, cost, budget, choice, info)
    assert info.loss == pytest.approx(enumerated(loss, cost, budget)[0], rel=1e-12)


def test_a_positive_semidefinite_projection_can_change_the_answer():
    """CLADO projects its matrix so that it suits convex solvers; here it is taken as it is."""
    changed = 0
    for seed in range(10):
        rng, sites, choices = np.random.default_rng(seed), 5, 2
        loss, cost, budget = random_program(seed, sites, choices)
        matrix = rng.normal(0, loss.mean(), (sites, choices, sites, choices))
        matrix = np.where(np.eye(sites)[:, None, :, None], 0.0, matrix).reshape(10, 10)
        matrix = (matrix + matrix.T) / 2 + np.diag(2 * loss.ravel())
        values, vectors = np.linalg.eigh(matrix)
        projected = (vectors * np.maximum(values, 0.0)) @ vectors.T
        assert values.min() < 0.0
        found = []
        for m in (matrix, projected):
            terms = m.reshape(sites, choices, sites, choices)
            alone = {(s, s): terms[s, :, s] / 2 for s in range(sites)}
            both = {(s, t): terms[s, :, t] for s, t in itertools.combinations(range(sites), 2)}
            choice, info = allocate_bits(0 * loss, cost, budget, pairs=alone | both)
            one_hot = np.eye(choices)[choice].ravel()
            assert info.loss == pytest.approx(one_hot @ m @ one_hot / 2, rel=1e-9)
            best, _ = enumerated(0 * loss, cost, budget, pairs=alone | both)
            assert info.loss == pytest.approx(best, rel=1e-9)
            found.append(choice.tolist())
        changed += found[0] != found[1]
    assert 0 < changed < 10


def test_programs_too_large_to_enumerate_agree_with_a_dynamic_program():
    for seed in range(3):
        loss, cost, budget = random_program(seed, sites=40, choices=6)
        best = dynamic(loss, cost[0], int(budget[0]))
        assert allocate_bits(loss, cost, budget)[1].loss == pytest.approx(best, rel=1e-12)
        costs, losses, choices = front(loss, cost[0], resolution=0)
        assert losses[costs <= budget[0]].min() == pytest.approx(best, rel=1e-12)
        np.testing.assert_allclose(totals(loss, choices), losses, rtol=1e-9)


# Size of numbers.


@pytest.mark.parametrize("loss_unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("cost_unit", [1e-9, 1e8])
@pytest.mark.parametrize("pair", [False, True], ids=["additive", "pairs"])
def test_units_do_not_matter(loss_unit, cost_unit, pair):
    loss, cost, budget = random_program(3, sites=7, choices=3)
    pairs = {(s, s + 1): np.outer(loss[s], -loss[s + 1]) for s in range(6)} if pair else {}
    best, expected = enumerated(loss, cost, budget, pairs=pairs)
    pairs = {key: term * loss_unit for key, term in pairs.items()}
    choice, info = allocate_bits(
        loss * loss_unit, cost * cost_unit, budget * cost_unit, pairs=pairs
    )
    np.testing.assert_array_equal(choice, expected)
    assert info.loss == pytest.approx(best * loss_unit, rel=1e-9)


@pytest.mark.parametrize("huge", [1e3, 1e6, 1e12, 1e30])
def test_one_huge_loss_does_not_hide_small_differences(huge):
    loss, cost, budget = random_program(5, sites=30, choices=5)
    loss[3, :2] = huge
    loss[7, 0] = huge
    forbidden = np.where(loss == huge, np.inf, loss)
    best = dynamic(forbidden, cost[0], int(budget[0]))
    assert allocate_bits(loss, cost, budget)[1].loss == pytest.approx(best, rel=1e-12)
    assert allocate_bits(forbidden, cost, budget)[1].loss == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("excess", [0, 1], ids=["just enough", "one byte short"])
def test_a_byte_of_a_hundred_million_counts(excess):
    """4.0 costs 30,000,000 + 70,000,001 bytes; without the last of them only 5.0 is left."""
    cost = np.array([[30_000_000, 60_000_000], [40_000_000, 70_000_001]])
    loss = np.array([[3.0, 0.0], [5.0, 1.0]])
    choice, info = allocate_bits(loss, cost, 100_000_001 - excess)
    assert choice.tolist() == ([1, 0] if excess else [0, 1])
    assert info.loss == (5.0 if excess else 4.0)


def test_a_budget_that_is_the_sum_of_the_costs_in_any_order_is_met():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.random((9, 1)) * 0.1 * np.array([1.0, 2.0, 3.0])
        wanted = rng.integers(0, 3, 9)
        budget = sum(rng.permutation(cost[np.arange(9), wanted]).tolist())
        loss = np.where(np.arange(3) == wanted[:, None], 0.0, 1.0 + rng.random((9, 3)))
        choice, info = allocate_bits(loss, cost, budget)
        np.testing.assert_array_equal(choice, wanted)
        assert info.loss == info.gap == 0.0
        least = sum(rng.permutation(cost[:, 0]).tolist())
        assert not allocate_bits(loss, cost, least)[0].any()


# What must hold of any answer.


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_budget_never_has_a_larger_loss(seed):
    loss, cost, _ = random_program(seed, sites=10, choices=3)
    budgets = np.linspace(cost.min(2).sum(), cost.max(2).sum(), 15)
    losses = [allocate_bits(loss, cost, budget)[1].loss for budget in budgets]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(loss.min(1).sum())
    unlimited, _ = allocate_bits(loss, cost, np.inf)
    np.testing.assert_array_equal(unlimited, loss.argmin(1))


@pytest.mark.parametrize("seed", range(5))
def test_swapped_it_finds_the_least_cost_for_a_loss(seed):
    loss, cost, budget = random_program(seed, sites=7, choices=3)
    _, there = allocate_bits(loss, cost[0], budget[0])
    choice, back = allocate_bits(cost[0], loss, there.loss)
    assert back.loss == pytest.approx(enumerated(cost[0] * 1.0, loss, there.loss)[0])
    assert back.loss <= there.cost
    assert totals(loss, choice) == pytest.approx(there.loss)
    with pytest.raises(UnreachableError) as error:
        allocate_bits(cost[0], loss, loss.min(1).sum() / 1.01)
    assert error.value.best == pytest.approx(loss.min(1).sum())


def test_of_equal_losses_the_cheaper_is_taken():
    loss = [[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]]
    choice, info = allocate_bits(loss, [[8, 4, 2], [8, 4, 2]], 16)
    assert choice.tolist() == [1, 2]
    assert float(info.cost) == 6.0
    choice, _ = allocate_bits(np.zeros((2, 3)), np.ones((2, 3)), 16)
    assert choice.tolist() == [0, 0]


def test_infinity_forbids_a_choice_in_either_table():
    loss, cost = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[2.0, 1.0], [2.0, 1.0]])
    for table in (loss, cost):
        table[1, 0], before = np.inf, table[1, 0]
        assert allocate_bits(loss, cost, 4)[0].tolist() == [0, 1]
        assert front(loss, cost)[2].tolist() == [[1, 1], [0, 1]]
        pairs = {(0, 1): np.array([[-9.0, 0.0], [0.0, 0.0]])}
        assert allocate_bits(loss, cost, 4, pairs=pairs)[0].tolist() == [0, 1]
        table[1, 0] = before


def test_within_a_time_limit_the_best_so_far_is_returned_with_its_gap(monkeypatch):
    loss, cost, budget = random_program(0, sites=20, choices=4)
    rng = np.random.default_rng(0)
    ends = itertools.combinations(range(20), 2)
    pairs = {key: rng.normal(0, loss.mean(), (4, 4)) for key in ends}
    choice, info = allocate_bits(loss, cost, budget, pairs=pairs, time_limit=0.5)
    assert info.status == "time limit"
    assert info.bound < info.loss
    assert info.gap == pytest.approx((info.loss - info.bound) / abs(info.loss))
    assert totals(cost, choice)[0] <= budget[0]
    monkeypatch.setattr(allocation, "_highs", lambda *_: ("time limit", None, -np.inf))
    with pytest.raises(TimeoutError, match=r"time_limit: nothing found within 0.5 s; allow more"):
        allocate_bits(loss, cost, budget, pairs=pairs, time_limit=0.5)


# Published solutions.


@pytest.mark.parametrize(
    ("cost", "share", "wide", "objective"),
    [
        ("BYTES", 0.25, "1111111111111100000", -1.1894136),
        ("BYTES", 0.5, "1111111111111110100", -1.2332072),
        ("BYTES", 0.75, "1111111111111011110", -1.2742725),
        ("BIT_OPERATIONS", 0.25, "1110101000000000000", -0.8472891),
        ("BIT_OPERATIONS", 0.5, "1110111101110000000", -1.0920238),
        ("BIT_OPERATIONS", 0.75, "1111111101111010110", -1.2277484),
    ],
)
def test_a_published_program_of_19_layers_has_its_known_optima(cost, share, wide, objective):
    """CBC and SCIP find the same; 1 is 8 bits, objectives are over that of 4 bits everywhere."""
    loss, cost, ties = draw_front.LOSS, getattr(draw_front, cost), draw_front.TIES
    budget = share * cost[:, 0].sum() + (1 - share) * cost[:, 1].sum()
    choice, info = allocate_bits(loss, cost, budget, ties=ties)
    assert "".join(map(str, 1 - choice)) == wide
    assert info.loss - loss[:, 1].sum() == pytest.approx(objective, abs=5e-8)
    costs, losses, choices = front(loss, cost, ties=ties, resolution=0)
    point = np.searchsorted(costs, budget, "right") - 1
    assert losses[point] == pytest.approx(info.loss, rel=1e-12)
    np.testing.assert_array_equal(choices[point], choice)
    seconds = dict(ties)
    groups = [[s, seconds.get(s, s)][: 1 + (s in seconds)] for s in range(19)]
    groups = [group for group in groups if group[0] not in seconds.values()]
    merged, counts = ([table[group].sum(0) for group in groups] for table in (loss, cost))
    unit = np.gcd.reduce(cost.astype(int), axis=None)
    best = dynamic(merged, np.array(counts).astype(int) // unit, int(budget // unit))
    assert info.loss == pytest.approx(best, rel=1e-12)


def residual_18():
    sizes = {"conv1": 9408}
    for stage, (width, before) in enumerate([(64, 64), (128, 64), (256, 128), (512, 256)], 1):
        for block in (0, 1):
            name = f"layer{stage}.{block}."
            sizes[name + "conv1"] = 9 * width * (width if block else before)
            sizes[name + "conv2"] = 9 * width * width
            if width != before and block == 0:
                sizes[name + "downsample"] = width * before
    return sizes | {"fc": 512 * 1000}


def residual_50():
    sizes, before = {"conv1": 9408}, 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}."
            sizes[name + "conv1"] = before * width
            sizes[name + "conv2"] = 9 * width * width
            sizes[name + "conv3"] = 4 * width * width
            if block == 0:
                sizes[name + "downsample"] = 4 * width * before
            before = 4 * width
    return sizes | {"fc": 2048 * 1000}


NETWORKS = {"ResNet-18": residual_18(), "ResNet-50": residual_50()}
"""Weights of the layers of torchvision's models, without biases."""

PUBLISHED = {
    "ResNet-18": """.13 12 .1293  .14 8 .1372  .15 6 .1490  .16 5 .1553  .17 4 .1616  .18 3 .1742
        .19 3 .1742  .20 2 .1995  .21 2 .1995  .22 2 .1995  .23 1 .2247  .24 1 .2247""",
    "ResNet-50": """.13 33 .1298  .14 24 .1391  .15 17 .1494  .16 14 .1577  .17 10 .1693
        .18 8 .1796  .19 6 .1899  .20 5 .1950  .21 4 .2050  .22 3 .2153  .23 2 .2269
        .24 1 .2384""",
}
"""The authors' solutions: fraction asked for, layers in 4 bits (the others have 8), fraction."""


def fraction(network, narrow):
    bits = [4 if name in narrow else 8 for name in network]
    return allocation.paper_fraction(list(network.values()), bits)


@pytest.mark.parametrize(
    ("name", "layers", "total"), [("ResNet-18", 21, 11_678_912), ("ResNet-50", 54, 25_502_912)]
)
def test_all_base_is_a_quarter_and_all_in_4_bits_an_eighth_and_less_is_unreachable(
    name, layers, total
):
    sizes = np.array(list(NETWORKS[name].values()))
    assert (len(sizes), sizes.sum()) == (layers, total)
    assert allocation.paper_fraction(sizes, 8) == 0.25
    assert allocation.paper_fraction(sizes, 4) == 0.125
    loss = np.stack([np.zeros(layers), 1.0 + np.arange(layers)], axis=1)
    cost = np.outer(sizes, [8, 4]) / (32 * total)
    for budget, choice in ((0.25, 0), (0.125, 1)):
        assert (allocate_bits(loss, cost, budget)[0] == choice).all()
    with pytest.raises(UnreachableError, match=r"budget: 0.1249 is below 0.125, the .* raise it"):
        allocate_bits(loss, cost, 0.1249)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_solutions_are_counted_as_published(name):
    """Their layers are not all known: that many layers of such a sum must exist."""
    sizes, unit = np.array(list(NETWORKS[name].values())), 64
    sums = [1] + [0] * len(sizes)  # bit i of entry n: some n layers have i units of weights
    for size in sizes // unit:
        sums = [one | (sums[n - 1] << int(size) if n else 0) for n, one in enumerate(sums)]
    rows = np.array(PUBLISHED[name].split(), float).reshape(-1, 3)
    for asked, layers, achieved in rows:
        assert achieved <= asked
        low, high = (
            (0.25 - achieved + sign * 5e-5) * 8 * sizes.sum() / unit for sign in (-1.0, 1.0)
        )
        within = sums[int(layers)] >> int(np.ceil(low))
        assert within & ((1 << int(high - np.ceil(low)) + 1) - 1)


def test_solutions_that_were_published_by_name_have_their_fractions():
    small, large = NETWORKS["ResNet-18"], NETWORKS["ResNet-50"]
    late = ["3.0.conv2", "3.1.conv1", "4.0.conv1", "4.0.conv2", "4.1.conv1", "4.1.conv2"]
    assert round(fraction(small, {"layer" + name for name in late}), 4) == 0.1490
    last = {name for name in large if name.startswith("layer4") and name != "layer4.0.conv1"}
    assert len(last | {"fc"}) == 10
    assert round(fraction(large, last | {"fc"}), 4) == 0.1693
    wide = {"conv1", "layer3.0.conv1"} | {
        name for name in large if "layer1" in name or ("layer2" in name and "conv2" not in name)
    }
    narrow = large.keys() - wide
    assert len(narrow) == 33
    assert round(fraction(large, narrow), 4) == 0.1298
    assert round(sum(large[name] for name in narrow) / sum(large.values()), 3) == 0.962
    assert round((0.25 - 0.1293) / 0.125, 3) == 0.966  # what ResNet-18 must have in 4 bits


# The whole front.


def pareto(loss, cost):
    choices = np.array(list(itertools.product(range(loss.shape[1]), repeat=len(loss))))
    points = sorted(np.stack([totals(cost, choices), totals(loss, choices)], axis=1).tolist())
    lowest, kept = np.inf, []
    for point in points:
        if point[1] < lowest:
            kept.append(point)
            lowest = point[1]
    return np.array(kept).T


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_all_that_nothing_beats(seed):
    rng = np.random.default_rng(seed)
    loss, cost, _ = random_program(seed, negative=seed % 2)
    loss = rng.integers(-9, 9, loss.shape) if seed % 3 == 0 else loss
    cost = rng.integers(-3, 4, cost.shape)[0] if seed % 4 == 0 else cost[0]
    costs, losses, choices = front(loss, cost, resolution=0)
    expected = pareto(loss, cost)
    np.testing.assert_array_equal(costs, expected[0])
    np.testing.assert_allclose(losses, expected[1], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(totals(cost, choices), costs)
    np.testing.assert_allclose(totals(loss, choices), losses, rtol=1e-12, atol=1e-12)


def test_every_point_of_the_front_is_the_programs_answer_at_its_cost():
    loss, cost, _ = random_program(8, sites=8, choices=3)
    ties = [(1, 4), (2, 3)]
    costs, losses, choices = front(loss, cost[0], ties=ties)
    for budget, least, choice in list(zip(costs, losses, choices, strict=True))[::7]:
        found, info = allocate_bits(loss, cost, budget, ties=ties)
        assert info.loss == pytest.approx(least, rel=1e-12)
        np.testing.assert_array_equal(found, choice)


@pytest.mark.parametrize("resolution", [1e-2, 1e-3, 1e-4])
def test_a_coarse_front_has_few_points_all_of_them_true(resolution):
    rng = np.random.default_rng(0)
    cost = np.exp(rng.normal(0, 2, (40, 1))) * np.arange(2, 9) + rng.random((40, 7)) / 10
    loss = np.exp(rng.normal(0, 2, (40, 1))) * 4.0 ** -np.arange(2, 9)
    costs, losses, choices = front(loss, cost, resolution=resolution)
    assert len(costs) <= 1 / resolution + 2
    np.testing.assert_allclose(totals(cost, choices), costs, rtol=1e-12)
    np.testing.assert_allclose(totals(loss, choices), losses, rtol=1e-9)
    assert (np.diff(costs) > 0).all()
    assert (np.diff(losses) < 0).all()
    assert costs[0] == pytest.approx(cost.min(1).sum())
    assert losses[-1] == pytest.approx(loss.min(1).sum())
    if resolution == 1e-4:
        for share in (0.1, 0.4, 0.8):
            budget = costs[0] + share * (costs[-1] - costs[0])
            exact = allocate_bits(loss, cost, budget)[1].loss
            assert exact <= losses[costs <= budget].min() * (1 + 1e-12) < 1.02 * exact


# The true loss.


def network(seed, bits, sizes=(16, 32, 64, 64, 32, 10)):
    """A network with rounded weights: its relative squared error by the choice of each layer."""
    rng = np.random.default_rng(seed)
    shapes = list(itertools.pairwise(sizes))
    weights = [rng.normal(size=shape) * np.sqrt(1.5 / shape[0]) for shape in shapes]
    x = rng.normal(size=(128, 16))

    def rounded(weight, width):
        step = np.abs(weight).max() / (2 ** (width - 1) - 0.5)
        return step * np.clip(np.round(weight / step), -(2 ** (width - 1)), 2 ** (width - 1) - 1)

    tables = [[rounded(weight, width) for width in bits] for weight in weights]

    def outputs(layers):
        *hidden, last = layers
        value = x
        for layer in hidden:
            value = np.tanh(value @ layer)
        return value @ last

    exact = outputs(weights)

    def true_loss(choice):
        error = outputs([table[c] for table, c in zip(tables, choice, strict=True)]) - exact
        return float(np.mean(error**2) / np.mean(exact**2))

    units = np.eye(len(shapes), dtype=int)
    scores = [[true_loss(unit * c) for c in range(len(bits))] for unit in units]
    cost = np.multiply.outer([weight.size for weight in weights], bits) / 8
    return true_loss, np.array(scores) - true_loss(0 * units[0]), cost


@pytest.mark.parametrize("seed", range(2))
def test_predictions_rank_configurations_of_8_and_4_bits_as_the_true_loss_does(seed):
    true_loss, loss, _ = network(seed, (8, 4))
    choices = np.random.default_rng(9).integers(0, 2, (50, len(loss)))
    measured = [true_loss(choice) for choice in choices]
    assert spearmanr(totals(loss, choices), measured).statistic > 0.95


@pytest.mark.parametrize("seed", range(4))
def test_two_sites_that_interact_are_searched_completely(seed):
    """With two sites every choice is one or two changes away."""
    rng = np.random.default_rng(seed)
    _, cost, budget = random_program(seed, sites=2, choices=4)
    table = rng.normal(size=(4, 4))
    start = cost[0].argmin(1)
    found, lowest, _ = local_search(start, lambda c: table[tuple(c)], cost[0], budget[0])
    best, expected = enumerated(np.zeros((2, 4)), cost, budget, pairs={(0, 1): table})
    assert lowest == best == table[tuple(found)]
    np.testing.assert_array_equal(found, expected)


def test_a_search_repairs_what_additivity_gets_wrong():
    """On four networks at 3.5 bits: additive answers miss the optimum, the search finds it."""
    missed = 0
    for seed in range(4):
        true_loss, loss, cost = network(seed, (8, 4, 3, 2))
        budget = 3.5 / 8 * cost[:, 0].sum()
        start, _ = allocate_bits(loss, cost, budget)
        choice, lowest, evaluations = local_search(start, true_loss, cost, budget, loss=loss)
        choices = np.array(list(itertools.product(range(4), repeat=5)))
        best = min(map(true_loss, choices[totals(cost, choices) <= budget]))
        assert lowest == true_loss(choice) == best
        assert totals(cost, choice) <= budget
        assert evaluations <= 100
        missed += true_loss(start) > best
    assert missed


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_search_is_never_worse_counts_its_evaluations_and_keeps_budgets_and_ties(seed, order):
    loss, cost, budget = random_program(seed, sites=6, choices=3, costs=2)
    ties, table = [(5, 1)], np.random.default_rng(seed).normal(size=[3] * 6)
    calls, said = [], []
    start = np.zeros(6, int)
    budget = np.maximum(budget, totals(cost, start))

    def true_loss(choice):
        calls.append(tuple(choice.tolist()))
        value = table[tuple(choice)]
        return np.nan if value > 1.5 else value

    for evaluations in (1, 7, 1000):
        calls.clear()
        said.clear()
        options = {"loss": loss, "ties": ties, "order": order, "evaluations": evaluations}
        found, lowest, used = local_search(
            start, true_loss, cost, budget, **options, progress=lambda *args: said.append(args)
        )
        assert len(calls) == len(set(calls)) == used <= evaluations
        assert calls[0] == (0,) * 6
        assert lowest == table[tuple(found)] == min(table[call] for call in calls)
        assert all(call[5] == call[1] for call in calls)
        assert (totals(cost, np.array(calls)) <= budget[:, None]).all()
        assert [args[:2] for args in said] == [(n + 1, evaluations) for n in range(used)]
        assert said[-1][2] == f"loss {lowest:.4g} after {used} evaluations"
        again = local_search(start, true_loss, cost, budget, **options)
        np.testing.assert_array_equal(again[0], found)


def test_the_change_that_promises_most_is_tried_first():
    loss = np.array([[0.0, 3.0, 1.0], [0.0, 2.0, 9.0]])
    tried = []

    def true_loss(choice):
        tried.append(choice.tolist())
        return 0.0

    local_search([1, 1], true_loss, np.ones((2, 3)), 2.0, loss=loss)
    singles = [[0, 1], [2, 1], [1, 0], [1, 2]]
    assert tried[:5] == [[1, 1], *singles]
    assert tried[5:] == [[0, 0], [2, 0], [0, 2], [2, 2]]


# Files and counts.


def test_scores_come_back_from_their_file(tmp_path):
    scores = allocation.Scores(
        sites=("params/a/kernel", "params/ü[1]/kernel"),
        weight_bits=np.array([8, 4, 2]),
        act_bits=np.array([8, 8, 4]),
        loss=np.array([[0.0, 0.5, np.inf], [0.0, -0.1, 1e-30]]),
        cost=np.arange(12.0).reshape(2, 2, 3),
        costs=("bytes", "bit operations"),
        base=0.125,
    )
    allocation.save(tmp_path / "scores", scores)
    loaded = allocation.load(tmp_path / "scores")
    for name, ours, theirs in zip(scores._fields, scores, loaded, strict=True):
        assert type(ours) is type(theirs), name
        np.testing.assert_array_equal(ours, theirs, strict=name not in ("sites", "costs", "base"))


@pytest.mark.parametrize("kind", ["empty", "text", "array", "other", "pickle", "cut"])
def test_another_file_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "other.npz"
    with open(path, "wb") as file:
        match kind:
            case "text":
                file.write(b"not numbers at all")
            case "array":
                np.save(file, np.ones(3))
            case "other":
                np.savez(file, loss=np.ones(3))
            case "pickle":
                np.savez(file, **{allocation.HEADER: np.array([{}], object)})
            case "cut":
                ones = np.random.default_rng(0).random((1, 30))
                ones = allocation.Scores(("a",), ones, ones, ones, ones, ("b",), 0.0)
                allocation.save(tmp_path / "whole", ones)
                file.write((tmp_path / "whole").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"other\.npz: not a file of allocation scores"):
        allocation.load(path)
    with pytest.raises(FileNotFoundError):
        allocation.load(tmp_path / "nothing.npz")


def test_bit_operations_and_fractions_by_hand():
    np.testing.assert_array_equal(
        allocation.bit_operations([10, 3], [8, 4, 2], [8, 8, 4]), [[640, 320, 80], [192, 96, 24]]
    )
    assert allocation.paper_fraction([3, 1], [8, 4]) == (24 + 4) / (32 * 4)


# Bad input.

GOOD = {"loss": np.ones((3, 2)), "cost": np.ones((3, 2)), "budget": 3.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": np.ones(3)}, r"loss: must have axes \[site, choice\], not shape \(3,\)"),
        ({"loss": np.ones((0, 2))}, r"loss: .* not shape \(0, 2\)"),
        ({"loss": [[1, 2], [1, np.nan], [0, 0]]}, "loss: site 1 has NaN or -inf; inf forbids"),
        ({"loss": [[1, 2], [1, 2], [0, -np.inf]]}, "loss: site 2 has NaN or -inf"),
        ({"loss": [[1, 2], [np.inf, np.inf], [0, 1]]}, "every choice of site 1 is forbidden"),
        ({"cost": np.ones((2, 3))}, r"cost: must have shape \[3, 2\] or \[k, 3, 2\], not \(2, 3\)"),
        ({"cost": np.full((3, 2), np.nan)}, "cost: site 0 has NaN"),
        ({"cost": np.ones((2, 3, 2))}, r"budget: must be 2 number\(s\), one for each cost, not 3"),
        ({"budget": [3.0, 3.0]}, r"budget: must be 1 number\(s\)"),
        ({"budget": np.nan}, "budget: must be .* not nan"),
        ({"ties": [(0, 3)]}, "ties: must have each site from 0 to 2 at most once"),
        ({"ties": [(0, 1), (1, 2)]}, "ties: must have each site .* at most once"),
        (
            {"loss": [[1, np.inf], [0, 0], [np.inf, 1]], "ties": [(2, 0)]},
            r"ties: sites \[0, 2\] have no choice in common; untie them or allow one",
        ),
        ({"pairs": {(0, 3): np.ones((2, 2))}}, r"pairs: \(0, 3\) is not a pair of sites from 0"),
        ({"pairs": {(0, 1): np.ones((2, 3))}}, r"pairs: \(0, 1\) must be finite and of shape \(2"),
        ({"pairs": {(0, 1): [[1, 2], [3, np.inf]]}}, r"pairs: \(0, 1\) must be finite"),
        ({"time_limit": 0}, "time_limit: must be more than 0 seconds, not 0"),
    ],
)
def test_bad_programs_are_refused_with_a_reason(changed, message):
    with pytest.raises(ValueError, match=message):
        allocate_bits(**GOOD | changed)


def test_an_unreachable_budget_says_what_can_be_reached():
    loss, cost = np.zeros((3, 2)), np.array([[2.0, 1.0], [2.0, 1.5], [8.0, 4.0]])
    with pytest.raises(UnreachableError, match=r"budget: 6 is below 6.5, the smallest") as error:
        allocate_bits(loss, cost, 6)
    assert error.value.best == 6.5
    with pytest.raises(UnreachableError, match=r"budget: 6.5 is below 10.5") as error:
        allocate_bits([[0, 0], [0, 0], [0, np.inf]], cost, 6.5, ties=[(0, 1)])
    assert error.value.best == 10.5
    with pytest.raises(UnreachableError, match=r"budget\[1\]: 6 is below 6.5") as error:
        allocate_bits(loss, [cost, cost], [7, 6])


@pytest.mark.parametrize("budgets", [2, 3])
def test_budgets_that_exclude_each_other_say_so(budgets):
    """Cheap for the one cost is dear for the other: 1 and 3, or 3 and 1, for each of two sites."""
    cost = np.array([[[1, 3], [1, 3]], [[3, 1], [3, 1]], [[1, 1], [1, 1]]])[:budgets]
    words = "budget: .* cannot be met together; with the others met, budget"
    with pytest.raises(UnreachableError, match=words) as error:
        allocate_bits(np.zeros((2, 2)), cost, [2, 5, 2][:budgets])
    assert error.value.best == 6.0
    assert "budget[1] needs at least 6" in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"order": 3}, "order: must be 1 or 2, not 3"),
        ({"evaluations": 0}, "evaluations: must be at least 1, for the start, not 0"),
        ({"choice": [0, 0]}, r"choice: must be 2 whole numbers below 3|choice: must be 3"),
        ({"choice": [0, 0, 2]}, "choice: must be 3 whole numbers below 2, not"),
        ({"choice": [0, 0, 0.5]}, "choice: must be 3 whole numbers below 2"),
        ({"choice": [1, 1, 1]}, r"choice: is forbidden or over the budget, \[6.\] of \[4.\]"),
        ({"choice": [0, 0, 1], "ties": [(0, 2)]}, "choice: tied sites differ"),
        ({"loss": [[np.inf, 0], [0, 0], [0, 0]]}, "choice: is forbidden or over the budget"),
    ],
)
def test_a_bad_start_is_refused(changed, message):
    good = {"choice": [0, 0, 0], "true_loss": np.sum, "cost": [[1, 2]] * 3, "budget": 4}
    with pytest.raises(ValueError, match=message):
        local_search(**good | changed)


def test_a_bad_front_is_refused():
    with pytest.raises(ValueError, match=r"resolution: must be from 0 to 1, not -1"):
        front(np.ones((2, 2)), np.ones((2, 2)), resolution=-1)
    with pytest.raises(ValueError, match=r"cost: must have axes \[site, choice\]"):
        front(np.ones((2, 2)), np.ones((2, 2, 2)))


def test_two_hundred_sites_are_solved_while_one_waits():
    """Quick enough to be called for many budgets; seconds are asserted far from what they are."""
    rng = np.random.default_rng(0)
    sizes, bits = np.exp(rng.uniform(6, 15, (200, 1))).round(), np.arange(2, 9)
    loss = np.exp(rng.normal(0, 2, (200, 1))) * 4.0**-bits * np.exp(rng.normal(0, 0.2, (200, 7)))
    start = time.perf_counter()
    _, info = allocate_bits(loss, sizes * bits, 4 * sizes.sum())
    assert time.perf_counter() - start < 10.0
    assert info.status == "optimal"
    costs, losses, _ = front(loss, sizes * bits)
    assert 1.0 - 1e-12 <= losses[costs <= 4 * sizes.sum()].min() / info.loss < 1.001


def test_54_sites_with_pairs_of_neighbours_are_solved_exactly():
    rng = np.random.default_rng(1)
    sizes, bits = np.exp(rng.uniform(6, 15, (54, 1))).round(), np.array([8, 4, 3])
    loss = np.exp(rng.normal(0, 2, (54, 1))) * 4.0**-bits
    size = np.sqrt(loss)
    pairs = {
        (s, s + 1): rng.normal(0, 0.3, (3, 3)) * np.outer(size[s], size[s + 1]) for s in range(53)
    }
    budget = 5 * sizes.sum()
    choice, info = allocate_bits(loss, sizes * bits, budget, pairs=pairs)
    check(loss, sizes * bits, budget, choice, info, pairs=pairs)

    def value(choice):
        terms = [term[choice[s], choice[t]] for (s, t), term in pairs.items()]
        return totals(loss, choice) + sum(terms)

    _, lowest, _ = local_search(choice, value, sizes * bits, budget, loss=loss, evaluations=3000)
    assert lowest == pytest.approx(info.loss, rel=1e-9)
