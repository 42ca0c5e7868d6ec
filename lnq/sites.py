r"""Find, observe and rewrite every place where a parameter meets data, in code we did not write.

A *site* is a product (``dot_general``, ``conv_general_dilated``, ``ragged_dot_general``) of data
and a leaf of the parameter tree, the leaf seen through views only: transposes, reshapes, casts,
broadcasts, slices, gathers over a mesh, the slicing of a ``scan``. This module traces a model to
its jaxpr and runs that jaxpr again with a rule of its own at each site:

* :func:`find_sites` lists them, and every use of a leaf that is not one, with the reason;
* :func:`tap` returns statistics of the data that each site reads, or of what it returns;
* :func:`tails` says what the model does to a site's output before it meets other values;
* :func:`perturbed` adds a given array to each site's output, so that ``jax.grad`` sees it;
* :func:`quantized` multiplies by integer codes, and rounds the data if the leaf says how.

All happens while tracing: under ``jit`` the result is an ordinary program, and it works under
``grad``, ``vmap``, ``shard_map`` and ``jax.export`` because it is made of public JAX calls.

The file reads in order: what a site is; leaves and their views; the interpreter; what it does at
calls, loops, branches and shards; the five functions.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import combinations, groupby, pairwise
from math import prod
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from lnq import tree
from lnq.quantizer import (
    QParams,
    QTensor,
    dequantize_array,
    fake_quant,
    is_quantized,
    quantize,
)
from lnq.types import ApplyFn, Params

__all__ = [
    "OtherUse",
    "Site",
    "Sites",
    "Stat",
    "Tail",
    "Window",
    "find_sites",
    "integer_dtype",
    "perturbed",
    "quantized",
    "tails",
    "tap",
]


class Window(NamedTuple):
    """How a convolution moves over its data; one entry per spatial axis, in the kernel's order.

    Attributes:
      axes: Spatial axes of the data.
      strides: Steps.
      padding: Zeros before and behind.
      dilation: Step between entries of the data, once zeros are put between them.
      kernel: Size of the kernel.
      kernel_dilation: Step between entries of the data that meet neighbours in the kernel.
      groups: Blocks of features that have kernels of their own.
    """

    axes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int


class Site(NamedTuple):
    """A product of a leaf and data.

    Axes are those of the whole leaf, stacked ones included.

    Attributes:
      path: Name of the leaf.
      use: Which of the leaf's sites this is, in forward order.
      primitive: ``dot_general``, ``conv_general_dilated`` or ``ragged_dot_general``.
      shape: Shape of the leaf.
      contracting: Axes that are summed over; in the order of ``act_channels``, then the spatial
        axes of a convolution.
      channels: Axes that each have their own place in the output, in the order of
        ``out_channels``.
      batch: Axes shared with the data, in the order of ``act_batch``: experts, models under
        ``vmap``.
      sliced: Axes that a ``scan`` slices off, the outermost scan's first.
      act: Shape and dtype of the data, as the product reads it (inside loops and shards).
      act_channels: Axes of the data that are summed over; for a convolution its features.
      act_batch: Axes of the data that it shares with the leaf.
      out: Shape and dtype of the product.
      out_channels: Axes of the product that are the leaf's channels.
      macs: Multiplications and additions of one call: all turns of a ``scan`` and all shards, one
        turn of a ``while``.
      input: Number of the value it reads; equal where sites read the same.
      bias: Name of the first leaf added to the product or subtracted from it, or None.
      bias_sign: +1 or -1.
      affine: Names of the leaves in further sums and products that follow (batch-norm).
      chain: Elementwise functions that follow, until the value forks or changes shape.
      loops: Numbers of the loops, branches and shards it is inside of.
      stack: ``(loop, length)`` of each scan that slices the leaf and each ``shard_map`` around it:
        leading axes of deltas, and of raw results (which any other scan around adds its own to).
      shards: Those of ``loops`` that are a ``shard_map``.
      whole: Whether the product reads all entries of the leaf, or of its slice, each once and in
        their order along each axis.
      window: Of a convolution, or None.
      note: What a user should know, or empty.
    """

    path: str
    use: int
    primitive: str
    shape: tuple[int, ...]
    contracting: tuple[int, ...]
    channels: tuple[int, ...]
    batch: tuple[int, ...]
    sliced: tuple[int, ...]
    act: jax.ShapeDtypeStruct
    act_channels: tuple[int, ...]
    act_batch: tuple[int, ...]
    out: jax.ShapeDtypeStruct
    out_channels: tuple[int, ...]
    macs: int
    input: int = -1
    bias: str | None = None
    bias_sign: int = 1
    affine: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    loops: tuple[int, ...] = ()
    stack: tuple[tuple[int, int], ...] = ()
    shards: tuple[int, ...] = ()
    whole: bool = False
    window: Window | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The leaf's name, and ``@use`` from its second site on."""
        return f"{self.path}@{self.use}" if self.use else self.path

    @property
    def delta(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what :func:`perturbed` adds here."""
        lengths = tuple(length for _, length in self.stack)
        return jax.ShapeDtypeStruct(lengths + self.out.shape, self.out.dtype)


class OtherUse(NamedTuple):
    """What is not quantized: a leaf used otherwise, or a product that no leaf is in.

    Attributes:
      path: Name of the leaf; of several, joined by `` + ``; empty for a product of data.
      primitive: What uses it.
      reason: Why it is not quantized there.
      shape: Shape of the first result.
    """

    path: str
    primitive: str
    reason: str
    shape: tuple[int, ...]


class Sites(NamedTuple):
    """All that a trace shows, in forward order."""

    sites: tuple[Site, ...]
    others: tuple[OtherUse, ...]

    @property
    def uses(self) -> Counter[str]:
        """How often each leaf is used, at sites or otherwise."""
        others = (name for use in self.others for name in use.path.split(" + "))
        return Counter([*(site.path for site in self.sites), *others])


class Tail(NamedTuple):
    """What becomes of a site's output while it stays one value.

    An affine map of each channel (bias, batch-norm), then functions of single entries:
    ``follow(factor * y + shift)``.

    Attributes:
      factor: ``[l, o]``, l layers of a sliced leaf (1 if it is none), o channels.
      shift: Likewise, value units.
      bias: Name of the leaf that is added last, if nothing multiplies it, or None.
      bias_sign: +1 or -1.
      follow: Takes and returns an array of any shape, float32.
    """

    factor: jax.Array
    shift: jax.Array
    bias: str | None
    bias_sign: int
    follow: Callable[[jax.Array], jax.Array]


class Stat(NamedTuple):
    """A statistic of the data at a site, as a monoid.

    Attributes:
      observe: ``observe(x, site) -> stat``, a pytree of arrays.
      init: ``init(structure of stat) -> identity of merge``; None where there is none.
      merge: ``merge(stat, stat) -> stat``, associative; None for raw results, which are stacked
        by ``scan`` and ``shard_map`` and cannot leave a ``while`` or a branch.
    """

    observe: Callable[[jax.Array, Site], Any]
    init: Callable[[Any], Any] | None = None
    merge: Callable[[Any, Any], Any] | None = None


# Leaves and their views.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Weight:
    """An array made of parameters alone, and if ``path`` is set a view of that leaf.

    Attributes:
      value: The array, perhaps quantized; itself already transposed, reshaped and so on.
      acts: Grids of the data at the leaf's sites.
      path: Name of the leaf, or None for what was computed from leaves.
      shape: Of the whole leaf.
      axes: Which axes of the leaf stand behind each axis of the view.
      sliced: Axes of the leaf that scans sliced off.
      stack: ``(loop, length)`` of those scans.
      sources: Names of all leaves in it.
      whole: Whether it has all entries of the leaf, or of its slice, in their order.
    """

    value: Any
    acts: tuple[QParams | None, ...] = ()
    path: str | None = field(default=None, metadata={"static": True})
    shape: tuple[int, ...] = field(default=(), metadata={"static": True})
    axes: tuple[tuple[int, ...], ...] = field(default=(), metadata={"static": True})
    sliced: tuple[int, ...] = field(default=(), metadata={"static": True})
    stack: tuple[tuple[int, int], ...] = field(default=(), metadata={"static": True})
    sources: tuple[str, ...] = field(default=(), metadata={"static": True})
    whole: bool = field(default=True, metadata={"static": True})

    def numbers(self) -> jax.Array:
        """The float array."""
        return dequantize_array(self.value) if is_quantized(self.value) else self.value


def _leaf(path: str, leaf: Any) -> _Weight:
    axes = tuple((axis,) for axis in range(len(leaf.shape)))
    acts = leaf.acts if is_quantized(leaf) else ()
    value = replace(leaf, acts=()) if is_quantized(leaf) else leaf
    return _Weight(value, acts, path, tuple(leaf.shape), axes, sources=(path,))


def _array(value: Any) -> Any:
    return value.numbers() if isinstance(value, _Weight) else value


Entry = tuple[int, ...]
"""A shape of the codes: before or after a view."""

STUCK = object()
"""What a view of a field is where the grid has no such form."""


class _View(NamedTuple):
    """One primitive that moves entries without changing them.

    Attributes:
      move: ``(params, rest, array, old, new)``: the array (codes, or a field of their grid) after
        it, where the codes go from shape ``old`` to ``new``; ``STUCK`` if that cannot be written.
      axes: ``(params, axes, old, new)``: leaf axes behind each new axis.
    """

    move: Callable[[Mapping[str, Any], Sequence[Any], jax.Array, Entry, Entry], Any]
    axes: Callable[[Mapping[str, Any], tuple, Entry, Entry], tuple]


def _same_axes(params: Mapping[str, Any], axes: tuple, old: Entry, new: Entry) -> tuple:
    return axes


def _moved_broadcast(params, rest, array, old, new):
    dims = params["broadcast_dimensions"]
    kept = dict(zip(dims, array.shape, strict=True))
    shape = [kept.get(axis, 1) for axis in range(len(new))]
    if array.shape == old:  # codes are repeated, a shared field stays shared
        shape = list(new)
    return lax.broadcast_in_dim(array, shape, dims)


def _broadcast_axes(params, axes, old, new):
    behind = dict(zip(params["broadcast_dimensions"], axes, strict=True))
    return tuple(behind.get(axis, ()) for axis in range(len(new)))


def _regrouped(old: Entry, new: Entry) -> Iterator[tuple[range, range]]:
    """Runs of old and of new axes that hold the same entries in a reshape."""
    i = j = 0
    if not prod(old):
        yield range(len(old)), range(len(new))
        return
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while prod(old[start_i:i]) != prod(new[start_j:j]):
            if prod(old[start_i:i]) < prod(new[start_j:j]):
                i += 1
            else:
                j += 1
        yield range(start_i, i), range(start_j, j)


def _order(params: Mapping[str, Any], shape: Entry) -> Sequence[int]:
    """Axes in the order in which a reshape reads them."""
    return params["dimensions"] or range(len(shape))


def _moved_reshape(params, rest, array, old, new):
    array, shape = lax.transpose(array, _order(params, old)), []
    old = tuple(old[i] for i in _order(params, old))
    for before, after in _regrouped(old, new):
        dims, sizes = [array.shape[i] for i in before], [old[i] for i in before]
        groups = prod(dims)
        # Contiguous groups: whole axes, then part of one, then shared ones.
        cut = next((k for k, (d, n) in enumerate(zip(dims, sizes, strict=True)) if d != n), None)
        if cut is not None and any(d != 1 for d in dims[cut + 1 :]):
            return STUCK
        for j in after:
            if groups % new[j] and new[j] % groups:
                return STUCK
            shape.append(min(groups, new[j]) if groups else 0)
            groups = max(groups // new[j], 1) if new[j] else groups
    return array.reshape(shape)


def _reshaped_axes(params, axes, old, new):
    found: list[tuple[int, ...]] = []
    axes, old = (tuple(x[i] for i in _order(params, old)) for x in (axes, old))
    for before, after in _regrouped(old, new):
        behind = tuple(dict.fromkeys(axis for i in before for axis in axes[i]))
        found += [behind if new[j] > 1 or len(after) == 1 else () for j in after]
    return tuple(found)


def _moved_slice(params, rest, array, old, new):
    start, limit = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(old)
    for axis, (size, full) in enumerate(zip(array.shape, old, strict=True)):
        if size == full and full != 1:
            array = lax.slice_in_dim(array, start[axis], limit[axis], strides[axis], axis)
        elif size != 1 and new[axis] != full:
            return STUCK
    return array


def _moved_dynamic_slice(params, rest, array, old, new):
    for axis, (size, full) in enumerate(zip(array.shape, old, strict=True)):
        if size == full and full != 1:
            array = lax.dynamic_slice_in_dim(array, rest[axis], new[axis], axis)
        elif size != 1 and new[axis] != full:
            return STUCK
    return array


def _moved_all_gather(params, rest, array, old, new):
    axis = params["all_gather_dimension"]
    if not params["tiled"]:
        return STUCK
    if array.shape[axis] != old[axis] and array.shape[axis] != 1:
        return STUCK
    if array.shape[axis] == 1 and old[axis] != 1:
        return array
    return lax.all_gather(
        array,
        params["axis_name"],
        axis_index_groups=params["axis_index_groups"],
        axis=axis,
        tiled=True,
    )


def _moved_constraint(params, rest, array, old, new):
    return lax.with_sharding_constraint(array, params["sharding"]) if array.shape == old else array


VIEWS = {
    "transpose": _View(
        lambda params, rest, a, old, new: lax.transpose(a, params["permutation"]),
        lambda params, axes, old, new: tuple(axes[i] for i in params["permutation"]),
    ),
    "reshape": _View(_moved_reshape, _reshaped_axes),
    "squeeze": _View(
        lambda params, rest, a, old, new: lax.squeeze(a, params["dimensions"]),
        lambda params, axes, old, new: tuple(
            x for i, x in enumerate(axes) if i not in params["dimensions"]
        ),
    ),
    "broadcast_in_dim": _View(_moved_broadcast, _broadcast_axes),
    "rev": _View(lambda params, rest, a, old, new: lax.rev(a, params["dimensions"]), _same_axes),
    "slice": _View(_moved_slice, _same_axes),
    "dynamic_slice": _View(_moved_dynamic_slice, _same_axes),
    "all_gather": _View(_moved_all_gather, _same_axes),
    "pvary": _View(
        lambda params, rest, a, old, new: lax.pcast(a, params["axes"], to="varying"), _same_axes
    ),
    "sharding_constraint": _View(_moved_constraint, _same_axes),
    "copy": _View(lambda params, rest, a, old, new: a, _same_axes),
    "convert_element_type": _View(lambda params, rest, a, old, new: a, _same_axes),
}
"""Primitives through which a leaf stays that leaf."""

PARTIAL = ("all_gather", "dynamic_slice", "rev", "slice")
"""Those behind which entries are missing, or in another order along their axis."""


def _cuts(params: Mapping[str, Any], shape: Entry) -> list[dict[str, Any]]:
    """A ``split`` as parameters of ``slice``."""
    axis, ends = params["axis"], np.cumsum([0, *params["sizes"]])
    starts, limits = [0] * len(shape), list(shape)
    return [
        {
            "start_indices": [*starts[:axis], int(a), *starts[axis + 1 :]],
            "limit_indices": [*limits[:axis], int(b), *limits[axis + 1 :]],
            "strides": None,
        }
        for a, b in pairwise(ends)
    ]


def _aval(var: Any) -> Any:
    """Shape and dtype of a variable of a jaxpr."""
    return var.aval


def _view(eqn: jex.JaxprEqn, weight: _Weight, rest: Sequence[Any]) -> list[_Weight]:
    """The leaf after a view, or its parts; nothing if the primitive is not one."""
    name, value, every = eqn.primitive.name, weight.value, [eqn.params]
    if name == "split":
        name, every = "slice", _cuts(eqn.params, tuple(value.shape))
    if name not in VIEWS or not jnp.issubdtype(_aval(eqn.outvars[0]).dtype, jnp.floating):
        return []
    view, old = VIEWS[name], tuple(value.shape)
    news = [tuple(_aval(var).shape) for var in eqn.outvars]
    moved: list[Any] = [STUCK]
    if is_quantized(value):
        moved = [
            jax.tree.map(lambda a, p=params, new=new: view.move(p, rest, a, old, new), value)
            for params, new in zip(every, news, strict=True)
        ]
    if any(a is STUCK for a in jax.tree.leaves(moved)):
        moved = _bind(eqn, [weight.numbers(), *rest])
    parts = []
    for params, var, new, part in zip(every, eqn.outvars, news, moved, strict=True):
        axes = view.axes(params, weight.axes, old, new) if weight.path is not None else ()
        value = replace(part, dtype=_aval(var).dtype) if is_quantized(part) else part
        whole = weight.whole and name not in PARTIAL and _in_order(eqn, weight)
        parts.append(replace(weight, value=value, axes=axes, whole=whole))
    return parts


def _in_order(eqn: jex.JaxprEqn, weight: _Weight) -> bool:
    """Whether parts that an axis of the leaf was split into stay together and in their order."""
    if eqn.primitive.name == "transpose":
        return _ascending(weight.axes, eqn.params["permutation"])
    if eqn.primitive.name != "reshape":
        return True
    order = _order(eqn.params, weight.value.shape)
    old = tuple(weight.value.shape[i] for i in order)
    runs = [
        [axis for axis, _ in groupby(axis for i in before for axis in weight.axes[order[i]])]
        for before, _ in _regrouped(old, tuple(_aval(eqn.outvars[0]).shape))
    ]
    once = all(len(run) == len(set(run)) for run in runs)
    return once and _ascending(weight.axes, order)


def _ascending(axes: Sequence[tuple[int, ...]], order: Sequence[int]) -> bool:
    """Whether axes of a view that have an axis of the leaf in common keep their order."""
    return all(i < j or not {*axes[i]} & {*axes[j]} for i, j in combinations(order, 2))


# The interpreter.


class _Event(NamedTuple):
    """One equation seen while finding sites.

    Attributes:
      name: Of its function.
      eqn: The equation.
      reads: Identities of the data it reads.
      writes: Identity of its first result.
      leaves: Names of the leaves it reads.
      elementwise: Whether entries of one array become entries of a result of its shape.
      affine: Whether it adds leaves to the data, or multiplies the data by them.
      operand: These leaves, as they meet the data.
    """

    name: str
    eqn: jex.JaxprEqn
    reads: tuple[int, ...]
    writes: int = -1
    leaves: tuple[str, ...] = ()
    elementwise: bool = False
    affine: bool = False
    operand: _Weight | None = None


class _Axes(NamedTuple):
    """Roles of the axes of a product's weight, of its data, and of its output."""

    weight_sum: tuple[int, ...]
    weight_batch: tuple[int, ...]
    weight_free: tuple[int, ...]
    data_sum: tuple[int, ...]
    data_batch: tuple[int, ...]
    out_free: tuple[int, ...]


class _Product(NamedTuple):
    """A site as the interpreter meets it."""

    site: Site
    eqn: jex.JaxprEqn
    side: int
    axes: _Axes
    x: jax.Array
    weight: _Weight
    rest: tuple[Any, ...]

    def bind(self, x: Any, w: Any, **params: Any) -> jax.Array:
        """The product of two arrays, by its own parameters or others."""
        operands = (w, x) if self.side == 0 else (x, w)
        out = self.eqn.primitive.bind(*operands, *self.rest, **(self.eqn.params | params))
        return out


Rule = Callable[["_Scope", _Product], jax.Array]
"""What is done at a site."""


@dataclass
class _Scope:
    """Where the interpreter is, and what it has seen; loops run in copies of it.

    Attributes:
      rule: What to do at a site.
      loops: Numbers of the enclosing loops, branches and shards.
      shards: Number and devices of each enclosing ``shard_map``.
      turns: How often what is here runs, as far as is known.
      next_loop: Number of the next one.
      uses: Sites seen so far of each leaf.
      results: What the sites of this scope returned, by name.
      deltas: What is to be added at the sites of this scope, by name.
      plan: All sites of the model, where known.
      stat: Of :func:`tap`.
      outputs: Whether it is one of outputs.
      events: While finding sites: every equation.
      found: While finding sites: sites and other uses, in order.
      alive: While finding sites: values, so that their ``id`` stays theirs.
      alias: While finding sites: identity of values that are casts or views of others.
      note: For sites of this scope.
    """

    rule: Rule
    loops: tuple[int, ...] = ()
    shards: tuple[tuple[int, int], ...] = ()
    turns: int = 1
    next_loop: int = 0
    uses: dict[str, int] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    deltas: dict[str, Any] = field(default_factory=dict)
    plan: tuple[Site, ...] = ()
    stat: Stat | None = None
    outputs: bool = False
    events: list[_Event] | None = None
    found: list[tuple[Any, int]] = field(default_factory=list)
    alive: list[Any] = field(default_factory=list)
    alias: dict[int, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def finding(self) -> bool:
        return self.events is not None

    def copy(self) -> "_Scope":
        return replace(
            self,
            uses=dict(self.uses),
            results={},
            deltas=dict(self.deltas),
            events=None if self.events is None else list(self.events),
            found=list(self.found),
        )

    def enter(self, turns: int = 1) -> "_Scope":
        """The scope of a loop's body; copy it for every trace of the body."""
        return replace(
            self.copy(),
            loops=(*self.loops, self.next_loop),
            next_loop=self.next_loop + 1,
            turns=self.turns * turns,
        )

    def leave(self, inner: "_Scope") -> None:
        """Go on behind what ``inner`` has seen."""
        self.uses, self.next_loop = inner.uses, inner.next_loop
        self.events, self.found = inner.events, inner.found

    def sites_inside(self) -> list[Site]:
        """Sites of the loop that is about to be entered."""
        return [site for site in self.plan if self.next_loop in site.loops]

    def identity(self, site: Site) -> Any:
        """What a site returns, seen from the loop about to be entered, before it saw data."""
        if self.stat is None or self.stat.init is None:
            raise ValueError(
                f"tap: site {site.name!r} is inside a loop or branch that cannot return results "
                "of unbounded size; give a Stat with `init` and `merge`"
            )
        observe = self.stat.observe
        seen = site.out if self.outputs else site.act
        start = self.stat.init(jax.eval_shape(lambda x: observe(x, site), seen))
        lengths = tuple(n for loop, n in self.stacked_inside(site))
        return jax.tree.map(lambda a: jnp.broadcast_to(a, lengths + a.shape), start)

    def merge(self, site: Site, a: Any, b: Any) -> Any:
        """Merge two results of a site, as seen from the loop about to be entered."""
        assert self.stat is not None
        assert self.stat.merge is not None
        merge = self.stat.merge
        for _ in self.stacked_inside(site):
            merge = jax.vmap(merge)
        return merge(a, b)

    def stacked_inside(self, site: Site) -> list[tuple[int, int]]:
        """Scans inside the loop about to be entered that stack a site's merged results."""
        return [
            (loop, n) for loop, n in site.stack if loop > self.next_loop and loop not in site.shards
        ]

    def other(self, eqn: jex.JaxprEqn, weights: Sequence[_Weight], reason: str) -> None:
        """Note a use that is not quantized."""
        if self.finding:
            named = [w.path for w in weights if w.path is not None]
            sources = named or sorted({name for w in weights for name in w.sources})
            shape = tuple(_aval(eqn.outvars[0]).shape) if eqn.outvars else ()
            use = OtherUse(" + ".join(sources), eqn.primitive.name, reason, shape)
            self.found.append((use, -1))


def _open(jaxpr: Any) -> tuple[jex.Jaxpr, Sequence[Any]]:
    """A jaxpr and its constants, whichever kind it is."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _run(scope: _Scope, closed: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr on arrays and leaves."""
    jaxpr, consts = _open(closed)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=False))
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else env[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        outputs = _step(scope, eqn, inputs)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _step(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """One equation."""
    name = eqn.primitive.name
    weights = [v for v in values if isinstance(v, _Weight)]
    call = CALLS.get(name) if weights else None
    if call is _inline or (call is _remat and scope.finding):
        return _inline(scope, eqn, values)
    outputs: list[Any] = []
    if name in PRODUCTS:
        outputs = [_product(scope, eqn, values)]
    elif len(weights) == 1 and values[0] is weights[0]:
        outputs = _view(eqn, weights[0], values[1:])
    if not outputs:
        outputs = (call or _plain)(scope, eqn, values)
    if scope.finding:
        _observe(scope, eqn, values, outputs)
    return outputs


def _plain(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any], reason: str = "") -> list[Any]:
    """Bind an equation as it is; leaves enter as float arrays."""
    weights = [v for v in values if isinstance(v, _Weight)]
    if not weights:
        for inner in _products_inside(eqn) if scope.finding else ():
            scope.other(inner, [], "product of data")
        return _bind(eqn, values)
    if any(w.path is not None for w in weights):
        scope.other(eqn, [w for w in weights if w.path is not None], reason or _reason(eqn))
    outputs = _bind(eqn, [_array(v) for v in values])
    literal = [isinstance(var, jex.Literal) for var in eqn.invars]
    if all(a or isinstance(v, _Weight) for a, v in zip(literal, values, strict=True)):
        sources = tuple(sorted({name for w in weights for name in w.sources}))
        return [_Weight(out, sources=sources) for out in outputs]
    return outputs


def _products_inside(eqn: jex.JaxprEqn) -> Iterator[jex.JaxprEqn]:
    """Products in the jaxprs of an equation."""
    for jaxpr in jex.jaxprs_in_params(eqn.params):
        for inner in jaxpr.eqns:
            yield from [inner] if inner.primitive.name in PRODUCTS else _products_inside(inner)


def _reason(eqn: jex.JaxprEqn) -> str:
    name, shape = eqn.primitive.name, _aval(eqn.outvars[0]).shape if eqn.outvars else ()
    if name in ("gather", "dynamic_slice", "slice"):
        return "lookup"
    if name.startswith(("reduce_", "arg", "cum")):
        return "reduction"
    if name in CALLS or any(True for _ in jex.jaxprs_in_params(eqn.params)):
        return "opaque primitive"
    if all(_broadcasts(_aval(var).shape, shape) for var in eqn.invars):
        return "elementwise"
    return "opaque primitive"


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(shape, to, strict=False)
    return not shape or (len(shape) == len(to) and all(n in (1, m) for n, m in pairs))


def _bind(eqn: jex.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Bind an equation with its own parameters; derivative rules are kept."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _dot_axes(eqn: jex.JaxprEqn, side: int) -> _Axes:
    contract, batch = eqn.params["dimension_numbers"]
    free = [
        tuple(axis for axis in range(_aval(var).ndim) if axis not in (*contract[i], *batch[i]))
        for i, var in enumerate(eqn.invars)
    ]
    first = len(batch[0]) + side * len(free[0])
    return _Axes(
        weight_sum=tuple(contract[side]),
        weight_batch=tuple(batch[side]),
        weight_free=free[side],
        data_sum=tuple(contract[1 - side]),
        data_batch=tuple(batch[1 - side]),
        out_free=tuple(range(first, first + len(free[side]))),
    )


def _conv_axes(eqn: jex.JaxprEqn, side: int) -> _Axes | None:
    numbers = eqn.params["dimension_numbers"]
    if side == 0:
        return None
    return _Axes(
        weight_sum=tuple(numbers.rhs_spec[1:]),
        weight_batch=(),
        weight_free=(numbers.rhs_spec[0],),
        data_sum=(numbers.lhs_spec[1],),
        data_batch=(),
        out_free=(numbers.out_spec[1],),
    )


def _ragged_axes(eqn: jex.JaxprEqn, side: int) -> _Axes | None:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    if side == 0 or not groups:
        return None
    shared = tuple(batch[1]) + groups
    return _Axes(tuple(contract[1]), shared, (), tuple(contract[0]), tuple(batch[0]), ())


PRODUCTS: dict[str, Callable[[jex.JaxprEqn, int], _Axes | None]] = {
    "dot_general": _dot_axes,
    "conv_general_dilated": _conv_axes,
    "ragged_dot_general": _ragged_axes,
}


def _product(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> Any:
    """A product: a site if one operand is a leaf and the other is data."""
    sides = [isinstance(v, _Weight) for v in values[:2]]
    if not any(sides):
        scope.other(eqn, [], "product of data")
    if sides[0] == sides[1]:
        return _plain(scope, eqn, values, "product of leaves")[0]
    side = sides.index(True)
    weight, x = values[side], values[1 - side]
    axes = PRODUCTS[eqn.primitive.name](eqn, side)
    if weight.path is None:
        scope.other(eqn, [weight], "the weight is computed from leaves")
        return _plain(scope, eqn, values)[0]
    if axes is None or not axes.weight_sum:
        return _plain(scope, eqn, values, "not a sum over the leaf's axes")[0]

    site = _site(scope, eqn, side, weight, axes)
    scope.uses[weight.path] = site.use + 1
    if scope.finding:
        scope.found.append((site, len(scope.events or ())))
    rest = tuple(map(_array, values[2:]))
    return scope.rule(scope, _Product(site, eqn, side, axes, x, weight, rest))


def _site(scope: _Scope, eqn: jex.JaxprEqn, side: int, weight: _Weight, axes: _Axes) -> Site:
    def behind(view_axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(axis for i in view_axes for axis in weight.axes[i]))

    assert weight.path is not None
    act, out = (
        jax.ShapeDtypeStruct(_aval(var).shape, _aval(var).dtype)
        for var in (eqn.invars[1 - side], eqn.outvars[0])
    )
    contracting = behind(axes.weight_sum)
    batch = tuple(axis for axis in behind(axes.weight_batch) if axis not in contracting)
    rest = set(range(len(weight.shape))) - {*contracting, *batch, *weight.sliced}
    free = [axis for axis in behind(axes.weight_free) if axis in rest]
    channels = tuple(dict.fromkeys([*free, *sorted(rest)]))
    shared = [i for i, axis in enumerate(axes.weight_batch) if weight.axes[axis]]

    def same_size(view_axes: Sequence[int], leaf_axes: Sequence[int]) -> bool:
        sizes = (weight.value.shape[i] for i in view_axes), (weight.shape[i] for i in leaf_axes)
        return prod(sizes[0]) == prod(sizes[1])

    whole = (
        weight.whole
        and eqn.primitive.name in INTEGER_PRODUCTS
        and eqn.params.get("batch_group_count", 1) == 1
        and all(_ascending(weight.axes, part) for part in axes[:3])
        and same_size(axes.weight_sum, contracting)
        and same_size([axes.weight_batch[i] for i in shared], batch)
        and same_size(axes.weight_free, channels)
    )
    terms = prod(weight.value.shape[i] for i in axes.weight_sum)
    return Site(
        path=weight.path,
        use=scope.uses.get(weight.path, 0),
        primitive=eqn.primitive.name,
        shape=weight.shape,
        contracting=contracting,
        channels=channels,
        batch=batch,
        sliced=weight.sliced,
        act=act,
        act_channels=axes.data_sum,
        act_batch=tuple(axes.data_batch[i] for i in shared) if whole else (),
        out=out,
        out_channels=axes.out_free,
        macs=prod(out.shape) * terms * scope.turns,
        loops=scope.loops,
        stack=tuple(sorted((*weight.stack, *scope.shards))),
        shards=tuple(loop for loop, _ in scope.shards),
        whole=whole,
        window=_window(eqn),
        note=scope.note,
    )


def _window(eqn: jex.JaxprEqn) -> Window | None:
    if eqn.primitive.name != "conv_general_dilated":
        return None
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    return Window(
        axes=tuple(numbers.lhs_spec[2:]),
        strides=tuple(params["window_strides"]),
        padding=tuple(map(tuple, params["padding"])),
        dilation=tuple(params["lhs_dilation"]),
        kernel=tuple(_aval(eqn.invars[1]).shape[i] for i in numbers.rhs_spec[2:]),
        kernel_dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )


def _observe(scope: _Scope, eqn: jex.JaxprEqn, inputs: list[Any], outputs: list[Any]) -> None:
    """Keep what :func:`_finish` needs to know about an equation."""
    if not outputs:
        return
    name, aval = eqn.primitive.name, _aval(eqn.outvars[0])
    data = [
        v
        for var, v in zip(eqn.invars, inputs, strict=True)
        if not isinstance(v, _Weight) and not isinstance(var, jex.Literal)
    ]
    scope.alive += [*data, *outputs]
    if name in PASSED and len(data) == 1:
        origin = scope.alias.get(id(data[0]), id(data[0]))
        scope.alias[id(outputs[0])] = (
            tuple(aval.shape),
            str(aval.dtype),
            eqn.params.get("dimensions"),
            origin,
        )
    ordered = name in ("add", "mul") or not isinstance(next(iter(inputs), None), _Weight)
    assert scope.events is not None
    scope.events.append(
        _Event(
            name=name if name in (*PASSED, *AFFINE) else _function_name(eqn),
            eqn=eqn,
            reads=tuple(map(id, data)),
            writes=id(outputs[0]),
            leaves=tuple(path for v in inputs if isinstance(v, _Weight) for path in v.sources),
            elementwise=_is_elementwise(eqn) and all(np.shape(v) == aval.shape for v in data),
            affine=name in AFFINE and ordered,
            operand=next((v for v in inputs if isinstance(v, _Weight)), None),
        )
    )


PASSED = ("convert_element_type", "copy", "name", "pvary", "reshape", "sharding_constraint")
"""Primitives that do not change what a value is."""

AFFINE = ("add", "sub", "mul", "div")

ELEMENTWISE = """
    abs add and ceil clamp cos div eq erf exp exp2 expm1 floor ge gt integer_pow le log log1p
    logistic lt max min mul ne neg not or pow round rsqrt select_n sign sin sqrt square sub tanh
""".split()  # noqa: SIM905


def _is_elementwise(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation, or a call of such equations, is known to work entry by entry."""
    name, shape = eqn.primitive.name, _aval((*eqn.invars, *eqn.outvars)[0]).shape
    if CALLS.get(name) in (_inline, _custom):
        return all(map(_is_elementwise, _open(_closed(eqn)[0])[0].eqns))
    return name in (*ELEMENTWISE, *PASSED[:2]) or (name == "broadcast_in_dim" and shape == ())


def _function_name(eqn: jex.JaxprEqn) -> str:
    """``relu`` rather than ``custom_jvp_call``."""
    if "name" in eqn.params:
        return str(eqn.params["name"])
    for jaxpr in jex.jaxprs_in_params(eqn.params):
        if len(jaxpr.eqns) == 1 and eqn.primitive.name.startswith("custom_"):
            return _function_name(jaxpr.eqns[0])
    return eqn.primitive.name


# Calls, loops, branches, shards.


def _inline(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """``jit`` and its kin: run what is inside."""
    return _run(scope, next(iter(_closed(eqn))), values)


def _closed(eqn: jex.JaxprEqn) -> list[Any]:
    """The jaxprs of an equation, constants kept."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return [eqn.params[name] for name in names if name in eqn.params]


def _custom(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """A custom derivative: kept, unless a site is inside."""
    trial = replace(scope.copy(), events=[], found=[], rule=_product_only)
    jax.eval_shape(lambda values: list(map(_array, _run(trial, _closed(eqn)[0], values))), values)
    if any(isinstance(seen, Site) for seen, _ in trial.found):
        inner = replace(scope.copy(), note="custom derivative replaced")
        outputs = _run(inner, _closed(eqn)[0], values)
        scope.leave(inner)
        scope.results |= inner.results
        return outputs
    if scope.finding:
        scope.found += [(use, -1) for use, _ in trial.found if not use.path]
    return _plain(scope, eqn, values)


def _remat(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    last: list[_Scope] = []

    def body(*values: Any) -> tuple[list[Any], dict[str, Any]]:
        inner = scope.copy()
        outputs = _run(inner, eqn.params["jaxpr"], values)
        last[:] = [inner]
        return outputs, inner.results

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    outputs, results = jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(*values)
    scope.leave(last[0])
    scope.results |= results
    return outputs


def _strong(value: Any, aval: Any) -> Any:
    """A loop's carry as its own dtype: Python numbers and weak types would change it."""
    value = _array(value)
    if isinstance(value, jax.Array) and not getattr(value, "weak_type", False):
        return value
    return lax.convert_element_type(value, aval.dtype)


def _vary(results: Any, like: Any) -> Any:
    """Results of sites as arrays that differ between devices wherever ``like`` does."""

    def axes(a: jax.Array) -> frozenset[str]:
        return jax.typeof(a).manual_axis_type.varying

    every = frozenset[str]().union(*map(axes, jax.tree.leaves(like)))

    def marked(a: jax.Array) -> jax.Array:
        missing = tuple(every - axes(a))
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(marked, results)


def _split(values: Sequence[Any], *counts: int) -> list[list[Any]]:
    ends = np.cumsum([0, *counts, len(values) - sum(counts)])
    return [list(values[a:b]) for a, b in pairwise(ends)]


def _carried(scope: _Scope, eqn: jex.JaxprEqn, values: Sequence[Any], kept: set[int]) -> None:
    """Note leaves that a loop carries and changes."""
    changed = [v for i, v in enumerate(values) if isinstance(v, _Weight) and i not in kept]
    if any(w.path is not None for w in changed):
        scope.other(eqn, [w for w in changed if w.path is not None], "changed by a loop")


def _unchanged(body: jex.Jaxpr, first: int, count: int) -> set[int]:
    """Places in a loop's carry that the body returns as it got them."""
    return {i for i in range(count) if body.outvars[i] is body.invars[first + i]}


def _sliceable(weight: Any, length: int) -> Any:
    """A stacked leaf all of whose arrays have the stacked axis in full."""
    if not isinstance(weight, _Weight):
        return weight

    def full(a: jax.Array) -> jax.Array:
        a = jnp.atleast_1d(a)
        return a if len(a) == length else jnp.repeat(a, length // len(a), 0)

    return replace(
        weight, value=jax.tree.map(full, weight.value), acts=jax.tree.map(full, weight.acts)
    )


def _slice_of(weight: Any, loop: int, length: int) -> Any:
    if not isinstance(weight, _Weight) or weight.path is None:
        return weight
    return replace(
        weight,
        axes=weight.axes[1:],
        sliced=(*weight.sliced, *weight.axes[0]),
        stack=(*weight.stack, (loop, length)),
    )


def _scan(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """Leaves that are scanned over give stacked results; those that are constant, merged ones."""
    closed, length = eqn.params["jaxpr"], eqn.params["length"]
    jaxpr, _ = _open(closed)
    pairs = list(zip(jaxpr.invars, eqn.invars, strict=True))
    n_xs = sum(_aval(inner).ndim != _aval(outer).ndim for inner, outer in pairs)
    ends = zip(jaxpr.outvars, eqn.outvars, strict=True)
    n_carry = sum(_aval(inner).ndim == _aval(outer).ndim for inner, outer in ends)
    n_consts = len(values) - n_carry - n_xs
    consts, carry, xs = _split(values, n_consts, n_carry)
    kept = _unchanged(jaxpr, n_consts, n_carry)
    _carried(scope, eqn, carry, kept)
    avals = [_aval(var) for var in jaxpr.invars[n_consts : n_consts + n_carry]]

    start, last, loop = scope.enter(length), [scope], scope.next_loop
    inside = scope.sites_inside()
    stacked = [site for site in inside if loop in dict(site.stack)]
    merged = [site for site in inside if loop not in dict(site.stack)] if scope.stat else []
    raw = [s.name for s in merged if scope.stat and scope.stat.merge is None]
    totals = {site.name: scope.identity(site) for site in merged if site.name not in raw}
    deltas = {s.name: scope.deltas[s.name] for s in stacked if s.name in scope.deltas}

    def body(state: Any, slices: Any) -> Any:
        moving, totals = state
        slices, deltas = slices
        inner = start.copy()
        inner.deltas |= deltas
        moving = iter(moving)
        now = [v if i in kept else next(moving) for i, v in enumerate(carry)]
        slices = [_slice_of(v, loop, length) for v in slices]
        outputs = _run(inner, closed, [*consts, *now, *slices])
        last[:] = [inner]
        after, ys = outputs[:n_carry], [_array(y) for y in outputs[n_carry:]]
        after = [_strong(v, avals[i]) for i, v in enumerate(after) if i not in kept]
        results = inner.results
        totals = {
            s.name: scope.merge(s, totals[s.name], results.pop(s.name))
            for s in merged
            if s.name not in raw
        }
        return (after, _vary(totals, values)), (ys, results)

    init = [_strong(v, avals[i]) for i, v in enumerate(carry) if i not in kept]
    xs = [_sliceable(v, length) for v in xs]
    (after, totals), (ys, results) = lax.scan(
        body,
        (init, _vary(totals, values)),
        (xs, deltas),
        length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    scope.leave(last[0])
    scope.results |= results | totals
    after = iter(after)
    return [v if i in kept else next(after) for i, v in enumerate(carry)] + ys


def _while(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """Results are merged from turn to turn."""
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    counts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, consts, carry = _split(values, *counts)
    inner_jaxpr, _ = _open(body)
    kept = _unchanged(inner_jaxpr, counts[1], len(carry))
    _carried(scope, eqn, carry, kept)
    leaves = [v for v in cond_consts if isinstance(v, _Weight)]
    if leaves:
        scope.other(eqn, leaves, "condition of a loop")
    avals = [_aval(var) for var in inner_jaxpr.invars[counts[1] :]]
    start, last = scope.enter(), [scope]
    merged = scope.sites_inside() if scope.stat else []
    totals = {site.name: scope.identity(site) for site in merged}

    def whole(moving: Sequence[Any]) -> list[Any]:
        places = iter(moving)
        return [v if i in kept else next(places) for i, v in enumerate(carry)]

    def proceed(state: Any) -> Any:
        arguments = [*map(_array, cond_consts), *map(_array, whole(state[0]))]
        return jex.jaxpr_as_fun(condition)(*arguments)[0]

    def turn(state: Any) -> Any:
        moving, totals = state
        inner = start.copy()
        outputs = _run(inner, body, [*consts, *whole(moving)])
        last[:] = [inner]
        after = [_strong(v, avals[i]) for i, v in enumerate(outputs) if i not in kept]
        totals = {s.name: scope.merge(s, totals[s.name], inner.results[s.name]) for s in merged}
        return after, _vary(totals, values)

    init = [_strong(v, avals[i]) for i, v in enumerate(carry) if i not in kept]
    moving, totals = lax.while_loop(proceed, turn, (init, _vary(totals, values)))
    scope.leave(last[0])
    scope.results |= totals
    return whole(moving)


def _cond(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """A branch that is not taken returns what it would before seeing data."""
    index, *operands = values
    branches = eqn.params["branches"]
    inside = scope.sites_inside() if scope.stat else []
    blank = {site.name: scope.identity(site) for site in inside}
    starts = [scope.enter()]

    def branch(i: int) -> tuple[list[Any], dict[str, Any]]:
        inner = starts[i].copy()
        outputs = _run(inner, branches[i], operands)
        starts[i + 1 :] = [inner.copy()]
        outputs = [_strong(v, _aval(out)) for v, out in zip(outputs, eqn.outvars, strict=True)]
        return outputs, _vary(blank | inner.results, values)

    outputs, results = lax.switch(_array(index), [partial(branch, i) for i in range(len(branches))])
    scope.leave(starts[-1])
    scope.results |= results
    return outputs


def _shard_map(scope: _Scope, eqn: jex.JaxprEqn, values: list[Any]) -> list[Any]:
    """Codes stay sharded as the floats were; every device returns its results, merged outside."""
    params = eqn.params
    mesh, axes = params["mesh"], tuple(params["newly_manual_axes"])
    devices = prod(mesh.shape[axis] for axis in axes)
    start, last, loop = scope.enter(devices), [scope], scope.next_loop
    start.shards = (*scope.shards, (loop, devices))
    inside = scope.sites_inside()
    deltas = {s.name: scope.deltas[s.name] for s in inside if s.name in scope.deltas}
    names = [site.name for site in inside] if scope.stat else []
    specs = list(params["in_specs"])
    values = [_shardable(v, spec, mesh) for v, spec in zip(values, specs, strict=True)]
    specs = [_specs(v, spec) for v, spec in zip(values, specs, strict=True)]

    def body(values: list[Any], deltas: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        inner = start.copy()
        inner.deltas |= {name: a.reshape(a.shape[1:]) for name, a in deltas.items()}
        outputs = _run(inner, params["jaxpr"], values)
        last[:] = [inner]
        return list(map(_array, outputs)), jax.tree.map(lambda a: a[None], inner.results)

    per_device = PartitionSpec(axes)
    outputs, results = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(specs, dict.fromkeys(deltas, per_device)),
        out_specs=(list(params["out_specs"]), dict.fromkeys(names, per_device)),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(values, deltas)
    if scope.stat and scope.stat.merge is not None:
        for site in inside:
            parts = [jax.tree.map(lambda a, i=i: a[i], results[site.name]) for i in range(devices)]
            results[site.name] = reduce(partial(scope.merge, site), parts)
    scope.leave(last[0])
    scope.results |= results
    return outputs


def _specs(value: Any, spec: Any) -> Any:
    """A leaf's spec for each of its arrays: an axis that is shared is not sharded."""
    if not isinstance(value, _Weight):
        return spec

    def of(a: Any) -> PartitionSpec:
        names = [*spec, *[None] * (len(value.value.shape) - len(spec))]
        return PartitionSpec(*(None if n == 1 else s for n, s in zip(a.shape, names, strict=True)))

    acts = jax.tree.map(lambda a: PartitionSpec(), value.acts)
    return replace(value, value=jax.tree.map(of, value.value), acts=acts)


def _shardable(value: Any, spec: Any, mesh: Any) -> Any:
    """A leaf whose groups would be cut, or be one a device and look shared, enters as floats."""
    if not isinstance(value, _Weight) or not is_quantized(value.value):
        return value

    def shards(entry: Any) -> int:
        axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        return prod(mesh.shape[axis] for axis in axes)

    def whole(groups: int, size: int, parts: int) -> bool:
        return groups in (1, size) or (groups % parts == 0 and groups > parts)

    even = all(
        whole(a.shape[i], value.value.shape[i], shards(entry))
        for a in jax.tree.leaves(value.value)
        for i, entry in enumerate(spec)
    )
    return value if even else replace(value, value=value.numbers())


CALLS: dict[str, Callable[[_Scope, jex.JaxprEqn, list[Any]], list[Any]]] = {
    "jit": _inline,
    "pjit": _inline,
    "closed_call": _inline,
    "core_call": _inline,
    "remat2": _remat,
    "checkpoint": _remat,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
"""Primitives with a jaxpr inside that a leaf may enter; in all others it becomes a float array."""


# The five functions.


class _Traced(NamedTuple):
    """A function as a jaxpr, and the arrays and leaves that it is to be run on."""

    jaxpr: jex.ClosedJaxpr
    values: list[Any]
    restore: Callable[[Sequence[Any]], Any]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _trace(apply_fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Traced:
    """Trace with float arrays in place of quantized leaves; what is no array stays as it is."""
    leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_quantized)
    traced = [i for i, leaf in enumerate(leaves) if is_quantized(leaf) or _is_array(leaf)]
    outputs: list[Any] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        mixed = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            leaf = leaves[i]
            mixed[i] = array.astype(leaf.dtype) if is_quantized(leaf) else array
        args, kwargs = jax.tree.unflatten(structure, mixed)
        outputs[:] = jax.tree.flatten(apply_fn(*args, **kwargs))
        return [leaf for leaf in outputs[0] if _is_array(leaf)]

    # Codes stand in for floats: they are sharded alike, and a cast of a leaf is a view of it.
    arrays = [jax.tree.leaves(leaves[i])[0] for i in traced]
    try:
        jaxpr = jax.make_jaxpr(flat)(*arrays)
    except Exception as error:
        shapes = jax.tree.map(np.shape, (args, kwargs), is_leaf=is_quantized)
        error.add_note(f"lnq: apply_fn does not trace on arguments of shapes {shapes}")
        raise

    def restore(arrays: Sequence[Any]) -> Any:
        found = iter(arrays)
        return jax.tree.unflatten(
            outputs[1], [next(found) if _is_array(leaf) else leaf for leaf in outputs[0]]
        )

    named = _named_weights(args, kwargs)
    values = [_leaf(named[i], leaves[i]) if i in named else leaves[i] for i in traced]
    return _Traced(jaxpr, values, restore)


def _named_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, str]:
    """Place and name of every float or quantized leaf of the arguments that hold parameters.

    These are the arguments with quantized leaves; if there is none, the first.
    """
    every = (*args, *(kwargs[name] for name in sorted(kwargs)))  # as JAX flattens them
    holders = [any(map(is_quantized, jax.tree.leaves(a, is_leaf=is_quantized))) for a in every]
    if not any(holders):
        holders = [number == 0 for number in range(len(every))]
    named, place = {}, 0
    for number, (arg, holds) in enumerate(zip(every, holders, strict=True)):
        first = sum(holders[:number]) == 0
        for name, leaf in tree.named_leaves(arg):
            if holds and (is_quantized(leaf) or tree.is_float(leaf)):
                named[place] = name if first else f"{number}/{name}"
            place += 1
    return named


def _interpret(scope: _Scope, traced: _Traced, values: Sequence[Any]) -> Any:
    return traced.restore([_array(v) for v in _run(scope, traced.jaxpr, values)])


def _product_only(scope: _Scope, product: _Product) -> jax.Array:
    return product.bind(product.x, product.weight.numbers())


def _find(traced: _Traced) -> Sites:
    scope = _Scope(_product_only, events=[])

    def run(values: list[Any]) -> list[Any]:
        outputs = _run(scope, traced.jaxpr, values)
        for value in outputs:
            if isinstance(value, _Weight) and value.path is not None:
                use = OtherUse(value.path, "return", "returned as an output", value.value.shape)
                scope.found.append((use, -1))
        return [_array(v) for v in outputs]

    jax.eval_shape(run, traced.values)
    return _finish(scope)


def _finish(scope: _Scope) -> Sites:
    """Number the inputs, and follow each site's output as far as it stays one value."""
    numbers: dict[Any, int] = {}
    sites = []
    for site, product, path in _paths(scope):
        read = product.reads[0] if product.reads else -1
        number = numbers.setdefault(scope.alias.get(read, read), len(numbers))
        sites.append(_followed(site._replace(input=number), path))
    return Sites(tuple(sites), tuple(use for use, _ in scope.found if isinstance(use, OtherUse)))


def _paths(scope: _Scope) -> Iterator[tuple[Site, _Event, list[_Event]]]:
    """Every site, its product, and what becomes of its output while it stays one value.

    First sums and products with leaves, then functions of the value alone.
    """
    events = scope.events or []
    readers: dict[int, list[_Event]] = {}
    for event in events:
        for read in event.reads:
            readers.setdefault(read, []).append(event)
    for site, place in scope.found:
        if isinstance(site, Site):
            yield site, events[place], list(_path(events[place].writes, readers))


def _path(value: int, readers: Mapping[int, list[_Event]]) -> Iterator[_Event]:
    alone = False
    while len(readers.get(value, [])) == 1:
        (event,) = readers[value]
        if event.name not in PASSED:
            if not event.elementwise or len(event.reads) != 1:
                return
            if event.leaves and (alone or not event.affine):
                return
            alone = not event.leaves
        yield event
        value = event.writes


def _followed(site: Site, path: Sequence[_Event]) -> Site:
    """Add bias, affine leaves and elementwise chain."""
    bias, sign, affine, chain = None, 1, [], []
    for event in path:
        if event.name in PASSED:
            pass
        elif not event.leaves:
            chain.append(event.name)
        elif event.name in ("add", "sub") and not (bias or affine) and len(event.leaves) == 1:
            (bias,), sign = event.leaves, 1 if event.name == "add" else -1
        else:
            affine += event.leaves
    affine, chain = tuple(dict.fromkeys(affine)), tuple(chain)
    return site._replace(bias=bias, bias_sign=sign, affine=affine, chain=chain)


def find_sites(apply_fn: ApplyFn, params: Params, *args: Any, **kwargs: Any) -> Sites:
    """List where leaves of ``params`` meet data, and how else they are used.

    Traces once, abstractly: nothing is computed, and arrays may be ``jax.ShapeDtypeStruct``.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``, any JAX function.
      params: Its parameters; float leaves count, quantized ones too.
      *args: Its other arguments.
      **kwargs: The same, by name.

    Raises:
      Exception: Whatever ``apply_fn`` raises while tracing, with a note on the shapes.

    Example:
      >>> found = find_sites(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]),
      ...                    {"w": jnp.ones((3, 4)), "b": jnp.ones((1, 4))}, jnp.ones((2, 3)))
      >>> site, = found.sites
      >>> site.path, site.contracting, site.channels, site.bias, site.chain, site.macs
      ('w', (0,), (1,), 'b', ('tanh',), 24)
      >>> found.others[0].path, found.others[0].reason
      ('b', 'elementwise')
    """
    return _find(_trace(apply_fn, (params, *args), kwargs))


def tap(
    apply_fn: ApplyFn,
    stat: Stat,
    only: Callable[[Site], bool] | None = None,
    through: Callable[[jax.Array, QParams | None, Any], jax.Array] | None = None,
    *,
    outputs: bool = False,
) -> ApplyFn:
    """Return ``apply_fn`` with a second output: a statistic of the data at each site.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``.
      stat: What to compute. A leaf that a ``scan`` slices gives stacked results; one that is
        constant in a loop gives merged ones, and so do shards.
      only: Which sites; all by default.
      through: ``through(x, grid, statistic) -> x``: what the product reads in place of the data, so
        that later sites see what becomes of it; ``grid`` is that of the data as the leaf holds it,
        or None. By default what the leaf asks for.
      outputs: Whether ``stat`` and ``through`` have the product in place of its data.

    Returns:
      A function with the same arguments that returns ``(outputs, {site name: statistic})``.

    Raises:
      ValueError: If a raw result would have to leave a ``while`` or a branch.

    Example:
      >>> largest = Stat(lambda x, site: jnp.abs(x).max())
      >>> out, stats = tap(lambda p, x: x @ p["w"], largest)({"w": jnp.eye(2)}, jnp.ones((3, 2)))
      >>> stats
      {'w': Array(1., dtype=float32)}
    """

    def tapped(params: Params, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        traced = _trace(apply_fn, (params, *args), kwargs)
        plan = tuple(site for site in _find(traced).sites if only is None or only(site))
        names = {site.name for site in plan}

        def rule(scope: _Scope, product: _Product) -> jax.Array:
            if product.site.name not in names:
                return _multiply(scope, product)
            return (of_output if outputs else of_data)(scope, product)

        def of_data(scope: _Scope, product: _Product) -> jax.Array:
            found = scope.results[product.site.name] = stat.observe(product.x, product.site)
            if through is None:
                return _multiply(scope, product)
            x = through(product.x, _act(product), found)
            return _product_only(scope, product._replace(x=x))

        def of_output(scope: _Scope, product: _Product) -> jax.Array:
            y = _multiply(scope, product)
            found = scope.results[product.site.name] = stat.observe(y, product.site)
            return y if through is None else through(y, _act(product), found)

        scope = _Scope(rule, plan=plan, stat=stat, outputs=outputs)
        outs = _interpret(scope, traced, traced.values)
        return outs, {site.name: scope.results[site.name] for site in plan}

    return tapped


def tails(apply_fn: ApplyFn, params: Params, *args: Any, **kwargs: Any) -> dict[str, Tail]:
    """What the model does to the output of each site before it meets other values.

    Inside a loop a leaf counts if it is sliced as the site's own is. What differs between examples
    or places is no part of it: a tail ends there, and that of a site with a leaf along its output's
    other axes is empty.

    Args:
      apply_fn: ``apply_fn(params, *args, **kwargs)``.
      params: Its parameters.
      *args: Its other arguments; one example will do.
      **kwargs: The same, by name.

    Returns:
      By site name.

    Example:
      >>> model = lambda p, x: jax.nn.relu((x @ p["w"]) * p["scale"] - p["bias"])
      >>> p = {"w": jnp.eye(2), "scale": jnp.array([[2.0, 3.0]]), "bias": jnp.ones((1, 2))}
      >>> tail = tails(model, p, jnp.ones((5, 2)))["w"]
      >>> tail.bias, tail.bias_sign, tail.follow(tail.factor * jnp.array([[0.4, 2.0]]) + tail.shift)
      ('bias', -1, Array([[0., 5.]], dtype=float32))
    """
    traced = _trace(apply_fn, (params, *args), kwargs)
    parts: dict[str, tuple[str | None, int, list[jex.JaxprEqn]]] = {}

    def run(values: list[Any]) -> dict[str, tuple[jax.Array, ...]]:
        scope = _Scope(_product_only, events=[])
        _run(scope, traced.jaxpr, values)
        leaves = {v.path: v.numbers() for v in values if isinstance(v, _Weight)}
        found = {}
        for site, _, path in _paths(scope):
            found[site.name], bias, sign, eqns = _affine(site, path, leaves)
            parts[site.name] = bias, sign, eqns
        return found

    found = {}
    for name, (factor, shift, even) in jax.jit(run)(traced.values).items():
        bias, sign, eqns = parts[name]
        if not bool(even):
            factor, shift, bias, eqns = jnp.ones_like(factor), jnp.zeros_like(shift), None, []
        found[name] = Tail(factor, shift, bias, sign, partial(_follow, eqns))
    return found


def _affine(
    site: Site, path: Sequence[_Event], leaves: Mapping[Any, jax.Array]
) -> tuple[tuple[jax.Array, ...], str | None, int, list[jex.JaxprEqn]]:
    """Factor, shift, and whether they are the same everywhere; bias, sign, and what follows."""
    layers = prod(site.shape[i] for i in site.sliced)
    channels = prod(site.out.shape[i] for i in site.out_channels)
    factor, shift, even = (
        jnp.ones((layers, channels)),
        jnp.zeros((layers, channels)),
        jnp.array(True),
    )
    bias, sign, eqns, moved = None, 1, [], False
    for event in path:
        moved |= _aval(event.eqn.outvars[0]).shape != site.out.shape
        if event.operand is None:
            eqns += [event.eqn] if event.name not in PASSED else []
            continue
        a, same = _per_channel(site, event.operand, leaves, (layers, channels))
        if a is None or moved:
            break
        even, bias = even & same, None
        if event.name in ("add", "sub"):
            sign = 1 if event.name == "add" else -1
            shift, bias = shift + sign * a, _sorted_path(event.operand)
        else:
            a = a if event.name == "mul" else 1.0 / a
            factor, shift = factor * a, shift * a
    return (factor, shift, even), bias, sign, eqns


def _per_channel(
    site: Site, operand: _Weight, leaves: Mapping[Any, jax.Array], shape: tuple[int, int]
) -> tuple[jax.Array | None, Any]:
    """Leaves that meet a site's output, one number a channel, and whether that is all of them."""
    if site.loops:  # the operand is out of reach, but a leaf is known by its name
        return _of_each_layer(site, operand, leaves, shape), True
    a = operand.numbers()
    if not _broadcasts(a.shape, site.out.shape):
        return None, False
    a = jnp.broadcast_to(a, site.out.shape)
    first = a[tuple(slice(None if i in site.out_channels else 1) for i in range(a.ndim))]
    return first.astype(jnp.float32).reshape(shape), jnp.all(a == first)


def _of_each_layer(
    site: Site, operand: _Weight, leaves: Mapping[Any, jax.Array], shape: tuple[int, int]
) -> jax.Array | None:
    """A leaf that is sliced as the site's is, and has an entry for each channel and no other."""
    stack = tuple(pair for pair in site.stack if pair[0] not in site.shards)
    known = operand.path is not None and operand.whole and operand.stack == stack
    if not known or len(operand.axes) != len(site.out.shape):
        return None
    channels = [axis for i in site.out_channels for axis in operand.axes[i]]
    order = (*operand.sliced, *channels)
    ones = [i for i, n in enumerate(operand.shape) if n == 1 and i not in order]
    if len({*ones, *order}) != len(operand.shape) or prod(operand.shape) != prod(shape):
        return None
    return leaves[operand.path].transpose(*ones, *order).astype(jnp.float32).reshape(shape)


def _sorted_path(operand: _Weight) -> str | None:
    """Name of a leaf that meets the data as it stands, its axes in their order."""
    axes = [*operand.sliced, *(axis for behind in operand.axes for axis in behind)]
    order = [axis for axis in axes if operand.shape[axis] > 1]
    return operand.path if operand.whole and order == sorted(order) else None


def _follow(eqns: Sequence[jex.JaxprEqn], y: jax.Array) -> jax.Array:
    """Equations of one value after another, on an array of any shape."""
    for eqn in eqns:
        values = [var.val if isinstance(var, jex.Literal) else y for var in eqn.invars]
        y = _entrywise(eqn, values)
    return y.astype(jnp.float32)


def _entrywise(eqn: jex.JaxprEqn, values: Sequence[Any]) -> jax.Array:
    """An equation known to work entry by entry, with scalars left scalars."""
    values = [
        jnp.asarray(v).astype(_aval(var).dtype) for v, var in zip(values, eqn.invars, strict=True)
    ]
    if inner := _closed(eqn):
        jaxpr, consts = _open(inner[0])
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
        for step in jaxpr.eqns:
            inputs = [var.val if isinstance(var, jex.Literal) else env[var] for var in step.invars]
            env[step.outvars[0]] = _entrywise(step, inputs)
        (out,) = jaxpr.outvars
        return jnp.asarray(out.val) if isinstance(out, jex.Literal) else env[out]
    if eqn.primitive.name == "broadcast_in_dim":
        return values[0]
    (out,) = _bind(eqn, jnp.broadcast_arrays(*values))
    return out


def perturbed(apply_fn: ApplyFn) -> Callable[..., Any]:
    """Return ``f(params, deltas, *args)``: ``apply_fn`` with ``deltas`` added at sites' outputs.

    ``deltas`` maps site names to arrays of ``site.delta``; sites that are not in it stay. At zero
    the gradient with respect to them is that of the outputs of the sites; a site that runs several
    times without its leaf being sliced (an LSTM's) has the sum.

    Example:
      >>> f = perturbed(lambda p, x: jnp.sum((x @ p["w"]) ** 2))
      >>> args = {"w": jnp.eye(2)}, {"w": jnp.zeros((1, 2))}, jnp.array([[3.0, 4.0]])
      >>> jax.grad(f, argnums=1)(*args)["w"]
      Array([[6., 8.]], dtype=float32)
    """

    def rule(scope: _Scope, product: _Product) -> jax.Array:
        out, name = _product_only(scope, product), product.site.name
        return out + scope.deltas[name] if name in scope.deltas else out

    def moved(params: Params, deltas: Mapping[str, jax.Array], *args: Any, **kwargs: Any) -> Any:
        traced = _trace(apply_fn, (params, *args), kwargs)
        plan = _find(traced).sites
        unknown = set(deltas) - {site.name for site in plan}
        if unknown:
            raise ValueError(f"deltas: {sorted(unknown)} are no sites; find_sites lists them")
        for site in plan:
            if site.name in deltas and jnp.shape(deltas[site.name]) != site.delta.shape:
                raise ValueError(
                    f"deltas: {site.name!r} has shape {jnp.shape(deltas[site.name])}, the site's "
                    f"output has {site.delta.shape}; use site.delta"
                )
        return _interpret(_Scope(rule, plan=plan, deltas=dict(deltas)), traced, traced.values)

    return moved


def quantized(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``apply_fn`` that also takes quantized leaves, in any argument.

    At a site the data is rounded to ``acts[use]`` if the leaf has it, and multiplied: integers by
    integers where that grid names an integer dtype (one grid for all data, weights of int8 with no
    groups along the sum), else floats by dequantized weights, which XLA fuses. Anywhere else the
    leaf is dequantized. Float leaves stay what they are.

    Build it once: a new ``quantized(f)`` under ``jit`` traces again. Gradients reach
    :class:`~lnq.quantizer.FakeQuantTensor` leaves: values, grids and the grids of the data.

    Example:
      >>> from lnq.quantizer import make_qparams
      >>> w = quantize(jnp.array([[0.5], [1.0]]), make_qparams([[0.5]], qmin=-8, qmax=7))
      >>> quantized(lambda p, x: x @ p)(w, jnp.array([[2.0, 3.0]]))
      Array([[4.]], dtype=float32)
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        traced = _trace(apply_fn, args, kwargs)
        return _interpret(_Scope(_multiply), traced, traced.values)

    return run


def _multiply(scope: _Scope, product: _Product) -> jax.Array:
    """The product at a site, as the leaf asks for it."""
    act = _act(product)
    if act is None:
        return _product_only(scope, product)
    if _has_integers(product, act):
        return _integer_product(product, act)
    return product.bind(fake_quant(product.x, act), product.weight.numbers())


def _act(product: _Product) -> QParams | None:
    """The grid of the data; one that is the same for all of it fits data of any rank."""
    acts, use = product.weight.acts, product.site.use
    act = acts[use] if use < len(acts) else None
    if act is not None and all(a.size == 1 for a in jax.tree.leaves(act)):
        return jax.tree.map(lambda a: a.reshape((1,) * jnp.ndim(product.x)), act)
    return act


def _has_integers(product: _Product, act: QParams) -> bool:
    """Whether one factor, and one offset per channel, stand before a sum of int8 products."""
    leaf, params = product.weight.value, product.eqn.params
    if act.dtype is None or not isinstance(leaf, QTensor) or leaf.codes.dtype != jnp.int8:
        return False
    if product.site.primitive not in INTEGER_PRODUCTS or params.get("batch_group_count", 1) > 1:
        return False
    grid, summed = leaf.qparams, product.axes.weight_sum
    shared = all(a.shape[i] == 1 for a in (grid.scale, grid.zero_point) for i in summed)
    return shared and grid.in_scale is None and act.scale.size == 1


def _integer_product(product: _Product, act: QParams) -> jax.Array:
    r"""int8 by int8, summed in int32.

    .. math:: s_x s_w \left[\sum q_x q_w - z_x \sum q_w - z_w \sum (q_x - z_x)\right]
    """
    grid, codes = product.weight.value.qparams, product.weight.value.codes
    q = quantize(product.x, act, jnp.int8).codes
    offset = jnp.round(act.zero_point).astype(jnp.int32).reshape(())
    total, sum_x, place = INTEGER_PRODUCTS[product.site.primitive](product, q, offset)
    summed = product.axes.weight_sum
    sum_w = jnp.sum(codes, summed, keepdims=True, dtype=jnp.int32)
    terms = prod(codes.shape[i] for i in summed)
    exact = (total - offset * place(sum_w)).astype(jnp.float32)
    shift = place(grid.zero_point) * (sum_x - offset * terms).astype(jnp.float32)
    out = (exact - shift) * (place(grid.scale) * act.scale.reshape(()))
    return out.astype(product.site.out.dtype)


def _integer_dot(
    product: _Product, q: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Sum of products of codes, sum of codes of the data, and where a field of the weight goes."""
    contract, batch = product.eqn.params["dimension_numbers"]
    weight, data = product.side, 1 - product.side
    free = {
        weight: product.weight.value.codes.ndim - len(contract[weight]) - len(batch[weight]),
        data: q.ndim - len(contract[data]) - len(batch[data]),
    }

    def place(a: jax.Array, side: int = weight) -> jax.Array:
        others = [i for i in range(a.ndim) if i not in (*batch[side], *contract[side])]
        a = lax.transpose(a, (*batch[side], *others, *contract[side]))
        outer, own = a.shape[: len(batch[side])], a.shape[len(batch[side]) :][: len(others)]
        missing = (1,) * free[1 - side]
        return a.reshape(outer + (missing + own if side == 1 else own + missing))

    codes = product.weight.value.codes
    total = product.bind(q, codes, preferred_element_type=jnp.dtype("int32"), precision=None)
    sum_x = jnp.sum(q, tuple(contract[data]), keepdims=True, dtype=jnp.int32)
    return total, place(sum_x, data), place


def _integer_conv(
    product: _Product, q: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """As :func:`_integer_dot`; what the convolution would pad with zeros is padded with codes."""
    params, codes = product.eqn.params, product.weight.value.codes
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    feature = numbers.out_spec[1]
    spatial = dict(zip(numbers.lhs_spec[2:], range(len(params["padding"])), strict=True))
    edges = [
        (*params["padding"][spatial[i]], params["lhs_dilation"][spatial[i]] - 1)
        if i in spatial
        else (0, 0, 0)
        for i in range(q.ndim)
    ]
    padded = lax.pad(q, offset.astype(jnp.int8), edges)
    bind = partial(
        product.bind,
        padded,
        preferred_element_type=jnp.dtype("int32"),
        precision=None,
        padding=((0, 0),) * len(spatial),
        lhs_dilation=(1,) * len(spatial),
    )

    def place(a: jax.Array) -> jax.Array:
        return a.reshape([-1 if i == feature else 1 for i in range(a.ndim)])

    channels = codes.shape[numbers.rhs_spec[0]]
    one = [groups if i == numbers.rhs_spec[0] else n for i, n in enumerate(codes.shape)]
    sum_x = jnp.repeat(bind(jnp.ones(one, jnp.int8)), channels // groups, feature)
    return bind(codes), sum_x, place


INTEGER_PRODUCTS = {"dot_general": _integer_dot, "conv_general_dilated": _integer_conv}
"""Products that can be taken in int8."""


def integer_dtype(site: Site, bits: ArrayLike) -> Any:
    """In which dtype data of these widths is multiplied at a site; None is in float.

    Example:
      >>> site, = find_sites(lambda p, x: x @ p, jnp.eye(2), jnp.ones((1, 2))).sites
      >>> integer_dtype(site, 4), integer_dtype(site, 9)
      (dtype('int8'), None)
    """
    fits = site.primitive in INTEGER_PRODUCTS and int(np.max(bits)) <= 8
    return jnp.dtype("int8") if fits else None
