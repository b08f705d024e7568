"""Gated DeltaNet: a linear memory that corrects what it holds for a key, and forgets."""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, l2_normalise
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.streams import Readout, Stream, split_heads
from memjax.ops import delta_rule

KEY_RATIO = 0.75
VALUES_PER_KEY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(MixerConfig):
    """key_size: None is 0.75 d_model / heads; value_size: None is twice the key size.

    conv: width of the short convolutions on queries, keys and values; None for none.
    negative_eigenvalues: write strength in (0, 2) instead of (0, 1), for state tracking.
    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "gated_deltanet"
    heads: int = 4
    key_size: int | None = None
    value_size: int | None = None
    conv: int | None = 4
    negative_eigenvalues: bool = False
    chunk: int = 32
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "key_size", "value_size", "conv", "chunk")

    def check_width(self, d_model: int) -> None:
        fits = self.key_size is not None or d_model * KEY_RATIO >= self.heads
        rule = f"leaves no key channel at d_model={d_model}; use fewer, or give key_size"
        check(self, "heads", fits, rule)


class GatedDeltaNetState(NamedTuple):
    """The memory, and the last inputs of the short convolutions of queries, keys and values."""

    memory_BHKV: Float[Array, "B H K V"]
    query_tail_BMF: Float[Array, "B M F"]
    key_tail_BMF: Float[Array, "B M F"]
    value_tail_BMF: Float[Array, "B M Z"]


class GatedDeltaNetMixer(SequenceMixer):
    """Decay the memory, then replace what it holds for k_t by a step of size beta towards v_t.

    memory_t = decay_t memory_{t-1}
    memory_t += k_t (beta_t (v_t - memory_t^T k_t))^T
    o_t = K^(-1/2) memory_t^T q_t;   y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
    q, k, v = silu(conv(W x)), q and k of unit norm; beta = sigmoid(W_b x)
    log decay = -exp(A) softplus(W_a x + dt)

    State: the memory, float32 [B, H, K, V], and the tails of the convolutions.
    Source: arXiv:2412.06464, Eq. 10 and Sec. 3.4. Paper: alpha = decay.
    """

    splits_tokens = True

    def __init__(self, config: GatedDeltaNet, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        heads = config.heads
        self.key_size = config.key_size or int(KEY_RATIO * d_model / heads)
        self.value_size = config.value_size or VALUES_PER_KEY * self.key_size
        keys, values = heads * self.key_size, heads * self.value_size
        self.query = Stream(d_model, keys, config.conv, rngs=rngs)
        self.key = Stream(d_model, keys, config.conv, rngs=rngs)
        self.value = Stream(d_model, values, config.conv, rngs=rngs)
        self.beta = Linear(d_model, heads, rngs=rngs, axes=("head", "embed"))
        self.decay = Linear(d_model, heads, rngs=rngs, axes=("head", "embed"))
        rate_H = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1e-2, 16.0)
        self.log_rate = nnx.Param(jnp.log(rate_H), axes=("head",))
        low, high = math.log(1e-3), math.log(1e-1)
        step_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
        self.step_bias = nnx.Param(step_H + jnp.log(-jnp.expm1(-step_H)), axes=("head",))
        self.readout = Readout(d_model, heads, self.value_size, gated=True, rngs=rngs)

    def init_state(self, batch: int) -> GatedDeltaNetState:
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        tails = (stream.init_tail(batch) for stream in (self.query, self.key, self.value))
        return GatedDeltaNetState(jnp.zeros(shape, jnp.float32), *tails)

    def gates(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """beta and log decay, [B, T, H] in float32."""
        strength = 2.0 if self.config.negative_eigenvalues else 1.0
        beta_BTH = strength * jax.nn.sigmoid(self.beta(x_BTD).astype(jnp.float32))
        step_BTH = jax.nn.softplus(self.decay(x_BTD).astype(jnp.float32) + self.step_bias[...])
        return beta_BTH, -jnp.exp(self.log_rate[...]) * step_BTH

    def __call__(
        self,
        state: GatedDeltaNetState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[GatedDeltaNetState, Float[Array, "B T D"]]:
        heads = self.config.heads
        query_tail_BMF, q_BTF = self.query(state.query_tail_BMF, x_BTD, reset_BT)
        key_tail_BMF, k_BTF = self.key(state.key_tail_BMF, x_BTD, reset_BT)
        value_tail_BMF, v_BTF = self.value(state.value_tail_BMF, x_BTD, reset_BT)
        beta_BTH, log_decay_BTH = self.gates(x_BTD)
        telemetry.note_gates(log_decay_BTH, beta_BTH)
        o_BTHV, memory_BHKV = delta_rule(
            l2_normalise(split_heads(q_BTF, heads)),
            l2_normalise(split_heads(k_BTF, heads)),
            split_heads(v_BTF, heads),
            beta_BTH,
            log_decay_BTH,
            state.memory_BHKV,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        state = GatedDeltaNetState(memory_BHKV, query_tail_BMF, key_tail_BMF, value_tail_BMF)
        return state, self.readout(o_BTHV, x_BTD)

    def memory_report(
        self, segment: int = 1024, state: GatedDeltaNetState | None = None
    ) -> MemoryReport:
        recurrence = 6.0 * self.config.heads * self.key_size * self.value_size
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)
