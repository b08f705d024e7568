"""The gated short convolution of Based: precise local mixing of a few tokens."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check_at_least
from memjax.layers import Linear, LinearPair, ShortConv
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConv(MixerConfig):
    """expand: inner channels over d_model. conv: width of the convolution."""

    kind: ClassVar[str] = "base_conv"
    expand: int = 2
    conv: int = 3

    def __post_init__(self):
        check_at_least(self, 1, "expand")
        check_at_least(self, 2, "conv")


class BaseConvState(NamedTuple):
    """The last conv - 1 inputs of the convolution in this document."""

    tail_BMF: Float[Array, "B M F"]


class BaseConvMixer(SequenceMixer):
    """y = W_o (silu(conv(u)) * w) with (u, w) = W_i x; all three with biases.

    State: the tail of the convolution, float32 [B, conv - 1, expand d_model].
    Source: arXiv:2402.18668, Sec. 4, and its released code for what the text leaves open.
    """

    splits_tokens = True

    def __init__(self, config: BaseConv, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.size = config.expand * d_model
        self.into = LinearPair(d_model, self.size, rngs=rngs, bias=True)
        self.conv = ShortConv(self.size, config.conv, rngs=rngs, bias=True)
        self.out = Linear(self.size, d_model, rngs=rngs, axes=("embed", "hidden"), bias=True)

    def init_state(self, batch: int) -> BaseConvState:
        return BaseConvState(jnp.zeros((batch, self.config.conv - 1, self.size), jnp.float32))

    def __call__(
        self,
        state: BaseConvState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[BaseConvState, Float[Array, "B T D"]]:
        u_BTF, gate_BTF = self.into(x_BTD)
        tail_BMF, u_BTF = self.conv(state.tail_BMF, u_BTF, reset_BT)
        return BaseConvState(tail_BMF), self.out(jax.nn.silu(u_BTF) * gate_BTF)

    def memory_report(
        self, segment: int = 1024, state: BaseConvState | None = None
    ) -> MemoryReport:
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.tail_BMF)}
        return MemoryReport(state_bytes(self), projection_flops(self), 0.0, telemetry)
