"""Transformer-XL's cache in place of every attention mixer."""

import dataclasses
from typing import Any, ClassVar

from memjax.memory.base import MixerMemory
from memjax.mixers.transformer_xl import TransformerXL, TransformerXLFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXLMemory(TransformerXLFields, MixerMemory):
    """As `memjax.mixers.transformer_xl`, with the heads of the attention that it replaces."""

    kind: ClassVar[str] = "transformer_xl"
    honours: ClassVar[tuple[str, ...]] = ("heads", "head_size")

    def mixer(self, attention: Any) -> TransformerXL:
        return self.replacing(TransformerXL, attention)
