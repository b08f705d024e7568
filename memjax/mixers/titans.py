"""What the Titans layers with attention share: their configs, and a window beside a memory."""

import dataclasses
from abc import abstractmethod
from typing import Any, Literal, NamedTuple

from flax import nnx

from memjax.config import check_at_least
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.deep_memory import DeepMemory, DeepMemoryState, norms
from memjax.mixers.persistent import WindowAttention, WindowState
from memjax.positions import PositionField, Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansConfig(MixerConfig):
    """memory: what learns at test time; attention has as many heads.

    persistent: learned tokens that every query sees.
    """

    memory: DeepMemory = DeepMemory()
    persistent: int = 4
    position: PositionField = Rotary()
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 0, "persistent")

    def check_width(self, d_model: int) -> None:
        self.memory.check_width(d_model, self.position)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig(TitansConfig):
    """As `TitansConfig`; window: tokens that attention reaches, the query's own counted."""

    window: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "window")


class TitansState(NamedTuple):
    """Of the memory and of the window."""

    memory: DeepMemoryState
    window: WindowState


class WindowedMemory(SequenceMixer):
    """A deep memory, `self.memory`, and attention over a window with persistent tokens."""

    splits_tokens = True
    config: WindowConfig
    memory: Any

    def _make_attention(self, d_model: int, *, rngs: nnx.Rngs) -> None:
        config = self.config
        self.attention = WindowAttention(
            d_model,
            config.memory.heads,
            config.window,
            config.persistent,
            config.position,
            rngs=rngs,
        )

    def init_state(self, batch: int) -> TitansState:
        return TitansState(self.memory.init_state(batch), self.attention.init_state(batch))

    @abstractmethod
    def recurrence_flops(self) -> float:
        """Operations a token of the memory's recurrence."""

    def memory_report(self, segment: int = 1024, state: TitansState | None = None) -> MemoryReport:
        recurrence = self.recurrence_flops()
        flops = projection_flops(self) + self.attention.attention_flops(segment) + recurrence
        told = {} if state is None else norms(state.memory.memory)
        return MemoryReport(state_bytes(self), flops, recurrence, told)
