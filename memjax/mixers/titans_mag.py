"""Titans MAG: a deep memory beside a sliding window, each gating the other."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
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
    DeepMemoryBranch,
    DeepMemoryState,
    norms,
)
from memjax.mixers.persistent import WindowAttention, WindowState
from memjax.ops import read_in_turns
from memjax.positions import PositionField, Rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAG(MixerConfig):
    """memory: what learns at test time; attention has as many heads.

    window: tokens that attention reaches, the query's own counted. persistent: learned tokens that
    every query sees.
    """

    kind: ClassVar[str] = "titans_mag"
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


class TitansMAGState(NamedTuple):
    """Of the memory and of the window."""

    memory: DeepMemoryState
    window: WindowState


class TitansMAGMixer(SequenceMixer):
    """y_t = W_o (RMSNorm(attention(x)_t) * silu(RMSNorm(memory(x)_t)))

    attention: `WindowAttention` with persistent tokens; memory: `DeepMemoryBranch`.
    State: both of theirs.
    Source: arXiv:2501.00663, Eqs. 26-28. There the gate is "normalise both with learned vectors,
    then a non-linearity"; here the non-linearity is SiLU and sits on the memory.
    Differs from paper: the memory does not read the persistent tokens. As printed it would once, at
    the start of the stream; its learned initial weights stand in for what it would have learned.
    """

    splits_tokens = True

    def __init__(self, config: TitansMAG, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.memory = DeepMemoryBranch(config.memory, d_model, rngs=rngs)
        self.attention = WindowAttention(
            d_model,
            config.memory.heads,
            config.window,
            config.persistent,
            config.position,
            rngs=rngs,
        )
        self.attention_norm, self.memory_norm = (RMSNorm(d_model, axes=("heads",)) for _ in "am")
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> TitansMAGState:
        return TitansMAGState(self.memory.init_state(batch), self.attention.init_state(batch))

    def __call__(
        self,
        state: TitansMAGState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[TitansMAGState, Float[Array, "B T D"]]:
        memory, o_BTHV = self.memory(state.memory, x_BTD, reset_BT, impl=self.config.impl)
        window, near_BTD = read_in_turns(self.attention, state.window, x_BTD, reset_BT)
        far_BTD = self.memory_norm(o_BTHV.reshape(x_BTD.shape))
        y_BTD = self.out(self.attention_norm(near_BTD) * jax.nn.silu(far_BTD))
        return TitansMAGState(memory, window), y_BTD

    def memory_report(
        self, segment: int = 1024, state: TitansMAGState | None = None
    ) -> MemoryReport:
        recurrence = self.memory.recurrence_flops()
        flops = projection_flops(self) + self.attention.attention_flops(segment) + recurrence
        told = {} if state is None else norms(state.memory.memory)
        return MemoryReport(state_bytes(self), flops, recurrence, told)
