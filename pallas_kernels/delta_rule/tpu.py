"""The gated delta rule on a TPU: the body of a chunk, for `pallas_kernels.chunk_scan_tpu`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, lanes, tile_math
from pallas_kernels.chunk_scan_tpu import Plan, chunk_scan
from pallas_kernels.linear_attention.tpu import fold_decay
from pallas_kernels.products import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class ChunkBody:
    """Token j writes k_j d_jT, and the d of a chunk solve a unit lower triangular system:

        (I + beta . strictly_lower(k kT . exp(G_i - G_j))) d = beta (v - (k exp(G)) S)
        o = scale ((q kT . exp(G_i - G_j)) d + (q exp(G)) S);  S' = exp(G_C) S + (k exp(G_C - G))T d

    Only products of q and k with k are rounded to `kind`.
    """

    kind: Any
    scale: float

    def __call__(self, consts: Any, fixed: Any, xs: Any, S_KV: jax.Array):
        q_CK, k_CK, v_CV, beta_1C, log_decay = xs
        decay = tile_math.decay_of(log_decay, fixed, q_CK.shape[0])
        beta_C1, enter = tile_math.as_column(beta_1C), tile_math.enter(decay)
        i, j = tile_math.places(q_CK.shape[0])
        overlap_CC = tile_math.decayed_products(k_CK, k_CK, decay, self.kind)
        solve_CC = tile_math.unit_lower_inverse(beta_C1 * jnp.where(i > j, overlap_CC, 0))
        wanted_CV = beta_C1 * (v_CV - tile_math.dot(k_CK * enter, S_KV))
        written_CV = tile_math.dot(solve_CC, wanted_CV)
        scores_CC = tile_math.decayed_products(q_CK, k_CK, decay, self.kind)
        o_CV = tile_math.dot(scores_CC, written_CV) + tile_math.dot(q_CK * enter, S_KV)
        S_KV = tile_math.through(decay) * S_KV + tile_math.columns_dot_columns(
            k_CK * tile_math.leave(decay), written_CV
        )
        return self.scale * o_CV, S_KV


def unfit(q, k, v, *, chunk: int) -> str | None:
    """Why the kernel cannot take a call."""
    return lanes.dtype_unfit(q=q, k=k, v=v) or lanes.chunk_unfit(chunk)


def delta_rule_tpu(q, k, v, beta, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.delta_rule` for shapes."""
    batch, tokens, heads, key_size = q.shape
    length = lanes.chunk_length(chunk, tokens)
    xs = (
        lanes.fold(q, length),
        lanes.fold(k, length),
        lanes.fold(v, length),
        lanes.fold_rows(beta, length),
        fold_decay(log_decay, length),
    )
    fixed = None if reset is None else lanes.documents(reset, length)
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    body = ChunkBody(jnp.promote_types(q.dtype, k.dtype), float(scale))
    plan = Plan(body, length, q.dtype, dispatch.current_target().interpreter)
    o_NLV, state = chunk_scan(plan, None, fixed, xs, state)
    state_BHKV = state.reshape(batch, heads, key_size, -1).astype(accumulation_dtype(q, k, v))
    return lanes.unfold(o_NLV, batch, tokens), state_BHKV
