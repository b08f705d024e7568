"""Attention kernels that others keep: splash attention (TPU), and cuDNN (GPU). By name only."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention.rule import Places, Rule

SPLASH_TOKENS = 128  # a block has as many


def splash_unfit(q, k, v, bias, positions, *, rule: Rule) -> str | None:
    """Why splash attention cannot take a call."""
    if positions:
        return "it has no `positions`"
    if bias is not None:
        return "it has no `bias`"
    if rule.window is not None and not rule.causal:
        return "its windows are causal"
    for name, count in (("T", q.shape[1]), ("J", k.shape[1])):
        if count % SPLASH_TOKENS:
            return f"{name}={count} must be a multiple of {SPLASH_TOKENS}"
    if k.shape[1] < q.shape[1]:
        return f"J={k.shape[1]} must be at least T={q.shape[1]}"
    return None


def attention_splash(
    rule: Rule, q_BTHK, k_BJGK, v_BJGV, slopes_H, sinks_H, queries: Places, keys: Places
):
    """Same as the reference, by jax.experimental.pallas.ops.tpu.splash_attention."""
    # Here, because the import takes longer than that of this package.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    del slopes_H
    kind = jnp.result_type(q_BTHK, k_BJGK, v_BJGV)
    shape = (q_BTHK.shape[1], k_BJGK.shape[1])
    offset = rule.offset or 0
    mask: splash.Mask
    if rule.window is not None:
        mask = splash.LocalMask(shape, (rule.window - 1, 0), offset)
    else:
        mask = splash.CausalMask(shape, offset) if rule.causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * q_BTHK.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes.get_default(),
        attn_logits_soft_cap=rule.logit_cap,
        interpret=dispatch.current_target().interpreter is not None,
    )
    q_BHTK, k_BGJK, v_BGJV = (
        jnp.swapaxes(x.astype(kind), 1, 2) for x in (rule.scale * q_BTHK, k_BJGK, v_BJGV)
    )
    ids = None
    if queries.segment_BT is not None and keys.segment_BT is not None:
        # A key of negative id is seen by nobody, a query of negative id included.
        ids = splash.SegmentIds(
            jnp.maximum(queries.segment_BT, -1).astype(jnp.int32),
            jnp.where(keys.segment_BT < 0, -2, keys.segment_BT).astype(jnp.int32),
        )
    o_BHTV = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q_BHTK, k_BGJK, v_BGJV, ids, sinks_H)
    return jnp.swapaxes(o_BHTV, 1, 2).astype(q_BTHK.dtype)


def cudnn_unfit(q, k, v, bias, sinks, positions, segment_ids, *, rule: Rule) -> str | None:
    """Why cuDNN cannot take a call."""
    if rule.logit_cap is not None or sinks is not None:
        return "it has no `logit_cap` and no `sinks`"
    if positions or segment_ids:
        return "it has no `positions` and no `segment_ids`"
    if bias is not None:
        return "it has no `bias` by slopes"
    if rule.window is not None and not rule.causal:
        return "its windows are causal"
    if rule.causal and q.shape[1] != k.shape[1]:
        return f"T={q.shape[1]} must be J={k.shape[1]} where attention is causal"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return f"{name} has dtype {x.dtype}; it must be bfloat16 or float16"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"K={q.shape[-1]} and V={v.shape[-1]} must be equal, a multiple of 8, at most 128"
    return None


def attention_cudnn(
    rule: Rule, q_BTHK, k_BJGK, v_BJGV, slopes_H, sinks_H, queries: Places, keys: Places
):
    """Same as the reference, by jax.nn.dot_product_attention."""
    del slopes_H, sinks_H, queries, keys
    window = None if rule.window is None else (rule.window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BJGK,
        v_BJGV,
        scale=rule.scale,
        is_causal=rule.causal,
        local_window_size=window,
        implementation="cudnn",
    )
