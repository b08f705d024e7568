"""Based: linear attention whose weights are the Taylor series of those of softmax attention."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check_at_least
from memjax.layers import Linear, check_heads
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.streams import split_heads
from memjax.ops import taylor_attention
from pallas_kernels.taylor_attention import feature_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Based(MixerConfig):
    """heads must divide d_model. key_size: channels of queries and keys, before the features.

    chunk: tokens computed together. Speed only.
    The model of the paper is a pattern of this, sliding windows (`attention`) and `base_conv`.
    """

    kind: ClassVar[str] = "based"
    heads: int = 4
    key_size: int = 16
    chunk: int = 128
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "key_size", "chunk")

    def check_width(self, d_model: int) -> None:
        check_heads(self, d_model)


class BasedState(NamedTuple):
    """memory_BHMW: M features of keys; the last of its W columns is their sum, the normaliser."""

    memory_BHMW: Float[Array, "B H M W"]


class BasedMixer(SequenceMixer):
    """Attention in a document, with a polynomial of scores in place of their exponential.

    y_t = W_o sum_{j <= t} w_tj v_j / sum_{j <= t} w_tj
    w = 1 + s + s^2 / 2,   s = q . k / sqrt(K)

    State: the sums over j as one matrix a head, float32 [B, H, 1 + K + K (K + 1) / 2, V + 1] (see
    `pallas_kernels.taylor_attention`).
    Source: arXiv:2402.18668, Sec. 4.
    """

    splits_tokens = True

    def __init__(self, config: Based, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.value_size = d_model // config.heads
        keys, wide = config.heads * config.key_size, ("heads", "embed")
        self.query = Linear(d_model, keys, rngs=rngs, axes=wide)
        self.key = Linear(d_model, keys, rngs=rngs, axes=wide)
        self.value = Linear(d_model, d_model, rngs=rngs, axes=wide)
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> BasedState:
        count = feature_count(self.config.key_size)
        shape = (batch, self.config.heads, count, self.value_size + 1)
        return BasedState(jnp.zeros(shape, jnp.float32))

    def __call__(
        self,
        state: BasedState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[BasedState, Float[Array, "B T D"]]:
        heads = self.config.heads
        o_BTHV, memory_BHMW = taylor_attention(
            split_heads(self.query(x_BTD), heads),
            split_heads(self.key(x_BTD), heads),
            split_heads(self.value(x_BTD), heads),
            state.memory_BHMW,
            reset_BT,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        return BasedState(memory_BHMW), self.out(o_BTHV.reshape(x_BTD.shape))

    def memory_report(self, segment: int = 1024, state: BasedState | None = None) -> MemoryReport:
        count = feature_count(self.config.key_size)
        recurrence = 4.0 * self.config.heads * count * (self.value_size + 1)
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHMW)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)
