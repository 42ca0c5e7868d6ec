r"""Which width each site gets, so that the whole fits a budget at the least loss.

Every site s of a model takes one choice c of a few, such as 8, 4 or 2 bits. A choice has a cost,
for example in bytes, and a loss: what the model loses if this site alone takes it. With variables
:math:`x_{sc}`, 1 where a choice is taken and else 0, the integer program is

.. math::
    \min_x \sum_{s,c} L_{sc}\, x_{sc} \quad\text{where}\quad
    \sum_c x_{sc} = 1, \quad \sum_{s,c} C_{ksc}\, x_{sc} \le B_k.

It takes losses to add up. Where sites interact, pair terms :math:`G_{sa,tb}\, x_{sa} x_{tb}` join
the sum, and :func:`local_search` has the last word, on the true loss.

:func:`allocate_bits` solves the program for given budgets, :func:`front` for all values of one
budget at once. Losses and costs can have any unit and size: all tolerances are relative.

Source: Hubara et al., `Improving Post Training Neural Quantization: Layer-wise Calibration and
Integer Programming <https://arxiv.org/abs/2006.10518>`_, 2020, section on integer programming, and
its authors' released code. Pair terms: Deng et al., `Mixed-Precision Quantization with
Cross-Layer Dependencies <https://arxiv.org/abs/2307.05657>`_, 2023 (CLADO).

Differs from the paper in: costs are bounded and the loss is minimised, which is the direction of
the code; the paper's is the same function with ``loss`` and ``cost`` swapped. Negative losses stay
negative, the code makes them 1e-6. Several budgets, tied sites, pair terms as measured (CLADO makes
their matrix positive semidefinite first, which can change the answer) and the search on the true
loss are not in the paper.
"""

import os
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import fsum
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from lnq.types import Progress, UnreachableError

__all__ = [
    "Allocation",
    "Scores",
    "allocate_bits",
    "bit_operations",
    "front",
    "load",
    "local_search",
    "paper_fraction",
    "save",
]

Ties: TypeAlias = Sequence[Sequence[int]]
"""Groups of site numbers; the sites of a group take the same choice."""

Pairs: TypeAlias = Mapping[tuple[int, int], ArrayLike]
"""``pairs[s, t][a, b]`` joins the loss where site s takes choice a and site t takes b."""

FEASIBLE = 2
"""What HiGHS says of a solution that meets all constraints."""

OPTIONS = dict.fromkeys(
    [
        "mip_rel_gap",  # the default stops at a gap of 1e-4
        "mip_abs_gap",
        "mip_feasibility_tolerance",
        "primal_feasibility_tolerance",
        "dual_feasibility_tolerance",
    ],
    1e-9,
)
"""Tolerances of HiGHS; the absolute ones are for numbers of the size of ``SCALE``."""

ROUNDING = 1e-12
"""By how much of its size a budget may be exceeded, so that the order of a sum does not matter."""

SCALE, RANGE = 1e3, 1e3
"""The largest number that HiGHS sees, and the largest loss over the total, see :func:`_solve`."""

STATUS = {
    "optimal": "optimal",
    "user_limit": "time limit",
    "infeasible": "infeasible",
    "infeasible_or_unbounded": "infeasible",
}
"""Of cvxpy, in our words."""


class Allocation(NamedTuple):
    """How good a choice is.

    Attributes:
      status: "optimal", or "time limit" for the best that was found until then.
      loss: Predicted total, in the unit of the losses.
      cost: Total for each budget, float64 of the shape of ``budget``.
      bound: No choice has a smaller predicted total.
      gap: ``(loss - bound) / |loss|``; ``loss - bound`` where the loss is 0.
    """

    status: str
    loss: float
    cost: np.ndarray
    bound: float
    gap: float


