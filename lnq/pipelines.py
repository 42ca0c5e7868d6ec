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
      loss: ``loss(tree) -> float`` of a model as :func:`~lnq.adaquant.place` makes it.
    """

    apply_fn: ApplyFn
    params: Params
    problem: Problem
    choices: Choices
    fits: Mapping[tuple[int, int], Mapping[str, Outcome]]
    scores: Scores
    rest: int
    loss: Callable[[Params], float]


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
    """By the entropy of its codes; the file, which has tables for parts of a leaf, is smaller."""
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
    return Scored(apply_fn, params, made, choices, fits, scores, rest, loss)


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
    run = sites.quantized(apply_fn)
    references = [jax.jit(apply_fn)(made.params, batch) for batch in made.batches]

    @jax.jit
    def of_batch(params: Params, batch: Any, reference: Any) -> jax.Array:
        out = run(params, batch)
        return distance(reference, out) if loss_fn is None else loss_fn(out, batch)

    sizes = [calibration.batch_size(batch) for batch in made.batches]

    def loss(params: Params) -> float:
        pairs = zip(made.batches, references, strict=True)
        losses = [float(of_batch(params, *pair)) for pair in pairs]
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
    base = _placed(made, fits, dict.fromkeys(names, choices[0]))
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
    made: Problem,
    fits: Mapping[tuple[int, int], Mapping[str, Outcome]],
    chosen: Mapping[str, tuple[int, int]],
) -> Params:
    """The model with each layer at its choice, in floats."""
    found = {name: fits[choice][name].fit for name, choice in chosen.items()}
    return adaquant.place(made, made.floats, found, _widths(made, chosen))


def light(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    budget: float = 0.13,
    coded: bool = False,
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
      scored: Of an earlier call of the same pipeline, for another budget: nothing is fitted anew.
      progress: Called as work proceeds.
      **options: Those of :func:`score`.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, and :class:`PipelineInfo`.

    Raises:
      UnreachableError: If no choice of widths is small enough; ``best`` is the least fraction.
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
    chosen, found, steps = _allocate(scored, budget, coded, swaps=0)
    fits = {name: scored.fits[choice][name].fit for name, choice in chosen.items()}
    return _repaired(scored, chosen, fits, found, steps, coded, biases=False, progress=progress)


def advanced(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    budget: float = 0.13,
    coded: bool = False,
    refit: bool = True,
    swaps: int = 30,
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
      scored: As in :func:`light`.
      progress: Called as work proceeds.
      **options: Those of :func:`score`.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, and :class:`PipelineInfo`.

    Raises:
      UnreachableError: As in :func:`light`.
      ValueError: As :func:`score`.
    """
    if scored is None:
        scored = score(apply_fn, params, calib, progress=progress, **options)
    chosen, found, steps = _allocate(scored, budget, coded, swaps)
    fits = {name: scored.fits[choice][name].fit for name, choice in chosen.items()}
    if refit:
        most = budget * _float_bytes(scored) if coded else np.inf
        fits, step = _refitted(scored, chosen, fits, steps[-1].after, most, progress)
        steps = [*steps, step]
    return _repaired(scored, chosen, fits, found, steps, coded, biases=True, progress=progress)


def _float_bytes(scored: Scored) -> int:
    return sum(4 * np.size(w) for _, w in tree.named_leaves(scored.params))


def _allocate(
    scored: Scored, budget: float, coded: bool, swaps: int
) -> tuple[dict[str, tuple[int, int]], Allocation, list[Step]]:
    """Widths within the budget, and what the loss is there."""
    scores, size = scored.scores, _float_bytes(scored)
    cost, room = scores.cost[int(coded)], budget * size - scored.rest
    choice, found = _solved(scored, cost, room)
    while (
        coded and (over := _file_bytes(_hard(scored, _chosen(scored, choice))) - budget * size) > 0
    ):
        room -= over
        choice, found = _solved(scored, cost, room)
    if swaps:
        choice, *_ = allocation.local_search(
            choice,
            lambda c: scored.loss(tree_of(scored, c)),
            cost,
            room,
            loss=scores.loss,
            evaluations=swaps,
        )
    chosen = _chosen(scored, choice)
    after = scored.loss(tree_of(scored, choice))
    return chosen, found, [Step("allocate", scores.base, after, kept=True)]


