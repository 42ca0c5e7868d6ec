"""Light and advanced: the best model that fits a budget of bytes.

Both give every layer the width that the whole can afford, by an integer program over what each
layer loses by itself, and then repair what rounding did to the means and deviations of channels:

=====================  =======================================  ====================================
step                   :func:`light` (no gradients)             :func:`advanced`
=====================  =======================================  ====================================
fold                   batch-norm into the weights              the same
fit, at every choice   grids of least squared error             AdaQuant, each layer by itself
score                  the loss with this layer alone switched  the same
allocate               integer program                          the same, and swaps on the true loss
refit                                                           one after another, at their widths
reconstruct            means and deviations of channels         the same
tune biases                                                     against the float model's outputs
=====================  =======================================  ====================================

Source: Hubara et al., `Improving Post Training Neural Quantization: Layer-wise Calibration and
Integer Programming <https://arxiv.org/abs/2006.10518>`_, 2020, and its authors' released code.

Differs from the paper and the code in: no labels, the loss is the divergence from the float model;
a budget counts the whole file, biases, steps and zero points included (``paper_fraction`` is the
paper's count); choices are 8 to 2 bits for weights, with data in 8 bits (:data:`PUBLISHED` has the
paper's); layers are refitted in sequence once their widths are known, where the paper stitches; a
repair that does not lower the loss is not kept.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lnq import adaquant, allocation, ans, calibration, container, distortion, sites, tree, tuning
from lnq.adaquant import Fit, Outcome, Problem
from lnq.allocation import Allocation, Scores
from lnq.quantizer import QTensor
from lnq.types import ApplyFn, LossFn, Params, Progress, Select, UnreachableError
from lnq.widths import Widths

__all__ = [
    "CHOICES",
    "PUBLISHED",
    "PipelineInfo",
    "Scored",
    "Step",
    "advanced",
    "fixed_bytes",
    "light",
    "score",
    "tree_of",
]

Choices = Sequence[tuple[int, int]]
"""Widths of weights and data that a layer may have; the first is where it starts."""

CHOICES: Choices = ((8, 8), (6, 8), (5, 8), (4, 8), (3, 8), (2, 8))

PUBLISHED: Choices = ((8, 8), (4, 4))

Distance = Callable[[Any, Any], jax.Array]

TIE = 1e-3
"""What a layer's own error counts beside the model's loss, where that shows no difference."""


class Scored(NamedTuple):
    """What one pass over layers and choices found; serves any number of budgets.

    Attributes:
      apply_fn: The model.
      params: Its parameters, folded.
      problem: The model taken apart into layers.
      choices: As given.
      fits: Of each layer at each choice, by choice and name.
      scores: Loss of each layer at each choice; costs "bytes" and "coded bytes".
      rest: Bytes of everything that is no layer's.
      loss: ``loss(tree) -> float``, of quantized leaves or those of :func:`~lnq.adaquant.place`.
      judged_by: ``loss_fn`` and ``distance``, as given.
    """

    apply_fn: ApplyFn
    params: Params
    problem: Problem
    choices: Choices
    fits: Mapping[tuple[int, int], Mapping[str, Outcome]]
    scores: Scores
    rest: int
    loss: Callable[[Params], float]
    judged_by: Mapping[str, Any]


class Step(NamedTuple):
    """One step of a pipeline, and the loss on the calibration set before and behind it."""

    name: str
    before: float
    after: float
    kept: bool


class PipelineInfo(NamedTuple):
    """Outcome of a pipeline.

    Attributes:
      steps: In order.
      widths: Bits of weights and data, by layer.
      allocation: How good the integer program's answer is.
      bytes: Of the fixed-length file, or of the ``.lnq`` file if ``coded``.
      fraction: These over the bytes of the float32 model.
      paper_fraction: The paper's count: weights of the layers alone.
      scored: For other budgets.
    """

    steps: tuple[Step, ...]
    widths: Mapping[str, tuple[int, int]]
    allocation: Allocation
    bytes: int
    fraction: float
    paper_fraction: float
    scored: Scored


def fixed_bytes(leaf: Any) -> int:
    """Bytes of a leaf in a file of fixed-length codes: codes, steps and zero points in float32.

    Example:
      >>> from lnq import aciq
      >>> fixed_bytes(aciq.quantize_array(jax.numpy.ones((10, 4)), 4))  # 20 and 4 times 8
      52
    """
    if not isinstance(leaf, QTensor):
        return leaf.size * leaf.dtype.itemsize
    bits = np.broadcast_to(leaf.qparams.bits, leaf.qparams.scale.shape)
    codes = int(np.ceil(bits.mean() * leaf.size / 8.0))
    return codes + _grid_bytes(leaf)


def _grid_bytes(leaf: QTensor) -> int:
    grids = [leaf.qparams, *(act for act in leaf.acts if act is not None)]
    return sum(4 * (grid.scale.size + grid.zero_point.size) for grid in grids)


def _coded_bytes(leaf: QTensor) -> int:
    """By the entropy of its codes; the file adds a header, and gains by tables for parts of it."""
    values = np.asarray(leaf.codes)
    return int(np.ceil(ans.entropy_bits(ans.histogram(values)[1]) / 8.0)) + _grid_bytes(leaf)


def score(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    choices: Choices = CHOICES,
    loss_fn: LossFn | None = None,
    distance: Distance = distortion.kl,
    skip: Select | None = None,
    fold: bool = True,
    state: Mapping[tuple[int, int], Mapping[str, Outcome]] | None = None,
    on_site: Callable[[Mapping[tuple[int, int], Mapping[str, Outcome]]], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Scored:
    """Fit every layer at every choice, and measure what the model loses by it.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Examples, a few hundred; with labels if ``loss_fn`` needs them.
      choices: Widths of weights and data that a layer may have; the first is the base.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``; without it the loss is ``distance``.
      distance: ``distance(outputs of the float model, outputs)``.
      skip: Leaves that stay float.
      fold: Whether batch-norm is folded first.
      state: Fits of an earlier run with the same arguments, which are not made again.
      on_site: Called with all fits after each layer, to save them.
      progress: Called after each fit and each score.
      **options: Those of :func:`lnq.adaquant.problem`.

    Raises:
      ValueError: If there is no layer, or choices are not pairs of widths.
    """
    _check_choices(choices)
    batches = calibration.as_batches(calib, 128)
    if fold:
        params, _ = tuning.fold(apply_fn, params, batches[0])
    made = adaquant.problem(apply_fn, params, batches, **options)
    chosen = [
        name
        for name, site in made.layers.items()
        if skip is None or not tree.lookup(skip, site.path, False)
    ]
    if not chosen:
        raise ValueError("apply_fn: has no layer to give a width to; see find_sites")
    fits = _fits(made, chosen, choices, state or {}, on_site, progress)
    loss = _loss(apply_fn, made, loss_fn, distance)
    scores, rest = _scores(made, chosen, choices, fits, loss, progress)
    judged_by = {"loss_fn": loss_fn, "distance": distance}
    return Scored(apply_fn, params, made, choices, fits, scores, rest, loss, judged_by)


def _check_choices(choices: Choices) -> None:
    if not choices or any(not (1 <= w <= 16 and 1 <= a <= 16) for w, a in choices):
        raise ValueError(
            f"choices: must be pairs of widths from 1 to 16 (weights, data), not {choices}"
        )


def _widths(made: Problem, chosen: Mapping[str, tuple[int, int]]) -> Widths:
    """Widths of layers by name, each one number for all layers of a sliced leaf."""
    found = Widths({}, {})
    for name, (weights, acts) in chosen.items():
        site = made.layers[name]
        lengths = tuple(site.shape[i] for i in site.sliced)
        found.weights[site.path] = np.full(lengths, weights, np.int32)
        found.acts[name] = np.full(lengths, acts, np.int32)
    return found


def _fits(
    made: Problem,
    names: Sequence[str],
    choices: Choices,
    state: Mapping[tuple[int, int], Mapping[str, Outcome]],
    on_site: Callable[..., None] | None,
    progress: Progress | None,
) -> dict[tuple[int, int], dict[str, Outcome]]:
    """Every layer by itself, at every choice; the rows that it reads are sampled once."""
    fits = {choice: dict(state.get(choice, {})) for choice in choices}
    for group in made.passes:
        wanted = {c: [n for n in group if n in names and n not in fits[c]] for c in choices}
        rows = made.sample(group, made.floats) if any(wanted.values()) else {}
        for choice, missing in wanted.items():
            widths = _widths(made, dict.fromkeys(missing, choice))
            mine = {n: rows[n] for n in missing}
            for found in adaquant.fit(made, widths, mine, mine):
                fits[choice] |= found
                if on_site:
                    on_site(fits)
                if progress:
                    done, total = sum(map(len, fits.values())), len(names) * len(choices)
                    progress(done, total, "fit " + ", ".join(found))
    return fits


def _loss(
    apply_fn: ApplyFn, made: Problem, loss_fn: LossFn | None, distance: Distance
) -> Callable[[Params], float]:
    """Mean loss over the calibration set, compiled once for all trees of one structure."""
    run, infer = sites.quantized(apply_fn), jax.jit(apply_fn)
    references = [infer(made.params, batch) for batch in made.batches]

    @jax.jit
    def of_batch(params: Params, batch: Any, reference: Any) -> jax.Array:
        out = run(params, batch)
        return distance(reference, out) if loss_fn is None else loss_fn(out, batch)

    sizes = [calibration.batch_size(batch) for batch in made.batches]

    def loss(params: Params) -> float:
        pairs = zip(made.batches, references, strict=True)
        losses = jax.device_get([of_batch(params, *pair) for pair in pairs])
        return float(np.average(losses, weights=sizes))

    return loss


def _scores(
    made: Problem,
    names: Sequence[str],
    choices: Choices,
    fits: Mapping[tuple[int, int], Mapping[str, Outcome]],
    loss: Callable[[Params], float],
    progress: Progress | None,
) -> tuple[Scores, int]:
    """Losses with one layer at a time away from the base; a gain by chance counts as nothing."""
    base = _placed(made, _of(fits[choices[0]], names), dict.fromkeys(names, choices[0]))
    at_base = loss(base)
    losses = np.zeros((len(names), len(choices)))
    costs = np.zeros((2, len(names), len(choices)))
    for c, choice in enumerate(choices):
        widths = _widths(made, dict.fromkeys(names, choice))
        hard = adaquant.harden(made, _of(fits[choice], names), widths)
        leaves = dict(tree.named_leaves(hard))
        for s, name in enumerate(names):
            leaf = leaves[made.layers[name].path]
            costs[:, s, c] = fixed_bytes(leaf), _coded_bytes(leaf)
            if c:
                switched = adaquant.place(made, base, _of(fits[choice], [name]), widths)
                losses[s, c] = max(loss(switched) - at_base, 0.0)
            losses[s, c] += TIE * at_base * float(np.mean(fits[choice][name].loss))
            if progress:
                progress(c * len(names) + s + 1, losses.size, f"score {name}")
    layers = {made.layers[name].path for name in names}
    rest = sum(fixed_bytes(w) for path, w in tree.named_leaves(made.params) if path not in layers)
    weights, acts = np.array(choices).T
    scores = Scores(tuple(names), weights, acts, losses, costs, ("bytes", "coded bytes"), at_base)
    return scores, rest


def _of(outcomes: Mapping[str, Outcome], names: Sequence[str]) -> dict[str, Fit]:
    return {name: outcomes[name].fit for name in names}


def _placed(
    made: Problem, fits: Mapping[str, Fit], chosen: Mapping[str, tuple[int, int]]
) -> Params:
    """The model with each layer at its choice, in floats."""
    return adaquant.place(made, made.floats, fits, _widths(made, chosen))


def _stitched(scored: Scored, chosen: Mapping[str, tuple[int, int]]) -> dict[str, Fit]:
    """Every layer as it was fitted by itself."""
    return {name: scored.fits[choice][name].fit for name, choice in chosen.items()}


def light(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    budget: float = 0.13,
    coded: bool = False,
    time_limit: float | None = None,
    scored: Scored | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Params, PipelineInfo]:
    """Widths by integer program, then means and deviations; no gradients.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Unlabelled examples, a few hundred.
      budget: Size of the result as a fraction of the float32 model's.
      coded: Whether the size is that of the ``.lnq`` file; otherwise of codes of fixed length.
      time_limit: Seconds for the integer program, as in :func:`lnq.allocation.allocate_bits`.
      scored: From :func:`score`, or of an earlier call for another budget: nothing is fitted anew.
      progress: Called as work proceeds.
      **options: Those of :func:`score`.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, and :class:`PipelineInfo`.

    Raises:
      UnreachableError: If no choice of widths is small enough; ``best`` is the least fraction.
      TimeoutError: If the program finds nothing within the time limit.
      ValueError: As :func:`score`.

    Example:
      >>> w = {k: jax.random.normal(jax.random.key(i), (64, 64)) for i, k in enumerate("abc")}
      >>> x = jax.random.normal(jax.random.key(3), (256, 64))
      >>> model = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
      >>> qtree, info = light(model, w, x, budget=0.16)
      >>> info.fraction <= 0.16, sorted(info.widths.values())[0] < (8, 8)
      (True, True)
    """
    if scored is None:
        plain: Any = {"second_order": False, "steps": 0, "weights": "fixed"}
        scored = score(apply_fn, params, calib, progress=progress, **(plain | options))
    chosen, found, step = _allocate(scored, budget, coded, time_limit, swaps=0)
    qtree = _hard(scored, chosen, _stitched(scored, chosen))
    qtree, repaired = _repaired(scored, qtree, ("reconstruct",), progress)
    return qtree, _info(scored, chosen, found, (step, *repaired), qtree, coded)


def advanced(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    budget: float = 0.13,
    coded: bool = False,
    refit: bool = True,
    swaps: int = 30,
    time_limit: float | None = None,
    scored: Scored | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Params, PipelineInfo]:
    """AdaQuant at every width, widths by integer program, refit, means and deviations, biases.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Unlabelled examples, a few hundred.
      budget: As in :func:`light`.
      coded: Likewise.
      refit: Whether layers are fitted once more, in sequence; without, as published, they are put
        together as each was fitted by itself.
      swaps: Evaluations of the loss that exchanges of widths between layers may take.
      time_limit: As in :func:`light`.
      scored: As in :func:`light`.
      progress: Called as work proceeds.
      **options: Those of :func:`score`.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, and :class:`PipelineInfo`.

    Raises:
      UnreachableError, TimeoutError: As in :func:`light`.
      ValueError: As :func:`score`.
    """
    if scored is None:
        scored = score(apply_fn, params, calib, progress=progress, **options)
    chosen, found, step = _allocate(scored, budget, coded, time_limit, swaps)
    fits, steps = _stitched(scored, chosen), [step]
    if refit:
        again = _refitted(scored, chosen, progress)
        after = scored.loss(_placed(scored.problem, again, chosen))
        size = _bytes(_hard(scored, chosen, again), coded)
        kept = after < step.after and size <= budget * _float_bytes(scored)
        fits = again if kept else fits
        steps.append(Step("refit", step.after, after, kept))
    qtree = _hard(scored, chosen, fits)
    qtree, repaired = _repaired(scored, qtree, ("reconstruct", "tune biases"), progress)
    return qtree, _info(scored, chosen, found, (*steps, *repaired), qtree, coded)


def _float_bytes(scored: Scored) -> int:
    return sum(4 * np.size(w) for _, w in tree.named_leaves(scored.params))


def _allocate(
    scored: Scored, budget: float, coded: bool, time_limit: float | None, swaps: int
) -> tuple[dict[str, tuple[int, int]], Allocation, Step]:
    """Widths within the budget, and what the loss is there."""
    scores, most = scored.scores, budget * _float_bytes(scored)
    cost, room = scores.cost[int(coded)], most - scored.rest

    def over(choice: np.ndarray) -> float:
        chosen = _chosen(scored, choice)
        return _bytes(_hard(scored, chosen, _stitched(scored, chosen)), coded) - most

    choice, found = _solved(scored, room, budget, coded, time_limit)
    while coded and (excess := over(choice)) > 0:
        room -= excess
        choice, found = _solved(scored, room, budget, coded, time_limit)
    if swaps:
        swapped, *_ = allocation.local_search(
            choice,
            lambda c: scored.loss(tree_of(scored, c)),
            cost,
            room,
            loss=scores.loss,
            evaluations=swaps,
        )
        choice = choice if coded and over(swapped) > 0 else swapped
    after = scored.loss(tree_of(scored, choice))
    return _chosen(scored, choice), found, Step("allocate", scores.base, after, kept=True)


def _solved(
    scored: Scored, room: float, budget: float, coded: bool, time_limit: float | None
) -> tuple[np.ndarray, Allocation]:
    scores = scored.scores
    try:
        cost = scores.cost[int(coded)]
        return allocation.allocate_bits(scores.loss, cost, room, time_limit=time_limit)
    except UnreachableError as error:
        smallest = _chosen(scored, np.argmin(scores.cost[int(coded)], 1))
        qtree = _hard(scored, smallest, _stitched(scored, smallest))
        least = _bytes(qtree, coded) / _float_bytes(scored)
        raise UnreachableError(
            f"budget: {budget:.4g} of the float32 size cannot be reached; the smallest is "
            f"{least:.4g}: raise `budget`, or add smaller widths to `choices`",
            least,
        ) from error


def _chosen(scored: Scored, choice: np.ndarray) -> dict[str, tuple[int, int]]:
    pairs = zip(scored.scores.sites, choice, strict=True)
    return {name: scored.choices[int(c)] for name, c in pairs}


def tree_of(scored: Scored, choice: np.ndarray) -> Params:
    """The model with each layer at its choice, as each was fitted by itself, for ``scored.loss``.

    Args:
      scored: From :func:`score`.
      choice: Numbers of choices, ``[s]``.
    """
    chosen = _chosen(scored, choice)
    return _placed(scored.problem, _stitched(scored, chosen), chosen)


def _hard(scored: Scored, chosen: Mapping[str, tuple[int, int]], fits: Mapping[str, Fit]) -> Params:
    return adaquant.harden(scored.problem, fits, _widths(scored.problem, chosen))


def _bytes(qtree: Params, coded: bool) -> int:
    """Of the ``.lnq`` file, or of codes of fixed length."""
    if not coded:
        return sum(fixed_bytes(leaf) for _, leaf in tree.named_leaves(qtree))
    with tempfile.TemporaryDirectory() as folder:
        return container.save(Path(folder, "size.lnq"), qtree)


def _refitted(
    scored: Scored, chosen: Mapping[str, tuple[int, int]], progress: Progress | None
) -> dict[str, Fit]:
    """Layers fitted in sequence at their widths."""
    widths = _widths(scored.problem, chosen)
    done = adaquant.fit_in_sequence(scored.problem, widths, progress=progress)
    return _of(done, list(done))


def _small(batches: Sequence[Any]) -> list[Any]:
    """At most fifty examples each, and about ten batches at least."""
    examples = sum(map(calibration.batch_size, batches))
    return calibration.as_batches(list(batches), min(50, max(examples // 10, 1)))


def _reconstructed(scored: Scored, qtree: Params, progress: Progress | None) -> Params:
    batches = scored.problem.batches
    return tuning.reconstruct(scored.apply_fn, scored.params, qtree, batches, progress=progress)[0]


def _tuned(scored: Scored, qtree: Params, progress: Progress | None) -> Params:
    return tuning.tune_biases(
        scored.apply_fn,
        scored.params,
        qtree,
        _small(scored.problem.batches),
        key=scored.problem.key,
        progress=progress,
        **scored.judged_by,
    )[0]


REPAIRS = {"reconstruct": _reconstructed, "tune biases": _tuned}


def _repaired(
    scored: Scored, qtree: Params, names: Sequence[str], progress: Progress | None
) -> tuple[Params, list[Step]]:
    """Repairs, each kept if it lowers the loss."""
    now, steps = scored.loss(qtree), []
    for name in names:
        repaired, after = qtree, now
        with suppress(tuning.NothingToRepairError):
            repaired = REPAIRS[name](scored, qtree, progress)
            after = scored.loss(repaired)
        steps.append(Step(name, now, after, after < now))
        qtree, now = (repaired, after) if after < now else (qtree, now)
    return qtree, steps


def _info(
    scored: Scored,
    chosen: Mapping[str, tuple[int, int]],
    found: Allocation,
    steps: tuple[Step, ...],
    qtree: Params,
    coded: bool,
) -> PipelineInfo:
    size = _bytes(qtree, coded)
    sizes = [prod(scored.problem.layers[name].shape) for name in chosen]
    return PipelineInfo(
        steps=steps,
        widths=chosen,
        allocation=found,
        bytes=size,
        fraction=size / _float_bytes(scored),
        paper_fraction=allocation.paper_fraction(
            sizes, [weights for weights, _ in chosen.values()]
        ),
        scored=scored,
    )
