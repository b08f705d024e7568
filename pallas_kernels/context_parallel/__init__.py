"""Recurrences over a sequence that is split over a mesh axis, exact, to be called in jax.shard_map.

Device i of the axis holds tokens i T to (i + 1) T - 1. Documents begin and end anywhere: a true
`reset` is where one begins. Initial states are the same on all devices of the axis, and so are the
last states that are returned: a segment sharded over many devices chains with the next like any
other.

Linear recurrences exchange affine summaries of their shards: what a shard does to a state that
enters it is S' = A S + B, and A and B do not grow with T. Memories that are not linear in their
state take turns.
"""

from pallas_kernels.context_parallel.affine import delta_rule, linear_attention, selective_scan
from pallas_kernels.context_parallel.scans import diagonal_scan, mlstm, taylor_attention
from pallas_kernels.context_parallel.tokens import (
    document_numbers,
    exchange_tail,
    last_tokens,
    of_last,
    positions,
)
from pallas_kernels.context_parallel.turns import in_turn

__all__ = [
    "delta_rule",
    "diagonal_scan",
    "document_numbers",
    "exchange_tail",
    "in_turn",
    "last_tokens",
    "linear_attention",
    "mlstm",
    "of_last",
    "positions",
    "selective_scan",
    "taylor_attention",
]
