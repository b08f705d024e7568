"""All-attention: softmax attention whose context includes learned vectors, in place of an MLP."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from memjax.config import check_at_least
from memjax.layers import Linear, document_ids, normal
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
)
from memjax.mixers.persistent import Prefix, WindowState, attend_window, keep_window
from memjax.positions import PositionField, Rotary, apply_position, check_head_size, positions


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
        cache = jnp.zeros((batch, self.reach - 1, self.config.heads, self.size), jnp.float32)
        valid_BM = jnp.zeros((batch, self.reach - 1), bool)
        return WindowState(cache, cache, valid_BM, jnp.zeros((batch,), jnp.int32))

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
        position_BT = positions(state.position_B, reset_BT)
        plain_BTHK, k_BTHK, v_BTHK = (
            p(x_BTD).reshape(*x_BTD.shape[:2], -1, self.size)
            for p in (self.query, self.key, self.value)
        )
        q_BTHK, k_BTHK = (
            apply_position(self.config.position, a, position_BT) for a in (plain_BTHK, k_BTHK)
        )
        k_BJHK = jnp.concatenate([state.k_BMHK.astype(x_BTD.dtype), k_BTHK], 1)
        v_BJHK = jnp.concatenate([state.v_BMHK.astype(x_BTD.dtype), v_BTHK], 1)
        id_BT = document_ids(reset_BT)
        id_BJ = jnp.concatenate([jnp.where(state.valid_BM, 0, -1), id_BT], 1)
        y_BTD = attend_window(
            (q_BTHK, plain_BTHK, id_BT),
            (k_BJHK, v_BJHK, id_BJ),
            self._prefix(x_BTD.dtype),
            window=self.reach,
            slopes_H=self.config.position.slopes(self.config.heads),
        )
        return keep_window(k_BJHK, v_BJHK, id_BJ, position_BT, self.reach), self.out(y_BTD)

    def memory_report(self, segment: int = 1024, state: WindowState | None = None) -> MemoryReport:
        reach = min(self.reach, segment)
        seen = (reach * (reach + 1) / 2 + (segment - reach) * reach) / segment
        # The tables of the vectors cost what matrices of their shapes do: scores, and sums.
        flops = projection_flops(self) + 4.0 * seen * self.config.heads * self.size
        telemetry = {} if state is None else {"slot_use": state.valid_BM.mean()}
        return MemoryReport(state_bytes(self), flops, 0.0, telemetry)
