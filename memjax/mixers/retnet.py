"""RetNet: a linear memory with a fixed decay for each head, and rotary positions."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

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
from memjax.ops import last_token, linear_attention
from memjax.positions import PositionField, Rotary, apply_position, positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNet(MixerConfig):
    """heads must divide d_model; key_size: None is d_model / heads; value_size: None is twice that.

    position: turns queries and keys; one that lowers logits (ALiBi) has nothing to lower here.
    chunk: tokens computed together. Speed only.
    """

    kind: ClassVar[str] = "retnet"
    heads: int = 4
    key_size: int | None = None
    value_size: int | None = None
    position: PositionField = Rotary()
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "key_size", "value_size", "chunk")
        turns = self.position.slopes(self.heads) is None
        check(self, "position", turns, "lowers logits, which retention has not; use rotary or nope")

    def check_width(self, d_model: int) -> None:
        if self.key_size is None:
            check_heads(self, d_model)
        size = self.key_size or d_model // self.heads
        if isinstance(self.position, Rotary):
            field = "key_size" if self.key_size else "heads"
            rule = f"gives key size {size}, but rotary positions need an even one"
            check(self, field, size % 2 == 0, rule)


class RetNetState(NamedTuple):
    """The memory, and the position of the next token in its document."""

    memory_BHKV: Float[Array, "B H K V"]
    position_B: Int[Array, "B"]


def log_decays(heads: int) -> np.ndarray:
    """log(1 - 2^(-5 - h)) for heads h = 0, 1, ...: horizons of 32, 64, ... tokens."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))


class RetNetMixer(SequenceMixer):
    """Multi-scale retention.

    memory_t = decay memory_{t-1} + k_t v_t^T,   decay = 1 - 2^(-5 - h) for head h
    o_t = K^(-1/2) memory_t^T q_t;   y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))
    q, k: projections of x_t, turned by the position of the token in its document.

    State: the memory, float32 [B, H, K, V], and the position, int32 [B].
    Source: arXiv:2307.08621, Eqs. 6 and 8.
    Differs from paper: RMSNorm for GroupNorm, and no scaling of rows before it: under a norm that
    does not see the scale of a row, it changes nothing.
    """

    splits_tokens = True

    def __init__(self, config: RetNet, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        heads = config.heads
        self.key_size = config.key_size or d_model // heads
        self.value_size = config.value_size or 2 * self.key_size
        keys, values = heads * self.key_size, heads * self.value_size
        wide = ("heads", "embed")
        self.query = Linear(d_model, keys, rngs=rngs, axes=wide)
        self.key = Linear(d_model, keys, rngs=rngs, axes=wide)
        self.value = Linear(d_model, values, rngs=rngs, axes=wide)
        self.readout = Readout(d_model, heads, self.value_size, gated=True, rngs=rngs)

    def init_state(self, batch: int) -> RetNetState:
        shape = (batch, self.config.heads, self.key_size, self.value_size)
        return RetNetState(jnp.zeros(shape, jnp.float32), jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        state: RetNetState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[RetNetState, Float[Array, "B T D"]]:
        config = self.config
        position_BT = positions(state.position_B, reset_BT)
        q_BTHK, k_BTHK = (
            apply_position(config.position, split_heads(project(x_BTD), config.heads), position_BT)
            for project in (self.query, self.key)
        )
        decay_H = jnp.asarray(log_decays(config.heads), jnp.float32)
        telemetry.note_gates(decay_H)
        o_BTHV, memory_BHKV = linear_attention(
            q_BTHK,
            k_BTHK,
            split_heads(self.value(x_BTD), config.heads),
            jnp.broadcast_to(decay_H, q_BTHK.shape[:3]),
            state.memory_BHKV,
            reset_BT,
            chunk=config.chunk,
            impl=config.impl,
        )
        y_BTD = self.readout(o_BTHV, x_BTD)
        return RetNetState(memory_BHKV, last_token(position_BT) + 1), y_BTD

    def memory_report(self, segment: int = 1024, state: RetNetState | None = None) -> MemoryReport:
        recurrence = 4.0 * self.config.heads * self.key_size * self.value_size
        told = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, told)
