"""Landmark attention in place of attention, and the landmark tokens that end its blocks."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.config import check
from memjax.layers import normal
from memjax.memory.base import MixerMemory, SegmentMemory, SegmentModule
from memjax.mixers.landmark import Landmark, LandmarkFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkMemory(LandmarkFields, MixerMemory, SegmentMemory):
    """As `memjax.mixers.landmark`, with the heads and positions of the attention it replaces.

    segment: tokens read at a time, a multiple of block. Speed only.
    """

    kind: ClassVar[str] = "landmark"
    honours: ClassVar[tuple[str, ...]] = ("heads", "head_size", "position")
    segment: int = 100

    def __post_init__(self):
        super().__post_init__()
        near = max(1, round(self.segment / self.block)) * self.block
        whole = self.segment >= 1 and self.segment % self.block == 0
        check(self, "segment", whole, f"must be a multiple of block={self.block}; try {near}")

    @property
    def added(self) -> int:
        return self.segment // self.block

    def mixer(self, attention: Any) -> Landmark:
        return self.replacing(Landmark, attention)

    def check_model(self, model: Any) -> None:
        MixerMemory.check_model(self, model)
        SegmentMemory.check_model(self, model)


class LandmarkModule(SegmentModule):
    """The layers read [block of text, landmark] again and again, and keep their states.

    What the layers make of a landmark predicts the token after it, as in the paper, whose targets
    count for no loss where they are landmarks: the last token of a block predicts nothing else.
    Parameter: the embedding of the landmark. State: that of the layers, and the segment's tokens.
    Source: arXiv:2305.16300, Sec. 3.1.
    """

    carries_layers: ClassVar[bool] = True

    def __init__(self, config: LandmarkMemory, d_model: int, *, rngs: nnx.Rngs):
        self.block = config.block
        self.landmark = nnx.Param(normal(rngs, (1, d_model)), axes=("slots", "embed"))

    def initial(self) -> tuple[()]:
        return ()

    def wrap(self, memory: tuple[()], x_BCD: jax.Array) -> jax.Array:
        batch, _, width = x_BCD.shape
        x_BNCD = x_BCD.reshape(batch, -1, self.block, width)
        mark_BN1D = jnp.broadcast_to(
            self.landmark[...].astype(x_BCD.dtype), (*x_BNCD.shape[:2], 1, width)
        )
        return jnp.concatenate([x_BNCD, mark_BN1D], 2).reshape(batch, -1, width)

    def unwrap(self, memory: tuple[()], h_BLD: jax.Array) -> tuple[tuple[()], jax.Array]:
        batch, _, width = h_BLD.shape
        h_BNCD = h_BLD.reshape(batch, -1, self.block + 1, width)
        y_BNCD = jnp.concatenate([h_BNCD[:, :, : self.block - 1], h_BNCD[:, :, self.block :]], 2)
        return (), y_BNCD.reshape(batch, -1, width)