class Scores(NamedTuple):
    """What one scoring pass found, for any number of budgets; s sites, c choices, k costs.

    Attributes:
      sites: Names, ``[s]``.
      weight_bits: Bits of the weights in each choice, ``[c]``.
      act_bits: Bits of the data at the sites in each choice, ``[c]``.
      loss: Increase over ``base`` if this site alone takes this choice, ``[s, c]``.
      cost: Of each choice, ``[k, s, c]``.
      costs: What each cost counts, with its unit, such as "bytes" or "bit operations", ``[k]``.
      base: The loss from which all sites start.
    """

    sites: tuple[str, ...]
    weight_bits: np.ndarray
    act_bits: np.ndarray
    loss: np.ndarray
    cost: np.ndarray
    costs: tuple[str, ...]
    base: float


def paper_fraction(sizes: ArrayLike, bits: ArrayLike) -> float:
    r"""Size by the paper's count: :math:`\sum_s n_s b_s / (32 \sum_s n_s)`.

    It counts weights of the sites in the program only: no biases, scales or tables, and no layer
    that is left out. The size of a file is larger.

    Args:
      sizes: Weights of each site, ``[s]``.
      bits: Bits of each site's weights, a number or ``[s]``.

    Returns:
      Fraction of the size in 32-bit floats.

    Example:
      >>> paper_fraction([300, 100], [4, 8])  # (1200 + 800) / 12800
      0.15625
    """
    sizes = np.asarray(sizes, np.float64)
    return float(np.sum(sizes * np.asarray(bits, np.float64)) / (32.0 * sizes.sum()))


def bit_operations(macs: ArrayLike, weight_bits: ArrayLike, act_bits: ArrayLike) -> np.ndarray:
    """Multiplications, times bits of the one factor, times bits of the other: one of the costs.

    Args:
      macs: Multiplications of each site, ``[s]``.
      weight_bits: Bits of the weights in each choice, ``[c]``.
      act_bits: Bits of the data in each choice, ``[c]``.

    Returns:
      Bit operations, float64 ``[s, c]``.

    Example:
      >>> bit_operations([100, 1000], [8, 4], [8, 8])
      array([[ 6400.,  3200.],
             [64000., 32000.]])
    """
    bits = np.asarray(weight_bits, np.float64) * np.asarray(act_bits, np.float64)
    return np.multiply.outer(np.asarray(macs, np.float64), bits)


def allocate_bits(
    loss: ArrayLike,
    cost: ArrayLike,
    budget: ArrayLike,
    *,
    ties: Ties = (),
    pairs: Pairs | None = None,
    time_limit: float | None = None,
) -> tuple[np.ndarray, Allocation]:
    """The choice for each site of least total loss within the budgets.

    Swap ``loss`` and ``cost`` for the other direction: the least cost with a loss of at most so
    much. Of choices of one site with the same loss the cheaper is taken, if there are no pairs.

    Args:
      loss: Of each choice, ``[s, c]``; any size and sign; infinity forbids a choice.
      cost: Of each choice, ``[s, c]``, or ``[k, s, c]`` for k budgets; infinity likewise.
      budget: Largest total cost, a number or ``[k]``; infinity for no limit.
      ties: Groups of site numbers that share one choice.
      pairs: Losses that are added for pairs of choices, ``[c, c]`` each, of any sign. Each pair
        adds c squared variables: keep those of neighbours, or set a time limit.
      time_limit: Seconds after which the best choice so far is taken; no limit if None.

    Returns:
      Choice, int64 ``[s]``, and how good it is.

    Raises:
      ValueError: If scores are NaN, shapes do not agree, or a site has no choice left.
      UnreachableError: If no choice meets the budgets; ``best`` is the least total cost, for
        budgets that cannot be met together that of the last one with the others met.
      TimeoutError: If the time limit passes before anything is found.

    Example:
      >>> loss = [[4, 1, 0], [9, 2, 0]]
      >>> cost = [[1, 2, 3], [1, 2, 3]]
      >>> choice, info = allocate_bits(loss, cost, budget=5)  # 1 + 0 with cost 2 + 3
      >>> choice
      array([1, 2])
      >>> info.loss, float(info.cost), info.status
      (1.0, 5.0, 'optimal')
      >>> choice, info = allocate_bits(cost, loss, budget=3)  # least cost with a loss of at most 3
      >>> choice, info.loss
      (array([1, 1]), 4.0)

    References:
      Hubara et al. 2020, section on integer programming.
    """
    if time_limit is not None and not time_limit > 0:
        raise ValueError(
            f"time_limit: must be more than 0 seconds, not {time_limit} (None is no limit)"
        )
    program = _program(loss, cost, budget, ties, pairs)
    _check_reachable(program)
    solved = _solve(program if pairs else _without_dominated(program), time_limit)
    if solved is None:
        _raise_together(program, time_limit)
    grouped, excess, status = solved
    total, costs = _totals(program, grouped)
    size = abs(program.limit) + abs(program.cost.min(2)).sum(1)
    if not np.isfinite(total) or (costs > program.limit + 1e-9 * size).any():
        raise ArithmeticError(f"HiGHS: total cost {costs} is not within {program.budget}")
    gap = excess / abs(total) if excess and total else excess
    info = Allocation(status, total, costs.reshape(np.shape(budget)), total - excess, gap)
    return grouped[program.owner], info


