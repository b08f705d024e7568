"""All-attention: softmax attention whose context includes learned vectors, in place of an MLP."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check_at_least
from memjax.layers import Linear, normal
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
    tokens_seen,
)
from memjax.mixers.persistent import Prefix, WindowState, empty_window, read_window
from memjax.positions import PositionField, Rotary, check_head_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllAttention(MixerConfig):
    """slots: persistent vectors of each head.

    The other fields are those of `Attention`, without grouped heads.
    """

    kind: ClassVar[str] = "all_attention"
    slots: int = 256
    heads: int = 4
    head_size: int | None = None
    window: int | None = None
    context: int = 1024
    position: PositionField = Rotary()

    def __post_init__(self):
        check_at_least(self, 1, "slots", "heads", "head_size", "window", "context")

    def check_width(self, d_model: int) -> None:
        check_head_size(self, d_model)


class AllAttentionMixer(SequenceMixer):
    """y_t = W_o sum_i softmax_i(s_i) v_i over the tokens in reach and the persistent vectors.

    s_j = position(q_t) . position(k_j) / sqrt(K)    v_j = W_v x_j     0 <= t - j < reach
    s_n = q_t . m_n / sqrt(K)                        v_n = u_n         n = 1 .. slots

    with m_n = sqrt(K) key_n and u_n = sqrt(slots) value_n from learned tables of standard deviation
    1 / sqrt(K) and 1 / sqrt(slots): the vectors have unit variance and learn faster. One softmax
    goes over both; persistent vectors have no position and no document.
    State: M = reach - 1 cached keys and values, float32; the vectors are parameters.
    Errors: FieldError if the heads do not fit the width.
    Source: arXiv:1907.01470, Eqs. 7-9 (pers in [1, N]); the scaling is that of the authors' code.
    Differs from paper: positions are those of the config (there: relative embeddings, adaptive
    spans). With `mlp=None` in the model, vectors stand in for the MLP as they do there.
    """

    def __init__(self, config: AllAttention, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.size = config.head_size or d_model // config.heads
        self.reach = config.window or config.context
        wide, slots = config.heads * self.size, config.slots
        self.query, self.key, self.value = (
            Linear(d_model, wide, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        keys = normal(rngs, (slots, wide), self.size**-0.5)
        values = normal(rngs, (slots, wide), slots**-0.5)
        self.persistent_keys = nnx.Param(keys, axes=("rank", "heads"))
        self.persistent_values = nnx.Param(values, axes=("rank", "heads"))
        self.out = Linear(wide, d_model, rngs=rngs, axes=("embed", "heads"))

    def init_state(self, batch: int) -> WindowState:
        return empty_window(batch, self.reach, self.config.heads, self.size)

    def _prefix(self, dtype: jnp.dtype) -> Prefix:
        def heads(table_MF: jax.Array, scale: float) -> jax.Array:
            table_MHK = table_MF.reshape(-1, self.config.heads, self.size)
            return jnp.swapaxes(scale * table_MHK, 0, 1).astype(dtype)

        keys, values = self.persistent_keys[...], self.persistent_values[...]
        return Prefix(heads(keys, self.size**0.5), heads(values, self.config.slots**0.5))

    def __call__(
        self,
        state: WindowState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[WindowState, Float[Array, "B T D"]]:
        streams = (
            p(x_BTD).reshape(*x_BTD.shape[:2], -1, self.size)
            for p in (self.query, self.key, self.value)
        )
        prefix, position = self._prefix(x_BTD.dtype), self.config.position
        state, o_BTD = read_window(
            state, streams, prefix, reset_BT, window=self.reach, position=position
        )
        return state, self.out(o_BTD)

    def memory_report(self, segment: int = 1024, state: WindowState | None = None) -> MemoryReport:
        seen = tokens_seen(self.reach, segment)
        # The tables of the vectors cost what matrices of their shapes do: scores, and sums.
        flops = projection_flops(self) + 4.0 * seen * self.config.heads * self.size
        telemetry = {} if state is None else {"slot_use": state.valid_BM.mean()}
        return MemoryReport(state_bytes(self), flops, 0.0, telemetry)
