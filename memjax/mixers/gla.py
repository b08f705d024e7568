"""Gated linear attention: a linear memory whose every key channel forgets at its own rate."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax import telemetry
from memjax.config import check, check_at_least
from memjax.layers import Linear, check_heads
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.streams import Readout, split_heads
from memjax.ops import linear_attention

GATE_TEMPERATURE = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLA(MixerConfig):
    """heads must divide d_model; None: key_size d_model / (2 heads), value_size d_model / heads.

    gate_rank: rank of the map from the input to the decays.
    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "gla"
    heads: int = 4
    key_size: int | None = None
    value_size: int | None = None
    gate_rank: int = 16
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "key_size", "value_size", "gate_rank", "chunk")

    def check_width(self, d_model: int) -> None:
        if None in (self.key_size, self.value_size):
            check_heads(self, d_model)
        fits = self.key_size is not None or d_model >= 2 * self.heads
        rule = f"leaves no key channel at d_model={d_model}; use fewer, or give key_size"
        check(self, "heads", fits, rule)


class GLAState(NamedTuple):
    memory_BHKV: Float[Array, "B H K V"]


class GLAMixer(SequenceMixer):
    """A linear memory that is decayed by channel, then written.

    memory_t = diag(decay_t) memory_{t-1} + k_t v_t^T
    o_t      = K^(-1/2) memory_t^T q_t
    y_t      = W_o (RMSNorm(o_t) * silu(W_g x_t))
    log decay_t = log_sigmoid(W_2 W_1 x_t + b) / 16

    State: the memory, float32 [B, H, K, V], zero at the start of a document.
    Source: arXiv:2312.06635, Eq. 3 and Sec. 4.4. Paper: alpha = decay, tau = 16.
    """

    splits_tokens = True

    def __init__(self, config: GLA, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        heads = config.heads
        self.key_size = config.key_size or d_model // (2 * heads)
        self.value_size = config.value_size or d_model // heads
        keys, values = heads * self.key_size, heads * self.value_size
        wide = ("heads", "embed")
        self.query = Linear(d_model, keys, rngs=rngs, axes=wide)
        self.key = Linear(d_model, keys, rngs=rngs, axes=wide)
        self.value = Linear(d_model, values, rngs=rngs, axes=wide)
        self.decay_into = Linear(d_model, config.gate_rank, rngs=rngs, axes=("rank", "embed"))
        self.decay = Linear(config.gate_rank, keys, rngs=rngs, axes=("heads", "rank"), bias=True)
        self.readout = Readout(d_model, heads, self.value_size, gated=True, rngs=rngs)

    def init_state(self, batch: int) -> GLAState:
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        return GLAState(jnp.zeros(shape, jnp.float32))

    def __call__(
        self,
        state: GLAState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[GLAState, Float[Array, "B T D"]]:
        heads = self.config.heads
        score_BTF = self.decay(self.decay_into(x_BTD)).astype(jnp.float32)
        log_decay_BTF = jax.nn.log_sigmoid(score_BTF) / GATE_TEMPERATURE
        telemetry.note_gates(log_decay_BTF)
        o_BTHV, memory_BHKV = linear_attention(
            split_heads(self.query(x_BTD), heads),
            split_heads(self.key(x_BTD), heads),
            split_heads(self.value(x_BTD), heads),
            split_heads(log_decay_BTF, heads),
            state.memory_BHKV,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        return GLAState(memory_BHKV), self.readout(o_BTHV, x_BTD)

    def memory_report(self, segment: int = 1024, state: GLAState | None = None) -> MemoryReport:
        recurrence = 4.0 * self.config.heads * self.key_size * self.value_size
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)
