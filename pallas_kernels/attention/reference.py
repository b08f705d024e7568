"""Softmax attention as one masked softmax: the definition."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.rule import Places, Rule, capped, distance, visible
from pallas_kernels.products import accumulation_dtype


def attention_reference(
    rule: Rule,
    q_BTHK: jax.Array,
    k_BJGK: jax.Array,
    v_BJGV: jax.Array,
    slopes_H: jax.Array | None,
    sinks_H: jax.Array | None,
    queries: Places,
    keys: Places,
) -> jax.Array:
    """o_t = sum_j softmax_j(cap(scale q_t . k_j) - slope (position_t - position_j)) v_j, j seen."""
    dtype = accumulation_dtype(q_BTHK, k_BJGK, v_BJGV)
    group = q_BTHK.shape[2] // k_BJGK.shape[2]
    k_BJHK = jnp.repeat(k_BJGK, group, axis=2).astype(dtype)
    v_BJHV = jnp.repeat(v_BJGV, group, axis=2).astype(dtype)
    precision = lax.Precision.HIGHEST
    scores_BHTJ = jnp.einsum("bthk,bjhk->bhtj", q_BTHK.astype(dtype), k_BJHK, precision=precision)
    scores_BHTJ, _ = capped(rule, scores_BHTJ * rule.scale)
    if slopes_H is not None:
        slopes_H11 = slopes_H.astype(dtype)[:, None, None]
        scores_BHTJ = scores_BHTJ - slopes_H11 * distance(queries, keys)[:, None]
    seen_BTJ = visible(rule, queries, keys)
    seen_BHTJ = jnp.array(True) if seen_BTJ is None else seen_BTJ[:, None]
    scores_BHTJ = jnp.where(seen_BHTJ, scores_BHTJ, -1e30)
    largest_BHT1 = jnp.max(scores_BHTJ, axis=-1, keepdims=True)
    if sinks_H is not None:
        sinks_H11 = sinks_H.astype(dtype)[:, None, None]
        largest_BHT1 = jnp.maximum(largest_BHT1, sinks_H11)
    largest_BHT1 = lax.stop_gradient(largest_BHT1)
    weights_BHTJ = jnp.where(seen_BHTJ, jnp.exp(scores_BHTJ - largest_BHT1), 0)
    total_BHT1 = jnp.sum(weights_BHTJ, axis=-1, keepdims=True)
    if sinks_H is not None:
        total_BHT1 = total_BHT1 + jnp.exp(sinks_H11 - largest_BHT1)
    weights_BHTJ = weights_BHTJ / jnp.where(total_BHT1 > 0, total_BHT1, 1)
    o_BTHV = jnp.einsum("bhtj,bjhv->bthv", weights_BHTJ, v_BJHV, precision=precision)
    return o_BTHV.astype(q_BTHK.dtype)
