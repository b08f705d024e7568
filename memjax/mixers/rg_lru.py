"""RG-LRU, the recurrent block of Hawk and Griffin: a gated leaky sum in every channel."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, ShortConv, dot_transposed, normal
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.ops import diagonal_scan

DECAY_POWER = 8.0
SHORTEST_DECAY, LONGEST_DECAY = 0.9, 0.999
STEEPEST_ROOT = 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRU(MixerConfig):
    """width: channels; None is 4/3 d_model, rounded up to a multiple of `heads`.

    heads: blocks of channels; a channel's gates see the channels of its block alone.
    conv: width of the short convolution. chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "rg_lru"
    width: int | None = None
    heads: int = 4
    conv: int = 4
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "width", "heads", "conv", "chunk")
        fits = self.width is None or self.width % self.heads == 0
        check(self, "width", fits, f"must be a multiple of heads={self.heads}")

    def channels(self, d_model: int) -> int:
        return self.width or self.heads * math.ceil(4 * d_model / (3 * self.heads))


class RGLRUState(NamedTuple):
    """The leaky sums, and the last inputs of the short convolution."""

    memory_BE: Float[Array, "B E"]
    tail_BME: Float[Array, "B M E"]


class RGLRUMixer(SequenceMixer):
    """Fade a channel by its recurrence gate, and add what its input gate lets in.

    u = conv(W_u x) + b
    r_t = sigmoid(W_r u_t + b_r);  i_t = sigmoid(W_i u_t + b_i), both in blocks of channels
    log a_t = -8 r_t softplus(lambda)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t);   y_t = W_out (gelu(W_g x_t) h_t)

    The gelu is its tanh form. Lambda starts so that a is uniform in [0.9, 0.999] where r = 1.
    State: h, float32 [B, E], and the tail of the convolution.
    Source: arXiv:2402.19427, Eqs. 1 to 4 and Secs. 2.3 and 2.4. Paper: -softplus(lambda) = log a,
    c = 8.
    Differs from paper: as in its authors' released code, the slope of the square root is at most
    1,000. Unlike there, a document's first token is scaled by sqrt(1 - a^2) as all others.
    """

    splits_tokens = True

    def __init__(self, config: RGLRU, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.channels = channels = config.channels(d_model)
        size = channels // config.heads
        self.gate = Linear(d_model, channels, rngs=rngs, axes=("hidden", "embed"))
        self.into = Linear(d_model, channels, rngs=rngs, axes=("hidden", "embed"))
        self.conv = ShortConv(channels, config.conv, rngs=rngs, bias=True)
        weight = normal(rngs, (config.heads, 2 * size, size), size**-0.5)
        self.gates = nnx.Param(weight, axes=("head", "value", "value"))
        self.gates_bias = nnx.Param(jnp.zeros((config.heads, 2 * size)), axes=("head", "value"))
        decay_E = jax.random.uniform(
            rngs.params(), (channels,), jnp.float32, SHORTEST_DECAY, LONGEST_DECAY
        )
        rate_E = jnp.log(jnp.expm1(-jnp.log(decay_E) / DECAY_POWER))
        self.rate = nnx.Param(rate_E, axes=("hidden",))
        self.out = Linear(channels, d_model, rngs=rngs, axes=("embed", "hidden"))

    def init_state(self, batch: int) -> RGLRUState:
        tail = jnp.zeros((batch, self.config.conv - 1, self.channels), jnp.float32)
        return RGLRUState(jnp.zeros((batch, self.channels), jnp.float32), tail)

    def gates_of(self, u_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log decay and input gate, [B, T, E] in float32."""
        size = self.channels // self.config.heads
        # One product a block: XLA on CPU takes longer over one batched product, as it transposes.
        blocks = [
            jax.nn.sigmoid(dot_transposed(u_BTK, weight_VK, jnp.float32) + bias_V)
            for u_BTK, weight_VK, bias_V in zip(
                jnp.split(u_BTE, self.config.heads, -1), self.gates[...], self.gates_bias[...]
            )
        ]
        recurrence = jnp.concatenate([gates_BTV[..., :size] for gates_BTV in blocks], -1)
        let_in = jnp.concatenate([gates_BTV[..., size:] for gates_BTV in blocks], -1)
        return -DECAY_POWER * recurrence * jax.nn.softplus(self.rate[...]), let_in

    def __call__(
        self,
        state: RGLRUState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[RGLRUState, Float[Array, "B T D"]]:
        tail_BME, u_BTE = self.conv(state.tail_BME, self.into(x_BTD), reset_BT)
        log_decay_BTE, let_in_BTE = self.gates_of(u_BTE)
        telemetry.note_gates(log_decay_BTE)
        h_BTE, memory_BE = diagonal_scan(
            _root(-jnp.expm1(2 * log_decay_BTE)) * let_in_BTE * u_BTE,
            log_decay_BTE,
            state.memory_BE,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        gate_BTE = jax.nn.gelu(self.gate(x_BTD), approximate=True)
        y_BTD = self.out(gate_BTE * h_BTE.astype(x_BTD.dtype))
        return RGLRUState(memory_BE, tail_BME), y_BTD

    def memory_report(self, segment: int = 1024, state: RGLRUState | None = None) -> MemoryReport:
        recurrence = 3.0 * self.channels
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BE)}
        blocks = 4.0 * self.channels * (self.channels // self.config.heads)
        flops = projection_flops(self) + blocks + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)


@jax.custom_jvp
def _root(x: jax.Array) -> jax.Array:
    """sqrt, whose slope ends at STEEPEST_ROOT: a decay of 1 lets nothing in, and it must learn."""
    return jnp.sqrt(x)


@_root.defjvp
def _root_slope(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = jnp.sqrt(x)
    return root, dx / jnp.maximum(2 * root, 1 / STEEPEST_ROOT)
