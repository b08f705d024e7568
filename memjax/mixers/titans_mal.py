"""Titans MAL: a deep memory, and a sliding window over what it answers."""

import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.layers import Linear, RMSNorm
from memjax.mixers.titans import TitansState, WindowConfig, WindowedMemory
from memjax.mixers.titans_lmm import TitansLMM, TitansLMMMixer
from memjax.ops import read_in_turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAL(WindowConfig):
    """As `WindowConfig`."""

    kind: ClassVar[str] = "titans_mal"


class TitansMALMixer(WindowedMemory):
    """y = W_o attention(RMSNorm(memory(x)))

    memory: a whole `TitansLMMMixer`; attention: `WindowAttention` with persistent tokens.
    State: both of theirs.
    Source: arXiv:2501.00663, Eqs. 29-31 (in the manner of H3).
    Differs from paper: the memory does not read the persistent tokens (as in `titans_mag`); the
    RMSNorm between the two, as before every layer.
    """

    def __init__(self, config: TitansMAL, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        memory = TitansLMM(memory=config.memory, impl=config.impl)
        self.memory = TitansLMMMixer(memory, d_model, rngs=rngs)
        self.norm = RMSNorm(d_model)
        self._make_attention(d_model, rngs=rngs)
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def __call__(
        self,
        state: TitansState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[TitansState, Float[Array, "B T D"]]:
        memory, far_BTD = self.memory(state.memory, x_BTD, reset_BT)
        in_BTD = self.norm(far_BTD)
        window, near_BTD = read_in_turns(self.attention, state.window, in_BTD, reset_BT)
        return TitansState(memory, window), self.out(near_BTD)

    def recurrence_flops(self) -> float:
        return self.memory.memory.recurrence_flops()
