"""Blockwise attention, plain JAX: rows of queries, never an array of all queries by all keys.

The keys are two parts: those in front of the segment (a cache) and those of the segment. The first
is skipped at run time, forward and backward, while no key in it can be seen. Few rows are unrolled,
each against the keys that it may see; many run in one compiled loop, over the key blocks that they
may see.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import rows
from pallas_kernels.attention.rule import Places, Rule
from pallas_kernels.attention.tile import LOWEST, Tile, TileGradients, merge
from pallas_kernels.products import accumulation_dtype


def attention_chunked(
    rule: Rule,
    q_BTHK: jax.Array,
    k_BJGK: jax.Array,
    v_BJGV: jax.Array,
    slopes_H: jax.Array | None,
    queries: Places,
    keys: Places,
) -> jax.Array:
    """Same as the reference."""
    batch, tokens, heads, key_size = q_BTHK.shape
    groups = k_BJGK.shape[2]
    dtype = jnp.result_type(q_BTHK, k_BJGK, v_BJGV)
    q_BTGRK = q_BTHK.astype(dtype).reshape(batch, tokens, groups, heads // groups, key_size)
    slopes_GR = None
    if slopes_H is not None:
        slopes_GR = slopes_H.astype(accumulation_dtype(q_BTGRK)).reshape(groups, heads // groups)
    o_BGRTV = _attention(
        rule,
        jnp.transpose(q_BTGRK, (0, 2, 3, 1, 4)),
        jnp.swapaxes(k_BJGK.astype(dtype), 1, 2),
        jnp.swapaxes(v_BJGV.astype(dtype), 1, 2),
        slopes_GR,
        queries,
        keys,
    )
    o_BTGRV = jnp.transpose(o_BGRTV, (0, 3, 1, 2, 4))
    return o_BTGRV.reshape(batch, tokens, heads, v_BJGV.shape[-1]).astype(q_BTHK.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys):
    return _forward(rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys)[0]


def _forward(rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys):
    whole = Tile(q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys)
    start = _segment_start(whole)
    segment_rule, segment = _key_range(rule, whole, start, k_BGJK.shape[2])
    out = rows.forward(segment_rule, segment)
    if start > 0:
        prefix_rule, prefix = _key_range(rule, whole, 0, start)
        nothing = (jnp.zeros_like(out[0]), jnp.full_like(out[1], LOWEST))
        compute = functools.partial(rows.forward, prefix_rule, prefix)
        out = merge(_if_any_seen(prefix.keys, compute, nothing), out)
    o_BGRTV, lse_BGRT1 = out
    o_BGRTV = o_BGRTV.astype(q_BGRTK.dtype)
    return o_BGRTV, (whole, o_BGRTV, lse_BGRT1)


def _backward(rule, residuals, d_o_BGRTV):
    whole, o_BGRTV, lse_BGRT1 = residuals
    dtype = accumulation_dtype(o_BGRTV)
    dot_BGRT1 = jnp.sum(d_o_BGRTV.astype(dtype) * o_BGRTV.astype(dtype), axis=-1, keepdims=True)
    cotangent = (lse_BGRT1, dot_BGRT1, d_o_BGRTV)
    start = _segment_start(whole)
    segment_rule, segment = _key_range(rule, whole, start, whole.k_BGJK.shape[2])
    gradients = rows.backward(segment_rule, segment, *cotangent)
    if start > 0:
        prefix_rule, prefix = _key_range(rule, whole, 0, start)
        compute = functools.partial(rows.backward, prefix_rule, prefix, *cotangent)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute))
        earlier = _if_any_seen(prefix.keys, compute, nothing)
        gradients = TileGradients(
            earlier.q_BGRCK + gradients.q_BGRCK,
            jnp.concatenate([earlier.k_BGJK, gradients.k_BGJK], axis=2),
            jnp.concatenate([earlier.v_BGJV, gradients.v_BGJV], axis=2),
            None if whole.slopes_GR is None else earlier.slopes_GR + gradients.slopes_GR,
        )
    d_q, d_k, d_v = (x.astype(whole.q_BGRCK.dtype) for x in gradients[:3])
    return d_q, d_k, d_v, gradients.slopes_GR, None, None


_attention.defvjp(_forward, _backward)


def _segment_start(whole: Tile) -> int:
    """Index of the first key that belongs to the segment itself."""
    return max(whole.k_BGJK.shape[2] - whole.q_BGRCK.shape[3], 0)


def _key_range(rule: Rule, whole: Tile, start: int, stop: int) -> tuple[Rule, Tile]:
    part = whole._replace(
        k_BGJK=whole.k_BGJK[:, :, start:stop],
        v_BGJV=whole.v_BGJV[:, :, start:stop],
        keys=whole.keys.cut(start, stop),
    )
    offset = None if rule.offset is None else rule.offset - start
    return rule._replace(offset=offset), part


def _if_any_seen(keys: Places, compute, nothing):
    if keys.segment_BT is None:
        return compute()
    return lax.cond(jnp.any(keys.segment_BT >= 0), compute, lambda: nothing)
