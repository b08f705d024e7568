"""Titans LMM: the deep neural memory as a layer of its own."""

import dataclasses
from typing import ClassVar, Literal

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansLMM(MixerConfig):
    """memory: what learns at test time."""

    kind: ClassVar[str] = "titans_lmm"
    memory: DeepMemory = DeepMemory()
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def check_width(self, d_model: int) -> None:
        self.memory.check_width(d_model)


class TitansLMMMixer(SequenceMixer):
    """y_t = W_o (RMSNorm(o_t) * silu(W_g x_t)), o_t the answer of `DeepMemoryBranch` to token t.

    State: that of the branch.
    Source: arXiv:2501.00663, Sec. 3 and 4.4 (normalisation and a gate before the output
    projection; neither is spelt out there).
    """

    splits_tokens = True

    def __init__(self, config: TitansLMM, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.memory = DeepMemoryBranch(config.memory, d_model, rngs=rngs)
        self.gate = Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed"))
        self.norm = RMSNorm(d_model // config.memory.heads, axes=("value",))
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> DeepMemoryState:
        return self.memory.init_state(batch)

    def __call__(
        self,
        state: DeepMemoryState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[DeepMemoryState, Float[Array, "B T D"]]:
        state, o_BTHV = self.memory(state, x_BTD, reset_BT, impl=self.config.impl)
        gated_BTD = self.norm(o_BTHV).reshape(x_BTD.shape) * jax.nn.silu(self.gate(x_BTD))
        return state, self.out(gated_BTD)

    def memory_report(
        self, segment: int = 1024, state: DeepMemoryState | None = None
    ) -> MemoryReport:
        recurrence = self.memory.recurrence_flops()
        flops = projection_flops(self) + recurrence
        told = {} if state is None else norms(state.memory)
        return MemoryReport(state_bytes(self), flops, recurrence, told)
