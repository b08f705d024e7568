"""The memory of a Memorizing Transformer in place of one attention mixer."""

import dataclasses
from typing import Any, ClassVar

from memjax.config import check
from memjax.memory.base import MixerMemory
from memjax.mixers.memorizing import Memorizing, MemorizingFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorizingMemory(MemorizingFields, MixerMemory):
    """As `memjax.mixers.memorizing`, with the heads and positions of the attention it replaces.

    The paper has it in one layer, the ninth of twelve: give the attention of that layer a name of
    its own in the pattern, and name it in `layers`.
    """

    kind: ClassVar[str] = "memorizing"
    honours: ClassVar[tuple[str, ...]] = ("heads", "head_size", "position")

    def mixer(self, attention: Any) -> Memorizing:
        return self.replacing(Memorizing, attention)

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        names = model.layers_in_order
        count = sum(self.replaces(name, model.plain_mixer(name)) for name in names)
        rule = f"would give all {count} attention layers a memory; name the one that gets it"
        check(self, "layers", self.layers is not None or count == 1, rule)
