"""Infini-attention in place of every attention mixer."""

import dataclasses
from typing import Any, ClassVar

from memjax.memory.base import MixerMemory
from memjax.mixers.infini import Infini, InfiniFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniMemory(InfiniFields, MixerMemory):
    """As `memjax.mixers.infini`, with the heads and positions of the attention that it replaces."""

    kind: ClassVar[str] = "infini"
    honours: ClassVar[tuple[str, ...]] = ("heads", "head_size", "position")

    def mixer(self, attention: Any) -> Infini:
        return self.replacing(Infini, attention)
