"""Titans MAL: a deep memory, and a sliding window over what it answers."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check_at_least
from memjax.layers import Linear, RMSNorm
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.deep_memory import (
    DeepMemory,
    DeepMemoryState,
    norms,
)
from memjax.mixers.persistent import WindowAttention, WindowState
from memjax.mixers.titans_lmm import TitansLMM, TitansLMMMixer
from memjax.ops import read_in_turns
from memjax.positions import PositionField, Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAL(MixerConfig):
    """memory: what learns at test time; attention has as many heads.

    window: tokens that attention reaches, the query's own counted. persistent: learned tokens that
    every query sees.
    """

    kind: ClassVar[str] = "titans_mal"
    memory: DeepMemory = DeepMemory()
    window: int = 128
    persistent: int = 4
    position: PositionField = Rotary()
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "window")
        check_at_least(self, 0, "persistent")

    def check_width(self, d_model: int) -> None:
        self.memory.check_width(d_model, self.position)


class TitansMALState(NamedTuple):
    """Of the memory and of the window."""

    memory: DeepMemoryState
    window: WindowState


class TitansMALMixer(SequenceMixer):
    """y = W_o attention(RMSNorm(memory(x)))

    memory: a whole `TitansLMMMixer`; attention: `WindowAttention` with persistent tokens.
    State: both of theirs.
    Source: arXiv:2501.00663, Eqs. 29-31 (in the manner of H3).
    Differs from paper: the memory does not read the persistent tokens (as in `titans_mag`); the
    RMSNorm between the two, as before every layer.
    """

    splits_tokens = True

    def __init__(self, config: TitansMAL, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        memory = TitansLMM(memory=config.memory, impl=config.impl)
        self.memory = TitansLMMMixer(memory, d_model, rngs=rngs)
        self.norm = RMSNorm(d_model)
        self.attention = WindowAttention(
            d_model,
            config.memory.heads,
            config.window,
            config.persistent,
            config.position,
            rngs=rngs,
        )
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> TitansMALState:
        return TitansMALState(self.memory.init_state(batch), self.attention.init_state(batch))

    def __call__(
        self,
        state: TitansMALState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[TitansMALState, Float[Array, "B T D"]]:
        memory, far_BTD = self.memory(state.memory, x_BTD, reset_BT)
        in_BTD = self.norm(far_BTD)
        window, near_BTD = read_in_turns(self.attention, state.window, in_BTD, reset_BT)
        return TitansMALState(memory, window), self.out(near_BTD)

    def memory_report(
        self, segment: int = 1024, state: TitansMALState | None = None
    ) -> MemoryReport:
        recurrence = self.memory.memory.recurrence_flops()
        flops = projection_flops(self) + self.attention.attention_flops(segment) + recurrence
        told = {} if state is None else norms(state.memory.memory)
        return MemoryReport(state_bytes(self), flops, recurrence, told)
