"""Softmax attention, full or in a sliding window, with grouped heads and a bounded cache."""

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.config import check, check_at_least
from memjax.layers import Linear, document_ids, normal
from memjax.mixers.base import (
    MemoryReport,
    MixerConfig,
    SequenceMixer,
    projection_flops,
    state_bytes,
    tokens_seen,
)
from memjax.ops import last_token
from memjax.positions import PositionField, Rotary, apply_position, check_head_size, positions
from memjax.sharding import split
from pallas_kernels import attention, context_parallel, ring_attention
from pallas_kernels.ring_attention import Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(MixerConfig):
    """A query sees itself and the reach - 1 tokens before it, in its document.

    window: reach of a sliding window; None for full attention, whose reach is `context`.
    context: reach of full attention, which bounds its cache. Documents up to this length are
        attended in full; of longer ones the oldest keys are dropped, in every segment alike.
    heads, kv_heads: query heads, and key/value heads shared by groups of them (None: as many).
    head_size: None is d_model / heads.
    logit_cap: bound c of the logits, which become c tanh(logit / c) (50 in Gemma 2); None for none.
    sinks: whether each head has a learned logit that takes a part of every softmax, so that a head
        may read nothing.
    """

    kind: ClassVar[str] = "attention"
    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    window: int | None = None
    context: int = 1024
    position: PositionField = Rotary()
    logit_cap: float | None = None
    sinks: bool = False
    impl: Literal["auto", "reference", "xla", "tpu", "gpu"] = "auto"

    def __post_init__(self):
        check_at_least(self, 1, "heads", "kv_heads", "head_size", "window", "context")
        cap = self.logit_cap
        check(self, "logit_cap", cap is None or cap > 0, "must be greater than 0, or none")
        groups = self.kv_heads or self.heads
        check(self, "kv_heads", self.heads % groups == 0, f"must divide heads={self.heads}")

    def check_width(self, d_model: int) -> None:
        check_head_size(self, d_model)


class AttentionState(NamedTuple):
    """Keys (with their positions worked in) and values of the last reach - 1 tokens.

    valid: whether a slot holds a token of the document that goes on. position: of the next token.
    """

    k_BMGK: Float[Array, "B M G K"]
    v_BMGK: Float[Array, "B M G K"]
    valid_BM: Bool[Array, "B M"]
    position_B: Int[Array, "B"]