def front(
    loss: ArrayLike, cost: ArrayLike, *, ties: Ties = (), resolution: float = 1e-5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All choices that no other beats in both total loss and total cost.

    Site by site, every total so far meets every choice, and of these sums those stay that are
    lower in loss than all cheaper ones. That is exact, but sums of arbitrary costs can be many, so
    one sum in each of ``1 / resolution`` cells of cost stays, that of least loss. A point's cost
    and loss are those of its choice in any case.

    Args:
      loss: Of each choice, ``[s, c]``; infinity forbids a choice.
      cost: Of each choice, ``[s, c]``.
      ties: Groups of site numbers that share one choice.
      resolution: Width of a cell, as a fraction of the range of total costs; 0 is exact.

    Returns:
      Costs, float64 ``[f]``, rising; losses, float64 ``[f]``, falling; choices, int64 ``[f, s]``.

    Raises:
      ValueError: As :func:`allocate_bits`.

    Example:
      >>> costs, losses, choices = front([[4, 1, 0], [9, 2, 0]], [[1, 2, 3], [1, 2, 3]])
      >>> costs, losses
      (array([2., 3., 4., 5., 6.]), array([13.,  6.,  3.,  1.,  0.]))
      >>> choices[3]
      array([1, 2])
    """
    if not 0.0 <= resolution < 1.0:
        raise ValueError(f"resolution: must be from 0 to 1, not {resolution}")
    if np.ndim(cost) != 2:
        raise ValueError(f"cost: must have axes [site, choice], not shape {np.shape(cost)}")
    program = _program(loss, cost, np.inf, ties)
    allowed, costs = np.isfinite(program.loss), program.cost[0]
    spread = np.where(allowed, costs, -np.inf).max(1) - np.where(allowed, costs, np.inf).min(1)
    sums, values, steps = np.zeros(1), np.zeros(1), []
    for group, options in enumerate(map(np.flatnonzero, allowed)):
        before = len(sums)
        sums = (sums + costs[group, options, None]).ravel()
        values = (values + program.loss[group, options, None]).ravel()
        order = np.argsort(sums, kind="stable")  # quick, as they are c sorted runs
        order = order[_lowest(sums[order], values[order], resolution * spread.sum())]
        steps.append((order % before, options[order // before]))
        sums, values = sums[order], values[order]
    return sums, values, _walked_back(steps)[:, program.owner]


def local_search(
    choice: ArrayLike,
    true_loss: Callable[[np.ndarray], Any],
    cost: ArrayLike,
    budget: ArrayLike,
    *,
    loss: ArrayLike | None = None,
    ties: Ties = (),
    order: int = 2,
    evaluations: int = 100,
    progress: Progress | None = None,
) -> tuple[np.ndarray, float, int]:
    """Improve a choice on the true loss by small changes within the budgets.

    Tries changes of one site, then of two (one down, so that another can go up), and starts again
    from the first that is better, until none is. No choice is evaluated twice.

    Args:
      choice: Where to start, within the budgets, ``[s]``.
      true_loss: Of a choice ``[s]``; deterministic; NaN counts as infinity.
      cost: As in :func:`allocate_bits`.
      budget: As there.
      loss: As there; changes are tried by what it predicts, best first, without it by site.
      ties: As there.
      order: Sites that change at once, at most: 1 or 2.
      evaluations: How often ``true_loss`` is called, at most, the start included.
      progress: Called after each evaluation.

    Returns:
      The best choice, int64 ``[s]``, its true loss, and the evaluations made.

    Raises:
      ValueError: If the start exceeds a budget or breaks a tie, and as :func:`allocate_bits`.

    Example:
      >>> def true_loss(choice):  # the second site matters only if the first has few bits
      ...     return float((2 - choice[0]) * (3 - choice[1]))
      >>> local_search([0, 2], true_loss, [[1, 2, 3], [1, 2, 3]], budget=4)
      (array([2, 0]), 0.0, 6)
    """
    if order not in (1, 2):
        raise ValueError(f"order: must be 1 or 2, not {order!r}")
    if evaluations < 1:
        raise ValueError(f"evaluations: must be at least 1, for the start, not {evaluations}")
    shape = np.shape(cost)[-2:]
    program = _program(np.zeros(shape) if loss is None else loss, cost, budget, ties)
    best = _grouped(program, choice)
    seen: dict[bytes, float] = {}

    def measure(grouped: np.ndarray) -> float:
        value = float(true_loss(grouped[program.owner]))
        seen[grouped.tobytes()] = value = np.inf if np.isnan(value) else value
        if progress:
            lowest = min(seen.values())
            progress(len(seen), evaluations, f"loss {lowest:.4g} after {len(seen)} evaluations")
        return value

    lowest, improved = measure(best), True
    while improved:
        improved = False
        for moved in _moves(program, best, order):
            if len(seen) == evaluations:
                break
            if moved.tobytes() not in seen and (value := measure(moved)) < lowest:
                best, lowest, improved = moved, value, True
                break
    return best[program.owner], lowest, len(seen)


def save(path: str | os.PathLike, scores: Scores) -> None:
    """Write scores to an ``.npz`` file, for other budgets."""
    with open(path, "wb") as file:
        np.savez_compressed(file, **{HEADER: "1"}, **scores._asdict())


def load(path: str | os.PathLike) -> Scores:
    """Read what :func:`save` wrote.

    Raises:
      ValueError: If the file is something else.
    """
    with open(path, "rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                found = {name: file[name] for name in (HEADER, *Scores._fields)}
        except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
            raise ValueError(f"{os.fspath(path)}: not a file of allocation scores") from None
    del found[HEADER]
    scores = Scores(**found)
    names = {"sites": tuple(map(str, scores.sites)), "costs": tuple(map(str, scores.costs))}
    return scores._replace(**names, base=float(scores.base))


HEADER = "__allocation_scores__"


class _Program(NamedTuple):
    """The program over g groups of tied sites; losses and costs of what is forbidden are inf."""

    loss: np.ndarray  # [g, c]
    cost: np.ndarray  # [k, g, c]
    budget: np.ndarray  # [k]
    limit: np.ndarray  # [k], the budget and what rounding may add
    pairs: dict[tuple[int, int], np.ndarray]  # [c, c], between groups
    owner: np.ndarray  # [s], the group of each site


def _program(
    loss: ArrayLike, cost: ArrayLike, budget: ArrayLike, ties: Ties, pairs: Pairs | None = None
) -> _Program:
    loss, cost = np.array(loss, np.float64), np.array(cost, np.float64)
    budget = np.asarray(budget, np.float64)
    if loss.ndim != 2 or not loss.size:
        raise ValueError(f"loss: must have axes [site, choice], not shape {loss.shape}")
    if cost.ndim not in (2, 3) or cost.shape[-2:] != loss.shape or not cost.size:
        shape = ", ".join(map(str, loss.shape))
        raise ValueError(f"cost: must have shape [{shape}] or [k, {shape}], not {cost.shape}")
    cost = cost.reshape(-1, *loss.shape)
    if budget.ndim > 1 or budget.size != len(cost) or not (budget > -np.inf).all():
        raise ValueError(f"budget: must be {len(cost)} number(s), one for each cost, not {budget}")
    for name, table in (("loss", loss), ("cost", cost)):
        if (bad := np.isnan(table) | (table == -np.inf)).any():
            site = np.nonzero(bad)[-2][0]
            raise ValueError(f"{name}: site {site} has NaN or -inf; inf forbids a choice")
    forbidden = np.isinf(loss) | np.isinf(cost).any(0)
    loss[forbidden], cost[:, forbidden] = np.inf, np.inf
    if (bad := forbidden.all(1)).any():
        raise ValueError(f"loss: every choice of site {bad.argmax()} is forbidden; leave one")
    owner = _owners(ties, len(loss))
    members = [np.flatnonzero(owner == group) for group in range(owner.max() + 1)]
    loss = np.stack([loss[sites].sum(0) for sites in members])
    cost = np.stack([cost[:, sites].sum(1) for sites in members], axis=1)
    if (bad := np.isinf(loss).all(1)).any():
        sites = members[bad.argmax()].tolist()
        raise ValueError(f"ties: sites {sites} have no choice in common; untie them or allow one")
    between = _between_groups(pairs or {}, owner, loss)
    limit = budget + ROUNDING * (abs(budget) + abs(cost.min(2)).sum(1))
    return _Program(loss, cost, budget.reshape(-1), limit.reshape(-1), between, owner)


def _owners(ties: Ties, sites: int) -> np.ndarray:
    """The number of each site's group, ``[s]``."""
    owner = np.arange(sites)
    tied = [site for group in ties for site in group]
    if len(set(tied)) < len(tied) or not set(tied) <= set(range(sites)):
        raise ValueError(
            f"ties: must have each site from 0 to {sites - 1} at most once, not {ties}"
        )
    for group in filter(len, ties):
        owner[list(group)] = group[0]
    return np.unique(owner, return_inverse=True)[1]


def _between_groups(
    pairs: Pairs, owner: np.ndarray, loss: np.ndarray
) -> dict[tuple[int, int], np.ndarray]:
    """Pair terms of groups; those within a group are added to its losses."""
    between: dict[tuple[int, int], np.ndarray] = {}
    shape = loss.shape[1], loss.shape[1]
    for (s, t), given in pairs.items():
        term = np.asarray(given, np.float64)
        if not {s, t} <= set(range(len(owner))):
            raise ValueError(f"pairs: {(s, t)} is not a pair of sites from 0 to {len(owner) - 1}")
        if term.shape != shape or not np.isfinite(term).all():
            raise ValueError(f"pairs: {(s, t)} must be finite and of shape {shape}, not {given}")
        g, h = owner[s], owner[t]
        if g == h:
            loss[g] += np.diag(term)
        elif g < h:
            between[g, h] = between.get((g, h), 0.0) + term
        else:
            between[h, g] = between.get((h, g), 0.0) + term.T
    return between


def _check_reachable(program: _Program) -> None:
    for k, least in enumerate(map(fsum, program.cost.min(2))):
        if least > program.limit[k]:
            name = "budget" if len(program.budget) == 1 else f"budget[{k}]"
            raise UnreachableError(
                f"{name}: {program.budget[k]:.10g} is below {least:.10g}, the smallest total cost; "
                "raise it or add cheaper choices",
                best=least,
            )


def _raise_together(program: _Program, time_limit: float | None) -> NoReturn:
    """Each budget can be met, but not all: what the last one needs with the others met."""
    *others, _ = program.budget
    rest = program.cost[-1], program.cost[:-1], others
    _, info = allocate_bits(*rest, time_limit=time_limit)
    raise UnreachableError(
        f"budget: {program.budget.tolist()} cannot be met together; with the others met, "
        f"budget[{len(others)}] needs at least {info.loss:.10g}",
        best=info.loss,
    )


def _without_dominated(program: _Program) -> _Program:
    """Forbids what another choice of the group beats or equals in loss and all costs."""
    table = np.concatenate([program.loss[None], program.cost])
    no_worse = np.all(table[..., :, None] <= table[..., None, :], axis=0)  # [g, a, b]: a than b
    first = np.triu(np.ones(no_worse.shape[1:], bool), 1)
    dominated = (no_worse & (~np.swapaxes(no_worse, 1, 2) | first)).any(1)
    loss, cost = (np.where(dominated, np.inf, table) for table in (program.loss, program.cost))
    return program._replace(loss=loss, cost=cost)


def _solve(program: _Program, time_limit: float | None) -> tuple[np.ndarray, float, str] | None:
    """Choice ``[g]``, how far it is from the bound, and the status; None if none is feasible.

    Losses count from the least of each group, so that none is negative. One huge loss would hide
    from the solver the differences that matter. But a loss above the total of some solution is
    part of no better one, and may as well be twice that total: then it is solved again.
    """
    end = np.inf if time_limit is None else time.monotonic() + time_limit
    loss = program.loss - program.loss.min(1, keepdims=True)
    pairs = {key: term - term.min() for key, term in program.pairs.items()}
    shifted = program._replace(loss=loss, pairs=pairs)
    top = max([loss[np.isfinite(loss)].max(), *(term.max() for term in pairs.values())]) or 1.0
    best, lowest = None, np.inf
    while True:
        status, choice, bound = _highs(shifted, top, end - time.monotonic())
        if choice is not None and (total := _totals(shifted, choice)[0]) < lowest:
            best, lowest = choice, total
        if status != "optimal" or lowest == 0.0 or lowest >= top / RANGE:
            break
        top = 2.0 * lowest
    if best is not None:
        status = "optimal" if status == "optimal" else "time limit"
        return best, float(max(lowest - max(bound, 0.0), 0.0)), status
    if status == "infeasible":
        return None
    raise TimeoutError(f"time_limit: nothing found within {time_limit} s; allow more")


def _highs(program: _Program, top: float, seconds: float) -> tuple[str, np.ndarray | None, float]:
    """Status, choice ``[g]`` and bound, with losses above ``top`` taken as ``top``."""
    import cvxpy as cp

    def scaled(table: np.ndarray) -> np.ndarray:
        return SCALE * np.minimum(table / top, 1.0).reshape(len(table), -1)

    groups, choices = program.loss.shape
    x = cp.Variable((groups, choices), boolean=True)
    cost = _over_least(program).reshape(-1, groups * choices)
    constraints = [cp.sum(x, axis=1) == 1, (SCALE * cost) @ cp.vec(x, order="C") <= SCALE]
    loss = cp.sum(cp.multiply(scaled(program.loss), x))
    if program.pairs:
        y = cp.Variable((len(program.pairs), choices * choices), nonneg=True)  # products x_sa x_tb
        first, second = map(list, zip(*program.pairs, strict=True))
        one, each = np.ones((choices, 1)), np.eye(choices)
        constraints += [y @ np.kron(each, one) == x[first], y @ np.kron(one, each) == x[second]]
        loss += cp.sum(cp.multiply(scaled(np.stack(list(program.pairs.values()))), y))
    problem = cp.Problem(cp.Minimize(loss), constraints)
    limit = {} if np.isinf(seconds) else {"time_limit": max(seconds, 0.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate", at the time limit
        problem.solve(solver="HIGHS", **OPTIONS, **limit)
    stats: Any = problem.solver_stats and problem.solver_stats.extra_stats
    status = STATUS[problem.status]
    if status == "infeasible" or stats.primal_solution_status != FEASIBLE:
        return status, None, -np.inf
    return status, np.asarray(x.value).argmax(1), stats.mip_dual_bound * top / SCALE


def _over_least(program: _Program) -> np.ndarray:
    """Costs over the least of each group as fractions of what the budgets leave, ``[k, g, c]``.

    At most 2, which is as good as any cost that leaves no room.
    """
    least = program.cost.min(2, keepdims=True)
    over = program.cost - least
    most = np.where(np.isinf(over), 0.0, over).max(2).sum(1)
    room = np.minimum(program.limit - least.sum((1, 2)), most)
    room = np.maximum(room, np.finfo(float).tiny)[:, None, None]
    with np.errstate(over="ignore"):
        return np.minimum(over / room, 2.0)


def _totals(program: _Program, choice: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and costs ``[k]`` of a choice of each group, summed without rounding errors."""
    groups = np.arange(len(choice))
    terms = [term[choice[g], choice[h]] for (g, h), term in program.pairs.items()]
    costs = [fsum(row) for row in program.cost[:, groups, choice]]
    return fsum([*program.loss[groups, choice], *terms]), np.array(costs)


def _lowest(cost: np.ndarray, loss: np.ndarray, width: float) -> np.ndarray:
    """Where the loss is below that of all that is cheaper, once in each cell; costs are sorted."""
    falls = np.flatnonzero(np.r_[True, loss[1:] < np.minimum.accumulate(loss)[:-1]])
    cell = np.floor((cost[falls] - cost[0]) / width) if width else cost[falls]
    last = np.r_[cell[1:] > cell[:-1], True]
    last[np.searchsorted(cost[falls], cost[0], "right") - 1] = True  # the cheapest is always there
    return falls[last]


def _walked_back(steps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Choices ``[f, g]`` from the predecessors and choices of each step."""
    at = np.arange(len(steps[-1][0]))
    choice = np.empty((len(at), len(steps)), int)
    for group in reversed(range(len(steps))):
        before, option = steps[group]
        choice[:, group], at = option[at], before[at]
    return choice


def _grouped(program: _Program, choice: ArrayLike) -> np.ndarray:
    """The choice of each group, checked."""
    choice, (groups, choices) = np.asarray(choice), program.loss.shape
    if choice.shape != program.owner.shape or not set(choice.tolist()) <= set(range(choices)):
        expected = f"{len(program.owner)} whole numbers below {choices}"
        raise ValueError(f"choice: must be {expected}, not {choice}")
    grouped = np.zeros(groups, int)
    grouped[program.owner] = choice
    if (grouped[program.owner] != choice).any():
        raise ValueError("choice: tied sites differ; start from a choice that keeps the ties")
    total, costs = _totals(program, grouped)
    if np.isinf(total) or (costs > program.limit).any():
        raise ValueError(
            f"choice: is forbidden or over the budget, {costs} of {program.budget}; "
            "start from what allocate_bits returns"
        )
    return grouped


def _moves(program: _Program, choice: np.ndarray, order: int) -> Iterator[np.ndarray]:
    """Changes of one group, then of two, that fit the budgets; best prediction first."""
    groups = np.arange(len(choice))
    allowed = np.isfinite(program.loss)
    allowed[groups, choice] = False
    group, option = np.nonzero(allowed)
    now = program.cost[:, groups, choice]
    more = program.cost[:, group, option] - now[:, group]
    gain = program.loss[groups, choice][group] - program.loss[group, option]
    room = program.limit - now.sum(1)
    single, pair = np.arange(len(group))[None], np.stack(np.triu_indices(len(group), 1))
    for moves in (single, pair[:, group[pair[0]] != group[pair[1]]])[:order]:
        moves = moves[:, (more[:, moves].sum(1) <= room[:, None]).all(0)]
        for move in moves[:, np.argsort(-gain[moves].sum(0), kind="stable")].T:
            moved = choice.copy()
            moved[group[move]] = option[move]
            yield moved
