"""The memories of a Compressive Transformer in place of every attention mixer."""

import dataclasses
from typing import Any, ClassVar

from memjax.memory.base import MixerMemory
from memjax.mixers.compressive import Compressive, CompressiveFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressiveMemory(CompressiveFields, MixerMemory):
    """As `memjax.mixers.compressive`, with the heads of the attention that it replaces."""

    kind: ClassVar[str] = "compressive"
    honours: ClassVar[tuple[str, ...]] = ("heads", "head_size")

    def mixer(self, attention: Any) -> Compressive:
        return self.replacing(Compressive, attention)