class AttentionMixer(SequenceMixer):
    """y_t = W_o sum_j softmax_j(q_t . k_j / sqrt(K)) v_j over 0 <= t - j < reach, same document.

    Positions (`memjax.positions`) turn q and k, or lower the logits of distant keys, behind their
    cap where `logit_cap` is set. With `sinks` a head's softmax has e^sink more in its denominator;
    sinks start from N(0, 0.02), as in the released code of gpt-oss in transformers.

    State: M = reach - 1 cached keys and values, float32, so 2 M G K floats a sequence.
    Errors: FieldError if the heads do not fit the width.
    Source: arXiv:1706.03762; grouped heads arXiv:2305.13245; rotary arXiv:2104.09864; cap
    arXiv:2408.00118; sinks arXiv:2508.10925.
    """

    splits_tokens = True

    def __init__(self, config: Attention, d_model: int, *, rngs: nnx.Rngs):
        config.check_width(d_model)
        self.config = config
        self.groups = config.kv_heads or config.heads
        self.size = config.head_size or d_model // config.heads
        self.reach = config.window or config.context
        wide, narrow = config.heads * self.size, self.groups * self.size
        self.query = Linear(d_model, wide, rngs=rngs, axes=("heads", "embed"))
        self.key = Linear(d_model, narrow, rngs=rngs, axes=("heads", "embed"))
        self.value = Linear(d_model, narrow, rngs=rngs, axes=("heads", "embed"))
        self.out = Linear(wide, d_model, rngs=rngs, axes=("embed", "heads"))
        self.sinks = (
            nnx.Param(normal(rngs, (config.heads,)), axes=("head",)) if config.sinks else None
        )

    def init_state(self, batch: int) -> AttentionState:
        cache = jnp.zeros((batch, self.reach - 1, self.groups, self.size), jnp.float32)
        valid_BM = jnp.zeros((batch, self.reach - 1), bool)
        return AttentionState(cache, cache, valid_BM, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self,
        state: AttentionState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[AttentionState, Float[Array, "B T D"]]:
        def heads(x_BTD: jax.Array) -> jax.Array:
            return x_BTD.reshape(*x_BTD.shape[:2], -1, self.size)

        position_BT = positions(state.position_B, reset_BT)
        q_BTHK = apply_position(self.config.position, heads(self.query(x_BTD)), position_BT)
        k_BTGK = apply_position(self.config.position, heads(self.key(x_BTD)), position_BT)
        slopes = self.config.position.slopes(self.config.heads)
        slopes_H = None if slopes is None else jnp.asarray(slopes, jnp.float32)
        sinks_H = None if self.sinks is None else self.sinks[...]
        args = (q_BTHK, k_BTGK, heads(self.value(x_BTD)), *state[:3], reset_BT, slopes_H, sinks_H)
        axes = ("BTHK", "BTGK", "BTGK", "BMGK", "BMGK", "BM", "BT", "H", "H")
        y_BTHK, *cache = split(self._attend, args, axes, ("BTHK", "BMGK", "BMGK", "BM"))
        k_BMGK, v_BMGK, valid_BM = cache
        state = AttentionState(k_BMGK, v_BMGK, valid_BM, last_token(position_BT) + 1)
        return state, self.out(y_BTHK.reshape(*x_BTD.shape[:2], -1))

    def _attend(
        self, axis_name, q_BTHK, k_BTGK, v_BTGK, k_BMGK, v_BMGK, valid_BM, reset_BT, bias, sinks
    ):
        """Outputs, and the next cache: keys, values, and which of them are valid."""
        dtype = q_BTHK.dtype
        if axis_name is not None:
            return self._attend_on_a_ring(
                axis_name, q_BTHK, k_BTGK, v_BTGK, k_BMGK, v_BMGK, valid_BM, reset_BT, bias, sinks
            )
        k_BJGK = jnp.concatenate([k_BMGK.astype(dtype), k_BTGK], 1)
        v_BJGK = jnp.concatenate([v_BMGK.astype(dtype), v_BTGK], 1)
        id_BT = document_ids(reset_BT)
        id_BJ = jnp.concatenate([jnp.where(valid_BM, 0, -1), id_BT], 1)
        y_BTHK = attention(
            q_BTHK,
            k_BJGK,
            v_BJGK,
            window=self.reach,
            segment_ids=(id_BT, id_BJ),
            bias=bias,
            logit_cap=self.config.logit_cap,
            sinks=sinks,
            impl=self.config.impl,
        )
        last = slice(k_BJGK.shape[1] - (self.reach - 1), None)
        valid_BM = id_BJ[:, last] == id_BJ[:, -1:]
        return y_BTHK, *_cache(k_BJGK[:, last], v_BJGK[:, last], valid_BM)

    def _attend_on_a_ring(
        self, axis_name, q_BTHK, k_BTGK, v_BTGK, k_BMGK, v_BMGK, valid_BM, reset_BT, bias, sinks
    ):
        """`_attend` where tokens are split over devices."""
        id_BT = context_parallel.document_numbers(reset_BT, axis_name=axis_name)
        id_BM = jnp.where(valid_BM, 0, -1)
        y_BTHK = ring_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            axis_name=axis_name,
            window=self.reach,
            segment_ids=id_BT,
            bias=bias,
            logit_cap=self.config.logit_cap,
            sinks=sinks,
            cache=Cache(k_BMGK, v_BMGK, id_BM) if self.reach > 1 else None,
            impl=self.config.impl,
        )
        if self.reach == 1:
            return y_BTHK, k_BMGK, v_BMGK, valid_BM
        k_BMGK, v_BMGK, id_BM = (
            context_parallel.last_tokens(old, new, axis_name=axis_name)
            for old, new in ((k_BMGK, k_BTGK), (v_BMGK, v_BTGK), (id_BM, id_BT))
        )
        last_B = context_parallel.of_last(id_BT[:, -1], axis_name)
        return y_BTHK, *_cache(k_BMGK, v_BMGK, id_BM == last_B[:, None])

    def memory_report(
        self, segment: int = 1024, state: AttentionState | None = None
    ) -> MemoryReport:
        seen = tokens_seen(self.reach, segment)
        flops = projection_flops(self) + 4.0 * seen * self.config.heads * self.size
        telemetry = {} if state is None else {"slot_use": state.valid_BM.mean()}
        return MemoryReport(state_bytes(self), flops, 0.0, telemetry)


def _cache(k_BMGK: jax.Array, v_BMGK: jax.Array, valid_BM: jax.Array):
    """Keys and values, zero where they are not of the document that goes on."""
    kept = (jnp.where(valid_BM[..., None, None], a, 0) for a in (k_BMGK, v_BMGK))
    return *(a.astype(jnp.float32) for a in kept), valid_BM
