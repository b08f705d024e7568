"""Where a memory module attaches to a model, and what it must be there.

    MixerMemory     takes the place of the attention mixers: carried context
    LayerMemory     reads and writes beside the mixer of a block, or in place of its MLP
    SegmentMemory   adds tokens to every segment and is what is left of them afterwards; it may have
                    a part in every layer too

A config says where it attaches by its base class; `model` below is a `memjax.architecture.Model`.
Each module obeys the laws of a mixer (explicit state, any split equals the whole, nothing crosses a
reset) and so do models that have one.
"""

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

import jax
from flax import nnx

from memjax.config import FieldError, check
from memjax.mixers.base import MemoryReport, MixerConfig, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Base of the configs of memory modules; `kind` is the key in `MEMORIES`."""

    kind: ClassVar[str]

    def check_model(self, model: Any) -> None:
        """Raise a FieldError, with the reason, if the module makes no sense for `model`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerMemory(MemoryConfig):
    """Takes the place of attention mixers of the pattern, with their heads and positions.

    layers: names of the mixers in the pattern or the tail that it replaces; None for every
        attention mixer. To have it in one layer, give that layer's attention a name of its own.
    """

    layers: tuple[str, ...] | None = None

    honours: ClassVar[tuple[str, ...] | None] = None
    """Fields of the attention that the replacement takes over; None for all. The others must be
    left at their defaults."""

    @abstractmethod
    def mixer(self, attention: Any) -> MixerConfig:
        """The config of the mixer that replaces `attention`, a kind of the registry of mixers."""

    def replaces(self, name: str, config: MixerConfig) -> bool:
        """Whether the mixer called `name` makes place."""
        return config.kind == "attention" and (self.layers is None or name in self.layers)

    def check_model(self, model: Any) -> None:
        mixers = {name: model.plain_mixer(name) for name in model.layers_in_order}
        attention = [name for name, config in mixers.items() if config.kind == "attention"]
        for name in self.layers or ():
            rule = f"must name attention mixers of the pattern; choose from {', '.join(attention)}"
            check(self, "layers", bool(attention) and name in attention, rule)
        if not attention:
            rule = "replaces attention, of which the pattern has none; use a pattern with attention"
            raise FieldError("memory", self.kind, rule)
        for name, config in mixers.items():
            if self.replaces(name, config):
                self._check_attention(name, config)

    def _check_attention(self, name: str, attention: Any) -> None:
        default = type(attention)()
        for field in dataclasses.fields(attention):
            honoured = self.honours is None or field.name in self.honours
            value = getattr(attention, field.name)
            if not honoured and value != getattr(default, field.name):
                rule = f"has no place in memory {self.kind}; leave it out"
                raise FieldError(field.name, value, rule, f"mixers.{name}.")

    def replacing(self, mixer: Any, attention: Any) -> Any:
        """A config of class `mixer`: what is honoured of `attention`, the rest from here."""
        names = {field.name for field in dataclasses.fields(mixer)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        return mixer(**own, **{name: getattr(attention, name) for name in self.honours or ()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMemory(MemoryConfig):
    """at: places in the pattern, from 0, whose blocks have the module; None for all of them."""

    at: tuple[int, ...] | None = None

    replaces_mlp: ClassVar[bool] = False

    def has(self, place: int) -> bool:
        """Whether the block at `place` of the pattern (or of the tail) has the module."""
        return self.at is None or place in self.at

    def check_model(self, model: Any) -> None:
        places = len(model.pattern)
        inside = self.at is None or (len(self.at) > 0 and all(0 <= i < places for i in self.at))
        check(self, "at", inside, f"must name places of the pattern, 0 to {places - 1}")
        if self.replaces_mlp:
            rule = f"{self.kind} replaces the MLP of a block, which mlp=None leaves out"
            check(model, "mlp", model.mlp is not None, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentMemory(MemoryConfig):
    """segment: tokens read between two writes, counted from the start of the document."""

    segment: int = 128

    @property
    @abstractmethod
    def added(self) -> int:
        """Tokens that the layers read with those of a segment."""

    def check_model(self, model: Any) -> None:
        check(self, "segment", self.segment >= 1, "must be at least 1")
        rule = f"must be 0 with memory {self.kind}, whose segments are read again"
        check(model, "dropout", model.dropout == 0, rule)


class LayerModule(nnx.Module):
    """What a LayerMemory's config builds for one block."""

    @abstractmethod
    def __init__(self, config: Any, d_model: int, *, rngs: nnx.Rngs):
        """Parameters of one block; those that all share are `shared`'s."""

    @staticmethod
    def shared(config: Any, model: Any, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """Parameters that all blocks share, such as a large table; None if there are none."""
        return None

    @abstractmethod
    def init_state(self, batch: int) -> State:
        """The state before the first token of a document, lanes on axis 0."""

    @abstractmethod
    def __call__(
        self, state: State, x_BTD: jax.Array, reset_BT: jax.Array, shared: nnx.Module | None
    ) -> tuple[State, jax.Array]:
        """The state after the segment, and what is added to the residual stream."""

    @abstractmethod
    def memory_report(self, segment: int = 1024, state: State | None = None) -> MemoryReport:
        """Cost for segments of `segment` tokens, and telemetry of `state`, as of a mixer."""


class LayerPart(nnx.Module):
    """What a SegmentMemory's config builds for one block: read before it, written after it.

    Its state is kept from segment to segment, when the states of the mixers begin anew.
    """

    @abstractmethod
    def init_state(self, batch: int) -> State:
        """The state before the first segment of a document, lanes on axis 0."""

    @abstractmethod
    def read(self, state: State, x_BLD: jax.Array) -> jax.Array:
        """What is added to the input of the block."""

    @abstractmethod
    def write(self, state: State, x_BLD: jax.Array) -> State:
        """The state after the segment, from the output of the block."""

    @abstractmethod
    def memory_report(self, state: State | None = None) -> MemoryReport:
        """As of a mixer; operations a token that the block reads, those of the memory counted."""


class SegmentModule(nnx.Module):
    """What a SegmentMemory's config builds for the model.

    carries_layers: whether the layers keep their states from segment to segment, instead of
        starting each from their own initial state.
    """

    carries_layers: ClassVar[bool] = False

    @staticmethod
    def layer_part(config: Any, d_model: int, *, rngs: nnx.Rngs) -> LayerPart | None:
        """The part of the module in one block; None for none."""
        return None

    @abstractmethod
    def initial(self) -> Any:
        """The memory at the start of a document, without lanes."""

    @abstractmethod
    def wrap(self, memory: Any, x_BCD: jax.Array) -> jax.Array:
        """The tokens that the layers read: those of the segment among others, `[B, L, D]`."""

    @abstractmethod
    def unwrap(self, memory: Any, h_BLD: jax.Array) -> tuple[Any, jax.Array]:
        """The memory after the segment, and the outputs of its tokens, `[B, C, D]`."""
