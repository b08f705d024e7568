"""Blockwise attention on a Hopper GPU, forward and backward: see `gpu_forward`, `gpu_backward`."""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.attention import gpu_backward, gpu_forward
from pallas_kernels.attention.gpu_blocks import flat, prepare
from pallas_kernels.attention.rule import Places, Rule
from pallas_kernels.attention.sinks import sink_gradients
from pallas_kernels.parts_gpu import widened
from pallas_kernels.warpgroup_gpu import SIZES, card_unfit, dtype_unfit

LEAST_TOKENS = 16


def unfit(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why the kernels cannot take a call."""
    for name, x in (("K", q), ("V", v)):
        if x.shape[-1] > SIZES[-1]:
            return f"{name}={x.shape[-1]} is more than {SIZES[-1]}"
    if q.shape[1] < LEAST_TOKENS:
        return f"T={q.shape[1]} queries would leave most of a block of 64 empty"
    return dtype_unfit(q=q, k=k, v=v) or card_unfit()


def attention_gpu(
    rule: Rule, q_BTHK, k_BJGK, v_BJGV, slopes_H, sinks_H, queries: Places, keys: Places
) -> jax.Array:
    """Same as the reference. Channels of zeros fill up K and V to the next of `SIZES`."""
    value_size = v_BJGV.shape[-1]
    q_BTHK, k_BJGK, v_BJGV = (_filled(x) for x in (q_BTHK, k_BJGK, v_BJGV))
    slopes_H, sinks_H = (None if x is None else x.astype(jnp.float32) for x in (slopes_H, sinks_H))
    o, _ = _attention(rule, q_BTHK, k_BJGK, v_BJGV, slopes_H, sinks_H, queries, keys)
    return o[..., :value_size]


def _filled(x: jax.Array) -> jax.Array:
    return widened(x, next(n for n in SIZES if n >= x.shape[-1]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule, *inputs):
    return _forward(rule, *inputs)[0]


def _forward(rule, q, k, v, slopes_H, sinks_H, queries, keys):
    """o, and the log-sum-exp `[B, H, T]` with the sinks, which has no gradient."""
    plan, arrays = prepare(rule, q, k, v, slopes_H, queries, keys)
    o_BLF, lse_NL = gpu_forward.forward(plan, arrays, slopes_H, sinks_H)
    batch, tokens, heads, _ = q.shape
    o = o_BLF[:, :tokens].reshape(batch, tokens, heads, -1)
    lse_BHT = lse_NL[:, :tokens].reshape(batch, heads, tokens)
    return (o, lse_BHT), (q, k, v, slopes_H, sinks_H, queries, keys, o, lse_NL)


def _backward(rule, residuals, cotangents):
    q, k, v, slopes_H, sinks_H, queries, keys, o, lse_NL = residuals
    d_o = cotangents[0].astype(q.dtype)
    plan, arrays = prepare(rule, q, k, v, slopes_H, queries, keys)
    (batch, tokens, heads, _), length = q.shape, lse_NL.shape[1]
    dot_BTH = jnp.sum(d_o.astype(jnp.float32) * o.astype(jnp.float32), -1)
    dot_BHT = jnp.swapaxes(dot_BTH, 1, 2)
    dot_NL = jnp.pad(dot_BHT.reshape(-1, tokens), ((0, 0), (0, length - tokens)))
    given = (plan, arrays, flat(d_o), lse_NL, dot_NL, slopes_H)
    d_q, d_slope_NL = gpu_backward.query_gradients(*given)
    d_k, d_v = gpu_backward.key_gradients(*given)
    d_q, d_k, d_v = (
        d[:, : x.shape[1]].reshape(x.shape) for d, x in zip((d_q, d_k, d_v), (q, k, v))
    )
    d_slopes = d_sinks = None
    if d_slope_NL is not None:
        d_slopes = jnp.sum(d_slope_NL.reshape(batch, heads, length), (0, 2))
    if sinks_H is not None:
        lse_BHT11 = lse_NL[:, :tokens].reshape(batch, heads, 1, tokens, 1)
        d_sinks = sink_gradients(sinks_H[:, None], lse_BHT11, dot_BHT[:, :, None, :, None])[:, 0]
    return d_q, d_k, d_v, d_slopes, d_sinks, None, None


_attention.defvjp(_forward, _backward)
