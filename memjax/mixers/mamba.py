"""Mamba: a state space whose step, input and output every token chooses."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check_at_least
from memjax.layers import Linear, LinearPair, ShortConv, dot_transposed
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.ops import selective_scan

SHORTEST_STEP, LONGEST_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4
CHANNELS_PER_RANK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba(MixerConfig):
    """states: leaky sums a channel. expand: channels = expand * d_model.

    rank: size of the bottleneck in front of the steps; None is d_model / 16, rounded up.
    conv: width of the short convolution. chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "mamba"
    states: int = 16
    expand: int = 2
    rank: int | None = None
    conv: int = 4
    chunk: int = 32
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "states", "expand", "rank", "conv", "chunk")


class MambaState(NamedTuple):
    """N leaky sums of each of E channels, and the last inputs of the short convolution."""

    memory_BEN: Float[Array, "B E N"]
    tail_BME: Float[Array, "B M E"]


class MambaMixer(SequenceMixer):
    """The selective state space of every channel.

    (u, z) = W_in x;  u = silu(conv(u) + b)
    (r, B, C) = W_s u;  dt = softplus(W_dt r + b_dt)
    h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_tT;   y_t = W_out ((h_t C_t + D u_t) silu(z_t))
    A = -exp(log_rate)

    State: h, float32 [B, E, N], and the tail of the convolution. Rates start at 1..N, steps log
    uniform in [0.001, 0.1], D at 1. W_dt is uniform in +- rank^(-1/2).
    Source: arXiv:2312.00752, Algorithm 2, Secs. 3.4 and 3.6. Paper: Delta = dt.
    Differs from paper: W_out does not start smaller in deeper models.
    """

    splits_tokens = True

    def __init__(self, config: Mamba, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.channels = channels = config.expand * d_model
        self.rank = rank = config.rank or math.ceil(d_model / CHANNELS_PER_RANK)
        self.into = LinearPair(d_model, channels, rngs=rngs)
        self.conv = ShortConv(channels, config.conv, rngs=rngs, bias=True)
        chosen = rank + 2 * config.states
        self.select = Linear(channels, chosen, rngs=rngs, axes=("rank", "hidden"))
        bound = rank**-0.5
        step = jax.random.uniform(rngs.params(), (channels, rank), jnp.float32, -bound, bound)
        self.step = nnx.Param(step, axes=("hidden", "rank"))
        low, high = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
        log_step_E = jax.random.uniform(rngs.params(), (channels,), jnp.float32, low, high)
        step_E = jnp.maximum(jnp.exp(log_step_E), STEP_FLOOR)
        self.step_bias = nnx.Param(step_E + jnp.log(-jnp.expm1(-step_E)), axes=("hidden",))
        # A table, kept flat: optimizers decay matrices, and Muon would take it for one.
        rate_EN = jnp.broadcast_to(jnp.arange(1.0, config.states + 1), (channels, config.states))
        self.log_rate = nnx.Param(jnp.log(rate_EN).reshape(-1), axes=("hidden",))
        self.skip = nnx.Param(jnp.ones((channels,), jnp.float32), axes=("hidden",))
        self.out = Linear(channels, d_model, rngs=rngs, axes=("embed", "hidden"))

    def init_state(self, batch: int) -> MambaState:
        memory = jnp.zeros((batch, self.channels, self.config.states), jnp.float32)
        return MambaState(memory, jnp.zeros((batch, self.config.conv - 1, self.channels)))

    def __call__(
        self,
        state: MambaState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[MambaState, Float[Array, "B T D"]]:
        u_BTE, gate_BTE = self.into(x_BTD)
        tail_BME, u_BTE = self.conv(state.tail_BME, u_BTE, reset_BT)
        u_BTE = jax.nn.silu(u_BTE)
        cuts = (self.rank, self.rank + self.config.states)
        low_BTR, write_key_BTN, read_key_BTN = jnp.split(self.select(u_BTE), cuts, -1)
        step_BTE = dot_transposed(low_BTR, self.step[...], jnp.float32) + self.step_bias[...]
        step_BTE, decay_EN = jax.nn.softplus(step_BTE), -jnp.exp(self.log_rate[...])
        decay_EN = decay_EN.reshape(self.channels, -1)
        if telemetry.heard():
            telemetry.note_gates(step_BTE[..., None] * decay_EN)
        y_BTE, memory_BEN = selective_scan(
            u_BTE,
            step_BTE,
            decay_EN,
            write_key_BTN,
            read_key_BTN,
            self.skip[...],
            state.memory_BEN,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        return MambaState(memory_BEN, tail_BME), self.out(y_BTE * jax.nn.silu(gate_BTE))

    def memory_report(self, segment: int = 1024, state: MambaState | None = None) -> MemoryReport:
        recurrence = 7.0 * self.channels * self.config.states
        told = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BEN)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, told)
