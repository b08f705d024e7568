"""Recurrent memory tokens (RMT): a few vectors that every segment reads and rewrites."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from memjax.config import check_at_least
from memjax.layers import normal
from memjax.memory.base import SegmentMemory, SegmentModule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentTokens(SegmentMemory):
    """slots: tokens of memory. segment: tokens of text between two writes."""

    kind: ClassVar[str] = "recurrent_tokens"
    slots: int = 16

    def __post_init__(self):
        check_at_least(self, 1, "slots", "segment")

    @property
    def added(self) -> int:
        return 2 * self.slots


class RecurrentTokensModule(SegmentModule):
    """The layers read [memory, segment, memory]; the outputs of the last are the next memory.

    [_, H, memory'] = norm(layers([memory, X, memory]));   H are the outputs of the segment

    Causal layers make the first copy what the segment can read and the second what it writes. The
    gradient flows through all segments that a training step reads. State: `slots` vectors of the
    model's width, learned at the start of a document, and the tokens of the current segment.
    Source: arXiv:2207.06881, Sec. 3.2.
    Differs from paper: layers are causal over the whole of [memory, X, memory], as in the authors'
    later code; there, memory attends to itself in both directions.
    """

    def __init__(self, config: RecurrentTokens, d_model: int, *, rngs: nnx.Rngs):
        self.slots = config.slots
        self.start = nnx.Param(normal(rngs, (config.slots, d_model)), axes=("slots", "embed"))

    def initial(self) -> Float[Array, "M D"]:
        return self.start[...]

    def wrap(self, memory: jax.Array, x_BCD: jax.Array) -> jax.Array:
        memory_BMD = memory.astype(x_BCD.dtype)
        return jnp.concatenate([memory_BMD, x_BCD, memory_BMD], 1)

    def unwrap(self, memory: jax.Array, h_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return h_BLD[:, -self.slots :].astype(memory.dtype), h_BLD[:, self.slots : -self.slots]
