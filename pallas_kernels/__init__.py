"""Sequence operations with several implementations: a definition, fast plain JAX, and Pallas kernels.

Every operation takes `impl`: "auto", or the name of an implementation, which then runs or raises. See
`pallas_kernels.dispatch.resolve` to learn which one a call would run.
"""

from pallas_kernels import dispatch
from pallas_kernels.attention import attention
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention

__all__ = ["attention", "delta_rule", "dispatch", "linear_attention"]
