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

from pallas_kernels import compat
from pallas_kernels.attention import rows
from pallas_kernels.attention.rule import Places, Rule
from pallas_kernels.attention.sinks import add_sinks, sink_gradients
from pallas_kernels.attention.tile import LOWEST, Tile, merge
from pallas_kernels.products import accumulation_dtype
from pallas_kernels.sums import sum_of_products


def attention_chunked(
    rule: Rule,
    q_BTHK: jax.Array,
    k_BJGK: jax.Array,
    v_BJGV: jax.Array,
    slopes_H: jax.Array | None,
    sinks_H: jax.Array | None,
    queries: Places,
    keys: Places,
) -> jax.Array:
    """Same as the reference."""
    batch, tokens, heads, key_size = q_BTHK.shape
    groups = k_BJGK.shape[2]
    dtype = jnp.result_type(q_BTHK, k_BJGK, v_BJGV)
    q_BTGRK = q_BTHK.astype(dtype).reshape(batch, tokens, groups, heads // groups, key_size)
    slopes_GR, sinks_GR = (
        None if x is None else x.astype(accumulation_dtype(q_BTGRK)).reshape(groups, -1)
        for x in (slopes_H, sinks_H)
    )
    # Cut before heads are moved: XLA on CPU would move the heads of an empty cache too.
    # By `split`, since XLA can take its gradient apart again; those of slices come padded.
    cuts = [start for start, _ in _parts(tokens, k_BJGK.shape[1])[1:]]
    parts = tuple(
        (jnp.swapaxes(k.astype(dtype), 1, 2), jnp.swapaxes(v.astype(dtype), 1, 2))
        for k, v in zip(jnp.split(k_BJGK, cuts, 1), jnp.split(v_BJGV, cuts, 1), strict=True)
    )
    q_BGRTK = jnp.transpose(q_BTGRK, (0, 2, 3, 1, 4))
    o_BGRTV = _attention(rule, q_BGRTK, parts, slopes_GR, sinks_GR, queries, keys)
    o_BTGRV = jnp.transpose(o_BGRTV, (0, 3, 1, 2, 4))
    return o_BTGRV.reshape(batch, tokens, heads, v_BJGV.shape[-1]).astype(q_BTHK.dtype)


def _parts(tokens: int, keys: int) -> list[tuple[int, int]]:
    """Ranges of the keys: those of the cache, if any, and those of the segment."""
    start = max(keys - tokens, 0)
    return [(0, start), (start, keys)] if start else [(0, keys)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule, q_BGRTK, parts, slopes_GR, sinks_GR, queries, keys):
    return _forward(rule, q_BGRTK, parts, slopes_GR, sinks_GR, queries, keys)[0]


def _tiles(rule, q_BGRTK, parts, slopes_GR, queries, keys) -> list[tuple[Rule, Tile]]:
    """The queries against each part of the keys."""
    count = sum(k_BGJK.shape[2] for k_BGJK, _ in parts)
    tiles = []
    for (start, stop), (k_BGJK, v_BGJV) in zip(_parts(q_BGRTK.shape[3], count), parts, strict=True):
        offset = None if rule.offset is None else rule.offset - start
        tile = Tile(q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys.cut(start, stop))
        tiles.append((rule._replace(offset=offset), tile))
    return tiles


def _forward(rule, q_BGRTK, parts, slopes_GR, sinks_GR, queries, keys):
    *cache, segment = _tiles(rule, q_BGRTK, parts, slopes_GR, queries, keys)
    out = rows.forward(*segment)
    for prefix in cache:
        nothing = (jnp.zeros_like(out[0]), jnp.full_like(out[1], LOWEST))
        nothing = compat.vary_like(nothing, out[0])
        earlier = _if_any_seen(prefix[1].keys, functools.partial(rows.forward, *prefix), nothing)
        out = merge(earlier, out)
    o_BGRTV, lse_BGRT1 = add_sinks(*out, sinks_GR)
    o_BGRTV = o_BGRTV.astype(q_BGRTK.dtype)
    return o_BGRTV, (q_BGRTK, parts, slopes_GR, queries, keys, sinks_GR, o_BGRTV, lse_BGRT1)


def _backward(rule, residuals, d_o_BGRTV):
    *inputs, sinks_GR, o_BGRTV, lse_BGRT1 = residuals
    q_BGRTK, slopes_GR = inputs[0], inputs[2]
    dtype = accumulation_dtype(o_BGRTV)
    dot_BGRT1 = sum_of_products(d_o_BGRTV.astype(dtype), o_BGRTV.astype(dtype), -1)
    cotangent = (lse_BGRT1, dot_BGRT1, d_o_BGRTV)
    *cache, segment = _tiles(rule, *inputs)
    gradients = [rows.backward(*segment, *cotangent)]
    for prefix in cache:
        compute = functools.partial(rows.backward, *prefix, *cotangent)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute))
        nothing = compat.vary_like(nothing, q_BGRTK)
        gradients.insert(0, _if_any_seen(prefix[1].keys, compute, nothing))
    kind = q_BGRTK.dtype
    d_q = sum(part.q_BGRCK for part in gradients).astype(kind)
    d_parts = tuple((part.k_BGJK.astype(kind), part.v_BGJV.astype(kind)) for part in gradients)
    d_slopes = None if slopes_GR is None else sum(part.slopes_GR for part in gradients)
    d_sinks = None if sinks_GR is None else sink_gradients(sinks_GR, lse_BGRT1, dot_BGRT1)
    return d_q, d_parts, d_slopes, d_sinks, None, None


_attention.defvjp(_forward, _backward)


def _if_any_seen(keys: Places, compute, nothing):
    if keys.segment_BT is None:
        return compute()
    return lax.cond(jnp.any(keys.segment_BT >= 0), compute, lambda: nothing)
