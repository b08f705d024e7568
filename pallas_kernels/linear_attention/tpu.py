"""Gated linear attention on a TPU: the body of a chunk, for `pallas_kernels.chunk_scan_tpu`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, lanes, tile_math
from pallas_kernels.chunk_scan_tpu import Plan, chunk_scan
from pallas_kernels.products import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class ChunkBody:
    """o = scale ((q kT . exp(G_i - G_j)) v + (q exp(G)) S);  S' = exp(G_C) S + (k exp(G_C - G))T v.

    G are sums of log decay; `kind` is the type that operands of products are rounded to.
    """

    kind: Any
    scale: float

    def __call__(self, consts: Any, fixed: Any, xs: Any, S_KV: jax.Array):
        q_CK, k_CK, v_CV, log_decay = xs
        decay = tile_math.decay_of(log_decay, fixed, q_CK.shape[0])
        scores_CC = tile_math.decayed_products(q_CK, k_CK, decay, self.kind)
        o_CV = tile_math.dot(scores_CC, v_CV, self.kind)
        o_CV = o_CV + tile_math.dot(q_CK * tile_math.enter(decay), S_KV, self.kind)
        written_CK = k_CK * tile_math.leave(decay)
        S_KV = tile_math.through(decay) * S_KV + tile_math.columns_dot_columns(
            written_CK, v_CV, self.kind
        )
        return self.scale * o_CV, S_KV


def unfit(q, k, v, *, chunk: int) -> str | None:
    """Why the kernel cannot take a call."""
    return lanes.dtype_unfit(q=q, k=k, v=v) or lanes.chunk_unfit(chunk)


def linear_attention_tpu(q, k, v, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.linear_attention` for shapes."""
    batch, tokens, heads, key_size = q.shape
    length = lanes.chunk_length(chunk, tokens)
    kind = jnp.promote_types(q.dtype, k.dtype)
    xs = (
        lanes.fold(q, length),
        lanes.fold(k, length),
        lanes.fold(v, length),
        fold_decay(log_decay, length),
    )
    fixed = None if reset is None else lanes.documents(reset, length)
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    body = ChunkBody(jnp.promote_types(kind, v.dtype), float(scale))
    plan = Plan(body, length, q.dtype, dispatch.current_target().interpreter)
    o_NLV, state = chunk_scan(plan, None, fixed, xs, state)
    state_BHKV = state.reshape(batch, heads, key_size, -1).astype(accumulation_dtype(q, k, v))
    return lanes.unfold(o_NLV, batch, tokens), state_BHKV


def fold_decay(log_decay: jax.Array | None, length: int) -> jax.Array | None:
    """Log decay as tiles take it: rows if per head, `[N, L, K]` float32 if per channel."""
    if log_decay is None:
        return None
    if log_decay.ndim == 3:
        return lanes.fold_rows(log_decay, length)
    return lanes.fold(log_decay.astype(jnp.float32), length)
