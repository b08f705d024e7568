"""Titans MAG: a deep memory beside a sliding window, each gating the other."""

import dataclasses
from typing import ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.layers import Linear, RMSNorm
from memjax.mixers.deep_memory import DeepMemoryBranch
from memjax.mixers.titans import TitansState, WindowConfig, WindowedMemory
from memjax.ops import read_in_turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAG(WindowConfig):
    """As `WindowConfig`."""

    kind: ClassVar[str] = "titans_mag"


class TitansMAGMixer(WindowedMemory):
    """y_t = W_o (RMSNorm(attention(x)_t) * silu(RMSNorm(memory(x)_t)))

    attention: `WindowAttention` with persistent tokens; memory: `DeepMemoryBranch`.
    State: both of theirs.
    Source: arXiv:2501.00663, Eqs. 26-28. There the gate is "normalise both with learned vectors,
    then a non-linearity"; here the non-linearity is SiLU and sits on the memory.
    Differs from paper: the memory does not read the persistent tokens. As printed it would once, at
    the start of the stream; its learned initial weights stand in for what it would have learned.
    """

    def __init__(self, config: TitansMAG, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.memory = DeepMemoryBranch(config.memory, d_model, rngs=rngs)
        self._make_attention(d_model, rngs=rngs)
        self.attention_norm, self.memory_norm = (RMSNorm(d_model, axes=("heads",)) for _ in "am")
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def __call__(
        self,
        state: TitansState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[TitansState, Float[Array, "B T D"]]:
        memory, o_BTHV = self.memory(state.memory, x_BTD, reset_BT, impl=self.config.impl)
        window, near_BTD = read_in_turns(self.attention, state.window, x_BTD, reset_BT)
        far_BTD = self.memory_norm(o_BTHV.reshape(x_BTD.shape))
        y_BTD = self.out(self.attention_norm(near_BTD) * jax.nn.silu(far_BTD))
        return TitansState(memory, window), y_BTD

    def recurrence_flops(self) -> float:
        return self.memory.recurrence_flops()
