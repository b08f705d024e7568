"""Mamba-2: a state space model with one decay a head, in its matrix form."""

import dataclasses
import itertools
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, ShortConv
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.norms import unit_rms
from memjax.ops import linear_attention
from pallas_kernels.sums import scaled

STEP_RANGE = (1e-3, 1e-1)
STEP_FLOOR = 1e-4
RATE_RANGE = (1.0, 16.0)
NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2(MixerConfig):
    """expand: inner channels for each channel of the model.

    head_size: inner channels a head, or all of them where there are fewer.
    state_size: numbers that each inner channel keeps.
    groups: sets of input and output maps (B, C); the heads of a group share one.
    conv: width of the short convolution on the input and both maps.
    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "mamba2"
    expand: int = 2
    head_size: int = 64
    state_size: int = 128
    groups: int = 1
    conv: int = 4
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "expand", "head_size", "state_size", "groups", "conv", "chunk")

    def heads(self, d_model: int) -> int:
        return max(1, self.expand * d_model // self.head_size)

    def check_width(self, d_model: int) -> None:
        inner, heads = self.expand * d_model, self.heads(d_model)
        rule = f"must divide expand * d_model = {inner}, or be no less"
        check(self, "head_size", inner % heads == 0 and inner // heads <= self.head_size, rule)
        check(self, "groups", heads % self.groups == 0, f"must divide the {heads} heads")


class Mamba2State(NamedTuple):
    """The memory, and the last inputs of the convolution: x, B and C side by side."""

    memory_BHKV: Float[Array, "B H K V"]
    tail_BMF: Float[Array, "B M F"]


class Mamba2Mixer(SequenceMixer):
    """Decay the memory of each head by one number, then add an input that the step scales.

    memory_t = exp(-exp(log_rate) step_t) memory_{t-1} + B_t (step_t x_t)^T
    o_t      = memory_t^T C_t + skip x_t
    y_t      = W_o RMSNorm(o_t * silu(z_t)), the norm over the channels of a group
    (x, B, C)_t = silu(conv(W_xBC u)_t + bias);   z_t = W_z u_t
    step_t   = softplus(W_s u_t + step_bias), one number a head

    u is the input of the layer, `into` holds W_z, W_xBC and W_s, in this order.
    State: the memory, float32 [B, H, K, V] (K = state_size, V = head_size), and the tail of the
    convolution.
    Source: arXiv:2405.21060, Listing 1, Sec. 7. Paper: N = K, P = V, A = -exp(log_rate),
    Delta = step, D = skip.
    """

    splits_tokens = True

    def __init__(self, config: Mamba2, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.heads, self.inner = config.heads(d_model), config.expand * d_model
        heads, inner, maps = self.heads, self.inner, config.groups * config.state_size
        self.sizes = (inner, inner + 2 * maps, heads)
        self.into = Linear(d_model, sum(self.sizes), rngs=rngs, axes=("heads", "embed"))
        self.conv = ShortConv(inner + 2 * maps, config.conv, rngs=rngs, bias=True)
        rate_H = jax.random.uniform(rngs.params(), (heads,), jnp.float32, *RATE_RANGE)
        self.log_rate = nnx.Param(jnp.log(rate_H), axes=("head",))
        low, high = (math.log(step) for step in STEP_RANGE)
        step_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
        step_H = jnp.maximum(step_H, STEP_FLOOR)
        self.step_bias = nnx.Param(step_H + jnp.log(-jnp.expm1(-step_H)), axes=("head",))
        self.skip = nnx.Param(jnp.ones((heads,), jnp.float32), axes=("head",))
        self.norm = nnx.Param(jnp.ones((inner,), jnp.float32), axes=("heads",))
        self.out = Linear(inner, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> Mamba2State:
        config = self.config
        shape = (batch, self.heads, config.state_size, self.inner // self.heads)
        tail = (batch, config.conv - 1, self.sizes[1])
        return Mamba2State(jnp.zeros(shape, jnp.float32), jnp.zeros(tail, jnp.float32))

    def __call__(
        self,
        state: Mamba2State,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[Mamba2State, Float[Array, "B T D"]]:
        lanes, groups = x_BTD.shape[:2], self.config.groups
        z_BTE, streams_BTF, step_BTH = self._split(self.into(x_BTD), self.sizes)
        tail_BMF, streams_BTF = self.conv(state.tail_BMF, streams_BTF, reset_BT)
        maps = groups * self.config.state_size
        u_BTE, k_BTF, q_BTF = self._split(jax.nn.silu(streams_BTF), (self.inner, maps, maps))
        u_BTHV = u_BTE.reshape(*lanes, self.heads, -1)
        step_BTH = jax.nn.softplus(step_BTH.astype(jnp.float32) + self.step_bias[...])
        log_decay_BTH = -jnp.exp(self.log_rate[...]) * step_BTH
        telemetry.note_gates(log_decay_BTH)
        o_BTHV, memory_BHKV = linear_attention(
            q_BTF.reshape(*lanes, groups, -1),
            k_BTF.reshape(*lanes, groups, -1),
            scaled(u_BTHV, step_BTH[..., None]).astype(x_BTD.dtype),
            log_decay_BTH,
            state.memory_BHKV,
            reset_BT,
            scale=1.0,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        o_BTHV = o_BTHV + scaled(u_BTHV, self.skip[...][:, None].astype(x_BTD.dtype))
        y_BTE = self._normalise(o_BTHV.reshape(u_BTE.shape) * jax.nn.silu(z_BTE))
        return Mamba2State(memory_BHKV, tail_BMF), self.out(y_BTE)

    def _split(self, x_BTF: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
        return jnp.split(x_BTF, list(itertools.accumulate(sizes))[:-1], -1)

    def _normalise(self, x_BTE: jax.Array) -> jax.Array:
        """RMSNorm of each group of channels, statistics in float32."""
        x_BTGF = x_BTE.reshape(*x_BTE.shape[:2], self.config.groups, -1)
        y_BTE = unit_rms(x_BTGF, NORM_EPS).reshape(x_BTE.shape)
        return scaled(y_BTE, self.norm[...]).astype(x_BTE.dtype)

    def memory_report(self, segment: int = 1024, state: Mamba2State | None = None) -> MemoryReport:
        recurrence = 4.0 * self.config.state_size * self.inner
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)
