"""Sequence operations with several implementations: the definition, and fast plain JAX.

Every operation takes `impl`: "auto", or the name of an implementation, which then runs or raises.
`pallas_kernels.dispatch.resolve` tells which one a call would run.
"""

from pallas_kernels import dispatch
from pallas_kernels.attention import attention
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.linear_attention import linear_attention

__all__ = ["attention", "delta_rule", "dispatch", "linear_attention"]
