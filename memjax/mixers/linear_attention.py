"""Linear attention with no, a scalar or a vector decay that depends on the data."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check_at_least
from memjax.layers import Linear, RMSNorm, check_heads
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.ops import linear_attention

GATE_TEMPERATURE = 16.0
GATE_RANK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttention(MixerConfig):
    """decay: "none", one number a head ("scalar"), or one a key channel ("vector").

    heads must divide d_model; key_size, value_size: None is d_model / heads.
    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "linear_attention"
    heads: int = 4
    decay: Literal["none", "scalar", "vector"] = "scalar"
    key_size: int | None = None
    value_size: int | None = None
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "key_size", "value_size", "chunk")

    def check_width(self, d_model: int) -> None:
        if None in (self.key_size, self.value_size):
            check_heads(self, d_model)


class LinearAttentionState(NamedTuple):
    memory_BHKV: Float[Array, "B H K V"]


class LinearAttentionMixer(SequenceMixer):
    """A linear memory that is decayed, then written.

    memory_t = diag(decay_t) memory_{t-1} + k_t v_t^T
    o_t      = K^(-1/2) memory_t^T q_t
    y_t      = W_o (RMSNorm(o_t) * silu(W_g x_t))
    log decay_t = log_sigmoid(W_a x_t + b) / 16   (W_a of rank 16 for "vector", absent for "none")

    State: the memory, float32 [B, H, K, V], zero at the start of a document.
    Source: arXiv:2006.16236 without feature map and normaliser; gates of arXiv:2312.06635, Sec. 4.
    """

    splits_tokens = True

    def __init__(self, config: LinearAttention, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        heads = config.heads
        self.key_size = config.key_size or d_model // heads
        self.value_size = config.value_size or d_model // heads
        keys, values = heads * self.key_size, heads * self.value_size
        self.query = Linear(d_model, keys, rngs=rngs, axes=("heads", "embed"))
        self.key = Linear(d_model, keys, rngs=rngs, axes=("heads", "embed"))
        self.value = Linear(d_model, values, rngs=rngs, axes=("heads", "embed"))
        self.gate = Linear(d_model, values, rngs=rngs, axes=("heads", "embed"))
        self.norm = RMSNorm(self.value_size, axes=("value",))
        self.out = Linear(values, d_model, rngs=rngs, axes=("embed", "heads"))
        low, wide, narrow = ("rank", "embed"), ("heads", "rank"), ("head", "embed")
        vector, scalar = config.decay == "vector", config.decay == "scalar"
        self.decay_into = Linear(d_model, GATE_RANK, rngs=rngs, axes=low) if vector else None
        self.decay = (
            Linear(GATE_RANK, keys, rngs=rngs, axes=wide, bias=True)
            if vector
            else Linear(d_model, heads, rngs=rngs, axes=narrow, bias=True)
            if scalar
            else None
        )

    def init_state(self, batch: int) -> LinearAttentionState:
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        return LinearAttentionState(jnp.zeros(shape, jnp.float32))

    def log_decay(self, x_BTD: jax.Array) -> jax.Array | None:
        """None, [B, T, H] or [B, T, H, K], in float32 and at most 0."""
        if self.decay is None:
            return None
        if self.decay_into is not None:
            x_BTD = self.decay_into(x_BTD)
        log_decay = jax.nn.log_sigmoid(self.decay(x_BTD).astype(jnp.float32)) / GATE_TEMPERATURE
        if self.config.decay == "scalar":
            return log_decay
        return log_decay.reshape(*x_BTD.shape[:2], self.config.heads, self.key_size)

    def __call__(
        self,
        state: LinearAttentionState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[LinearAttentionState, Float[Array, "B T D"]]:
        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], self.config.heads, -1)

        log_decay = self.log_decay(x_BTD)
        telemetry.note_gates(log_decay)
        o_BTHV, memory_BHKV = linear_attention(
            heads(self.query(x_BTD)),
            heads(self.key(x_BTD)),
            heads(self.value(x_BTD)),
            log_decay,
            state.memory_BHKV,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        gated_BTHV = self.norm(o_BTHV) * jax.nn.silu(heads(self.gate(x_BTD)))
        y_BTD = self.out(gated_BTHV.reshape(*x_BTD.shape[:2], -1).astype(x_BTD.dtype))
        return LinearAttentionState(memory_BHKV), y_BTD

    def memory_report(
        self, segment: int = 1024, state: LinearAttentionState | None = None
    ) -> MemoryReport:
        recurrence = 4.0 * self.config.heads * self.key_size * self.value_size
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)