def _solved(scored: Scored, cost: np.ndarray, room: float) -> tuple[np.ndarray, Allocation]:
    try:
        return allocation.allocate_bits(scored.scores.loss, cost, room)
    except UnreachableError as error:
        size = _float_bytes(scored)
        least = (error.best + scored.rest) / size
        raise UnreachableError(
            f"budget: {(room + scored.rest) / size:.4g} of the float32 size cannot be reached; the "
            f"smallest is {least:.4g}: raise `budget`, or add smaller widths to `choices`",
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
    return _placed(scored.problem, scored.fits, _chosen(scored, choice))


def _hard(
    scored: Scored,
    chosen: Mapping[str, tuple[int, int]],
    fits: Mapping[str, Fit] | None = None,
) -> Params:
    if fits is None:
        fits = {name: scored.fits[choice][name].fit for name, choice in chosen.items()}
    return adaquant.harden(scored.problem, fits, _widths(scored.problem, chosen))


def _file_bytes(qtree: Params) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return container.save(Path(folder, "size.lnq"), qtree)


def _refitted(
    scored: Scored,
    chosen: Mapping[str, tuple[int, int]],
    stitched: Mapping[str, Fit],
    before: float,
    most: float,
    progress: Progress | None,
) -> tuple[Mapping[str, Fit], Step]:
    """Layers fitted in sequence at their widths, if the model is better for it, and no larger."""
    made, widths = scored.problem, _widths(scored.problem, chosen)
    done = adaquant.fit_in_sequence(made, widths, progress=progress)
    fits = {name: outcome.fit for name, outcome in done.items()}
    after = scored.loss(adaquant.place(made, made.floats, fits, widths))
    kept = after < before and (
        not np.isfinite(most) or _file_bytes(_hard(scored, chosen, fits)) <= most
    )
    return fits if kept else stitched, Step("refit", before, after, kept)


def _small(batches: Sequence[Any]) -> list[Any]:
    """At most fifty examples each, and about ten batches at least."""
    examples = sum(map(calibration.batch_size, batches))
    return calibration.as_batches(list(batches), min(50, max(examples // 10, 1)))


def _repaired(
    scored: Scored,
    chosen: Mapping[str, tuple[int, int]],
    fits: Mapping[str, Fit],
    found: Allocation,
    steps: list[Step],
    coded: bool,
    *,
    biases: bool,
    progress: Progress | None,
) -> tuple[Params, PipelineInfo]:
    """Means and deviations, biases; each kept if it lowers the loss."""
    batches, params, apply_fn = scored.problem.batches, scored.params, scored.apply_fn
    qtree = _hard(scored, chosen, fits)
    now = scored.loss(qtree)
    repairs: dict[str, Callable[[Params], Any]] = {
        "reconstruct": lambda qtree: tuning.reconstruct(
            apply_fn, params, qtree, batches, progress=progress
        ),
        "tune biases": lambda qtree: tuning.tune_biases(
            apply_fn, params, qtree, _small(batches), key=scored.problem.key, progress=progress
        ),
    }
    for name in repairs if biases else ["reconstruct"]:
        try:
            repaired, _ = repairs[name](qtree)
        except tuning.NothingToRepairError:
            steps = [*steps, Step(name, now, now, kept=False)]
            continue
        after = scored.loss(repaired)
        steps = [*steps, Step(name, now, after, after < now)]
        qtree, now = (repaired, after) if after < now else (qtree, now)
    size = sum(fixed_bytes(leaf) for _, leaf in tree.named_leaves(qtree))
    size = _file_bytes(qtree) if coded else size
    sizes = [prod(scored.problem.layers[name].shape) for name in chosen]
    bits = [weights for weights, _ in chosen.values()]
    return qtree, PipelineInfo(
        steps=tuple(steps),
        widths=chosen,
        allocation=found,
        bytes=size,
        fraction=size / _float_bytes(scored),
        paper_fraction=allocation.paper_fraction(sizes, bits),
        scored=scored,
    )
