"""The four choices that make a test-time memory, and the arrays that it consists of."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.biases import Bias
from pallas_kernels.neural_memory.learners import Learner
from pallas_kernels.neural_memory.retentions import Retention
from pallas_kernels.neural_memory.structures import Structure

Tokens = dict[str, jax.Array]
"""Streams `[B, T, H]` (`q`, `k` and `v`: and channels), all of one floating type.

Always q, k, v and rate; log_keep, log_momentum and threshold where they were given.
"""


class Rule(NamedTuple):
    """What kind of memory. Hashable."""

    structure: Structure
    bias: Bias
    retention: Retention
    learner: Learner


class Memory(NamedTuple):
    """Accumulators and momenta, one `[B, H, in, out]` a weight matrix; () without momentum."""

    weights: tuple[jax.Array, ...]
    momenta: tuple[jax.Array, ...]


class NeuralMemoryState(NamedTuple):
    """A memory as the current block found it, and the tokens of that block so far.

    weights, momenta: tuples of `[B, H, in, out]`, float32.
    tokens: `[B, update_every - 1, H, ...]` of every stream but q; of lane b the last `count_B[b]`
        are the block's, the others are 0.  count_B: int32, in 0 .. update_every - 1.
    """

    weights: tuple[jax.Array, ...]
    momenta: tuple[jax.Array, ...]
    tokens: dict[str, jax.Array]
    count_B: jax.Array


def start(rule: Rule, weights: tuple[jax.Array, ...]) -> Memory:
    """The memory at the start of a document, without lanes."""
    return Memory(weights, tuple(map(jnp.zeros_like, weights)) if rule.learner.momentum else ())


def lanes(tree: Any, batch: int) -> Any:
    """Every array of `tree` with a leading axis of `batch` lanes."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), tree)
