"""The linear transformer: attention with a feature map in place of the exponential."""

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
from memjax.ops import linear_attention

NORMALISER_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearTransformer(MixerConfig):
    """heads must divide d_model. chunk: tokens computed together. Speed only."""

    kind: ClassVar[str] = "linear_transformer"
    heads: int = 4
    chunk: int = 64
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "chunk")

    def check_width(self, d_model: int) -> None:
        check_heads(self, d_model)


class LinearTransformerState(NamedTuple):
    """memory_BHKV: the last of its V = K + 1 columns is the sum of features, the normaliser."""

    memory_BHKV: Float[Array, "B H K V"]


def features(x: Float[Array, "*lead size"]) -> Float[Array, "*lead size"]:
    """elu(x) + 1, without the rounding of adding 1 to exp(x) - 1; in float32."""
    wide = x.astype(jnp.float32)
    return jnp.where(wide > 0, wide + 1, jnp.exp(jnp.where(wide > 0, 0, wide))).astype(x.dtype)


class LinearTransformerMixer(SequenceMixer):
    """Attention with weights phi(q) . phi(k) / sum, phi = elu + 1, read from a memory.

    memory_t = memory_{t-1} + phi(k_t) v_t^T;   sum_t = sum_{t-1} + phi(k_t)
    y_t = W_o (memory_t^T phi(q_t) / (sum_t . phi(q_t) + 1e-6))

    State: memory and sum as one matrix a head, float32 [B, H, K, K + 1]: the sum is what a value
    of 1 beside those of v_t would write.
    Source: arXiv:2006.16236, Eqs. 7 and 18 to 20.
    """

    splits_tokens = True

    def __init__(self, config: LinearTransformer, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.size = d_model // config.heads
        self.query, self.key, self.value = (
            Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        self.out = Linear(d_model, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> LinearTransformerState:
        shape = (batch, self.config.heads, self.size, self.size + 1)
        return LinearTransformerState(jnp.zeros(shape, jnp.float32))

    def __call__(
        self,
        state: LinearTransformerState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[LinearTransformerState, Float[Array, "B T D"]]:
        heads = self.config.heads
        v_BTHK = split_heads(self.value(x_BTD), heads)
        o_BTHV, memory_BHKV = linear_attention(
            features(split_heads(self.query(x_BTD), heads)),
            features(split_heads(self.key(x_BTD), heads)),
            jnp.concatenate([v_BTHK, jnp.ones_like(v_BTHK[..., :1])], -1),
            None,
            state.memory_BHKV,
            reset_BT,
            scale=1.0,
            chunk=self.config.chunk,
            impl=self.config.impl,
        )
        o_BTHV = o_BTHV.astype(jnp.float32)
        mean_BTHK = o_BTHV[..., :-1] / (o_BTHV[..., -1:] + NORMALISER_EPS)
        y_BTD = self.out(mean_BTHK.reshape(x_BTD.shape).astype(x_BTD.dtype))
        return LinearTransformerState(memory_BHKV), y_BTD

    def memory_report(
        self, segment: int = 1024, state: LinearTransformerState | None = None
    ) -> MemoryReport:
        recurrence = 4.0 * self.config.heads * self.size * (self.size + 1)
        telemetry = {} if state is None else {"state_norm": jnp.linalg.norm(state.memory_BHKV)}
        flops = projection_flops(self) + recurrence
        return MemoryReport(state_bytes(self), flops, recurrence, telemetry)
