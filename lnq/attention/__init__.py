"""Linear Log-Normal attention for Flax: linear time, softmax's concentration.

:func:`attention_fn` goes into any Flax attention module; :mod:`lnq.attention.linen` and
:mod:`lnq.attention.nnx` have modules that also decode; :mod:`lnq.attention.lln` has the functions,
:mod:`lnq.attention.concentration` the instruments.
"""

from lnq.attention.drop_in import attention_fn
from lnq.attention.lln import lln_attention, lln_diag_attention

__all__ = ["attention_fn", "lln_attention", "lln_diag_attention"]
