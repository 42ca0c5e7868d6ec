"""lnq: post-training compression of JAX models.

A quantized model is the same parameter tree with some leaves replaced by
:class:`~lnq.quantizer.QTensor`. Methods are modules (:mod:`lnq.riq`, :mod:`lnq.aciq`,
:mod:`lnq.lapq`, :mod:`lnq.adaquant`, :mod:`lnq.pipelines`); a tree goes to a file with :func:`save`
and comes back with :func:`load`; ``quantized(apply_fn)`` runs it. :mod:`lnq.attention` is attention
in linear time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "FakeQuantTensor": "quantizer",
    "QParams": "quantizer",
    "QTensor": "quantizer",
    "dequantize": "quantizer",
    "find_sites": "sites",
    "quantized": "sites",
    "FormatError": "container",
    "info": "container",
    "load": "container",
    "save": "container",
    "UnreachableError": "types",
}
_MODULES = (
    "aciq",
    "adaquant",
    "allocation",
    "ans",
    "attention",
    "calibration",
    "checkpoint",
    "clipping",
    "container",
    "demo",
    "distortion",
    "feedback",
    "landscape",
    "lapq",
    "matrices",
    "pipelines",
    "quantizer",
    "reuse",
    "riq",
    "search",
    "sites",
    "tree",
    "tuning",
    "types",
    "widths",
)

__all__ = ["__version__", *_HOME, *_MODULES]

if TYPE_CHECKING:
    from lnq import (
        aciq,
        adaquant,
        allocation,
        ans,
        attention,
        calibration,
        checkpoint,
        clipping,
        container,
        demo,
        distortion,
        feedback,
        landscape,
        lapq,
        matrices,
        pipelines,
        quantizer,
        reuse,
        riq,
        search,
        sites,
        tree,
        tuning,
        types,
        widths,
    )
    from lnq.container import FormatError, info, load, save
    from lnq.quantizer import FakeQuantTensor, QParams, QTensor, dequantize
    from lnq.sites import find_sites, quantized
    from lnq.types import UnreachableError


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"lnq.{name}")
    if name in _HOME:
        return getattr(import_module(f"lnq.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lnq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
