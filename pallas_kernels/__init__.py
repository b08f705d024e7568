"""Sequence operations with several implementations: the definition, and fast plain JAX.

Every operation takes `impl`: "auto", or the name of an implementation, which then runs or raises.
`pallas_kernels.dispatch.resolve` tells which one a call would run.
"""

from pallas_kernels import context_parallel, dispatch
from pallas_kernels.attention import attention
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.diagonal_scan import diagonal_scan
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.mlstm import MLSTMMemory, mlstm
from pallas_kernels.neural_memory import neural_memory
from pallas_kernels.ring_attention import ring_attention
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.taylor_attention import taylor_attention
from pallas_kernels.ttt import ttt_linear, ttt_mlp

__all__ = [
    "MLSTMMemory",
    "attention",
    "context_parallel",
    "delta_rule",
    "diagonal_scan",
    "dispatch",
    "linear_attention",
    "mlstm",
    "neural_memory",
    "ring_attention",
    "selective_scan",
    "taylor_attention",
    "ttt_linear",
    "ttt_mlp",
]
