"""Persistent memory vectors (all-attention): learned keys and values in every softmax."""

import dataclasses
from typing import Any, ClassVar

from memjax.config import check_at_least
from memjax.memory.base import MixerMemory
from memjax.mixers import AllAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Persistent(MixerMemory):
    """slots: learned keys and values of each head, beside those of the context.

    An attention mixer becomes an `AllAttention`, which has the equations. The paper
    (arXiv:1907.01470) removes the MLPs too: `mlp=None` in the model does that.
    """

    kind: ClassVar[str] = "persistent"
    honours: ClassVar[tuple[str, ...]] = ("heads", "head_size", "window", "context", "position")
    slots: int = 256

    def __post_init__(self):
        check_at_least(self, 1, "slots")

    def mixer(self, attention: Any) -> AllAttention:
        return self.replacing(AllAttention, attention)
