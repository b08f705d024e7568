"""Where a memory module attaches to a model, and what it must be there.

    MixerMemory     takes the place of the attention mixers: carried context
    LayerMemory     reads and writes beside the mixer of a block, or in place of its MLP
    SegmentMemory   adds tokens to every segment and is what is left of them afterwards

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
from memjax.mixers.base import MixerConfig, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Base of the configs of memory modules; `kind` is the key in `MEMORIES`."""

    kind: ClassVar[str]

    def check_model(self, model: Any) -> None:
        """Raise a FieldError, with the reason, if the module makes no sense for `model`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerMemory(MemoryConfig):
    """Takes the place of every attention mixer of the pattern, with its heads and positions."""

    @abstractmethod
    def mixer(self, attention: Any) -> MixerConfig:
        """The config of the mixer that replaces `attention`, a kind of the registry of mixers."""

    def check_model(self, model: Any) -> None:
        kinds = [model.plain_mixer(name).kind for name in model.layers_in_order]
        if "attention" not in kinds:
            rule = "replaces attention, of which the pattern has none; use a pattern with attention"
            raise FieldError("memory", self.kind, rule)


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


class SegmentModule(nnx.Module):
    """What a SegmentMemory's config builds for the model."""

    @abstractmethod
    def initial(self) -> Any:
        """The memory at the start of a document, without lanes."""

    @abstractmethod
    def wrap(self, memory: Any, x_BCD: jax.Array) -> jax.Array:
        """The tokens that the layers read: those of the segment among others, `[B, L, D]`."""

    @abstractmethod
    def unwrap(self, memory: Any, h_BLD: jax.Array) -> tuple[Any, jax.Array]:
        """The memory after the segment, and the outputs of its tokens, `[B, C, D]`."""
