"""The config of a model, which reads as its architecture."""

import dataclasses
from typing import Annotated, Literal

from memjax.config import ConfigError, FieldError, OneOf, check, check_at_least
from memjax.layers import MLPS, GatedMLP, SwiGLU
from memjax.memory import MEMORIES
from memjax.memory.base import MemoryConfig, MixerMemory
from memjax.mixers import MIXERS
from memjax.mixers.base import MixerConfig
from memjax.positions import PositionField

MixerField = Annotated[MixerConfig, OneOf(lambda: {k: c for k, (c, _) in MIXERS.items()})]
MemoryField = Annotated[MemoryConfig, OneOf(lambda: {k: c for k, (c, _) in MEMORIES.items()})]
MLPField = Annotated[GatedMLP, OneOf(lambda: MLPS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An architecture: layers = len(pattern) * repeat + len(tail).

    pattern: names of mixers; each is a key of `mixers` or a kind of the registry (its defaults).
    tail: names of the mixers of the layers behind the last repeat.
    memory: a memory module (`memjax.memory`); it says by itself where it attaches.
    position: replaces the position of every mixer that has one.
    mlp: None for blocks that are a mixer alone.
    tied: whether the output matrix is the embedding.
    logit_cap: c in c tanh(logits / c); None for logits as they are.
    dtype: type of activations and products; parameters, norms and states are float32.
    layers: scan the repeats, or unroll them. Speed only.
    remat: what the backward pass recomputes: nothing, all but products ("dots"), all but the inputs
        of the repeats of the pattern ("full"), or that with the inputs kept in the memory of the
        host ("offload"; on a CPU there is no other memory, so there it is "full").
    """

    d_model: int = 256
    pattern: tuple[str, ...] = ("gated_deltanet",)
    repeat: int = 4
    tail: tuple[str, ...] = ()
    mixers: dict[str, MixerField] = dataclasses.field(default_factory=dict)
    memory: MemoryField | None = None
    position: PositionField | None = None
    mlp: MLPField | None = SwiGLU()
    tied: bool = True
    logit_cap: float | None = None
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full", "offload"] = "none"

    def __post_init__(self):
        check_at_least(self, 1, "d_model", "repeat")
        check(self, "dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        check(self, "pattern", len(self.pattern) > 0, "must name at least one mixer")
        cap = self.logit_cap
        check(self, "logit_cap", cap is None or cap > 0, "must be greater than 0, or none")
        known = [*self.mixers, *(k for k in MIXERS if k not in self.mixers)]
        for field in ("pattern", "tail"):
            for i, name in enumerate(getattr(self, field)):
                if name not in known:
                    rule = f"names no mixer; choose from {', '.join(known)}"
                    raise FieldError(f"{field}[{i}]", name, rule)
        used = (*self.pattern, *self.tail)
        for name in self.mixers:
            if name not in used:
                raise ConfigError(f"mixers.{name} is not in pattern={used}; remove it")
        for name in dict.fromkeys(used):
            try:
                self.plain_mixer(name).check_width(self.d_model)
            except FieldError as error:
                raise error.under(f"mixers.{name}") from None
        if self.memory is not None:
            self.memory.check_model(self)

    @property
    def layers_in_order(self) -> tuple[str, ...]:
        """The name of the mixer of every layer."""
        return self.pattern * self.repeat + self.tail

    def plain_mixer(self, name: str) -> MixerConfig:
        """The config of a mixer of the pattern, with the model's position worked in."""
        config = self.mixers[name] if name in self.mixers else MIXERS[name][0]()
        has_position = any(f.name == "position" for f in dataclasses.fields(config))
        if self.position is not None and has_position:
            return dataclasses.replace(config, position=self.position)  # type: ignore[call-arg]
        return config

    def mixer(self, name: str) -> MixerConfig:
        """As `plain_mixer`, with what a memory module puts in its place."""
        config = self.plain_mixer(name)
        if isinstance(self.memory, MixerMemory) and self.memory.replaces(name, config):
            return self.memory.mixer(config)
        return config
