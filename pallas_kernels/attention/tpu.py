"""Blockwise attention on a TPU: a forward kernel, one for d q and one for d k and d v.

The grid is (lanes, blocks of queries, blocks of keys), the last in order, with the running maximum,
sum and output in VMEM; for d k and d v it is (key heads, blocks of keys, blocks of queries of every
query head that reads them). Blocks that the rule hides by position are not computed, nor fetched.
Per-query numbers are kept as rows, because a column of one lane is 128 wide in memory.

    s = cap(scale q kT) - slope distance;  p = exp(s - lse);  o = p v
    d p = d o vT;  d s = p (d p - o . d o);  d l = cap' d s;  d q = scale d l k;  d k = scale d lT q
    d v = pT d o

Source: arXiv:2307.08691 (both passes), arXiv:2112.05682 (memory).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, lanes
from pallas_kernels.attention.rule import Places, Rule
from pallas_kernels.attention.sinks import add_sinks, sink_gradients
from pallas_kernels.attention.tile import LOWEST
from pallas_kernels.attention.tpu_layout import (
    Arrays,
    Layout,
    compiler,
    from_rows,
    is_seen,
    numbers_spec,
    pad,
    prepare,
    quotient,
    row_spec,
    scores,
    specs,
    to_rows,
)
from pallas_kernels.tile_math import as_column, as_row, columns_dot_columns, dot, rows_dot_rows


def unfit(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why the kernel cannot take a call."""
    return lanes.dtype_unfit(q=q, k=k, v=v)


def attention_tpu(
    rule: Rule, q_BTHK, k_BJGK, v_BJGV, slopes_H, sinks_H, queries: Places, keys: Places
):
    """Same as the reference."""
    batch, tokens, heads, size = q_BTHK.shape
    groups = k_BJGK.shape[2]
    kind = jnp.result_type(q_BTHK, k_BJGK, v_BJGV)
    q_BTGRK = q_BTHK.astype(kind).reshape(batch, tokens, groups, heads // groups, size)
    q_BGRTK = jnp.transpose(q_BTGRK, (0, 2, 3, 1, 4))
    k_BGJK, v_BGJV = (jnp.swapaxes(x.astype(kind), 1, 2) for x in (k_BJGK, v_BJGV))
    slopes_GR, sinks_GR = (
        None if x is None else x.astype(jnp.float32).reshape(groups, -1)
        for x in (slopes_H, sinks_H)
    )
    o_BGRTV = _attention(rule, sinks_GR, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys)
    o_BTGRV = jnp.transpose(o_BGRTV, (0, 3, 1, 2, 4))
    return o_BTGRV.reshape(batch, tokens, heads, -1).astype(q_BTHK.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(rule, sinks_GR, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys):
    inputs = (q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys)
    return _attention_forward(rule, sinks_GR, *inputs)[0]


def _attention_forward(rule, sinks_GR, q_BGRTK, *rest):
    o_BGRTV, lse_BGRT1 = add_sinks(*forward(rule, q_BGRTK, *rest), sinks_GR)
    o_BGRTV = o_BGRTV.astype(q_BGRTK.dtype)
    return o_BGRTV, (sinks_GR, q_BGRTK, *rest, o_BGRTV, lse_BGRT1)


def _attention_backward(rule, residuals, d_o_BGRTV):
    sinks_GR, *inputs, o_BGRTV, lse_BGRT1 = residuals
    products = d_o_BGRTV.astype(jnp.float32) * o_BGRTV.astype(jnp.float32)
    dot_BGRT1 = jnp.sum(products, axis=-1, keepdims=True)
    gradients = backward(rule, *inputs, lse_BGRT1, dot_BGRT1, d_o_BGRTV)
    d_q, d_k, d_v = (d.astype(x.dtype) for d, x in zip(gradients[:3], inputs))
    d_sinks = None if sinks_GR is None else sink_gradients(sinks_GR, lse_BGRT1, dot_BGRT1)
    return d_sinks, d_q, d_k, d_v, gradients[3], None, None


_attention.defvjp(_attention_forward, _attention_backward)


def forward(rule: Rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries: Places, keys: Places):
    """Output `[B, G, R, T, V]` and log-sum-exp `[B, G, R, T, 1]`, float32."""
    plan, arrays = prepare(rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys)
    count, like = arrays.q_NTK.shape[0], arrays.q_NTK
    size = v_BGJV.shape[-1]
    o_spec = row_spec(plan.row, size, lambda n, i, j: (n, i))
    o, lse = pl.pallas_call(
        partial(_forward_kernel, plan),
        grid=(count, plan.rows, plan.blocks),
        in_specs=[specs(plan, arrays, lambda n, i, j: (n, i, j))],
        out_specs=[o_spec, numbers_spec(plan, lambda n, i, j: (n, i))],
        out_shape=[
            compat.like((count, plan.rows * plan.row, size), jnp.float32, like),
            compat.like((count, plan.rows, 1, plan.row), jnp.float32, like),
        ],
        scratch_shapes=[
            pltpu.VMEM((plan.row, 1), jnp.float32),
            pltpu.VMEM((plan.row, 1), jnp.float32),
            pltpu.VMEM((plan.row, size), jnp.float32),
        ],
        name="attention_forward",
        **compiler(plan),
    )(arrays)
    tokens = q_BGRTK.shape[3]
    o_BGRTV = o[:, :tokens].reshape(*q_BGRTK.shape[:4], size)
    return o_BGRTV, from_rows(lse, tokens).reshape(*q_BGRTK.shape[:4], 1)


def backward(rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys, lse, dot_BGRT1, d_o):
    """d q, d k, d v and d slopes (None without slopes), float32."""
    plan, arrays = prepare(rule, q_BGRTK, k_BGJK, v_BGJV, slopes_GR, queries, keys)
    padded = plan.rows * plan.row
    d_o_NTV = pad(d_o.reshape(-1, *d_o.shape[3:]), padded)
    numbers = [to_rows(x, plan) for x in (lse, dot_BGRT1)]
    d_q, d_slope = _query_gradients(plan, arrays, d_o_NTV, *numbers)
    d_k, d_v = _key_gradients(plan, arrays, d_o_NTV, *numbers)
    tokens, count = q_BGRTK.shape[3], k_BGJK.shape[2]
    d_slopes_GR = None
    if slopes_GR is not None:
        d_slopes_GR = jnp.sum(d_slope.reshape(-1, *slopes_GR.shape, plan.rows), axis=(0, 3))
    return (
        d_q[:, :tokens].reshape(q_BGRTK.shape),
        d_k[:, :count].reshape(k_BGJK.shape),
        d_v[:, :count].reshape(v_BGJV.shape),
        d_slopes_GR,
    )


def _forward_kernel(plan: Layout, refs: Arrays, o_ref, lse_ref, most_ref, total_ref, sum_ref):
    i, j = pl.program_id(1), pl.program_id(2)

    @pl.when(j == 0)
    def _():
        most_ref[...] = jnp.full(most_ref.shape, LOWEST, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when(is_seen(plan, i, j))
    def _():
        tile = scores(plan, refs, i, j).scores
        before = most_ref[...]
        most = jnp.maximum(before, jnp.max(tile, axis=1, keepdims=True))
        weights, fade = jnp.exp(tile - most), jnp.exp(before - most)
        most_ref[...] = most
        total_ref[...] = total_ref[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
        sum_ref[...] = sum_ref[...] * fade + dot(weights, refs.v_MJV[...], plan.kind)

    @pl.when(j == plan.blocks - 1)
    def _():
        total = total_ref[...]
        total = jnp.where(total > 0, total, 1.0)
        o_ref[...] = sum_ref[...] / total
        lse_ref[...] = as_row(most_ref[...] + jnp.log(total))


def _score_gradients(plan: Layout, refs: Arrays, d_o_ref, lse_ref, dot_ref, i, j):
    """Weights, d scores (behind the cap), d logits (in front of it), and distances."""
    tile = scores(plan, refs, i, j)
    weights = jnp.exp(tile.scores - as_column(lse_ref[...]))
    d_weights = rows_dot_rows(d_o_ref[...], refs.v_MJV[...], plan.kind)
    d_scores = weights * (d_weights - as_column(dot_ref[...]))
    d_logits = d_scores if tile.steepness is None else d_scores * tile.steepness
    return weights, d_scores, d_logits, tile.distance


def _query_gradients(plan: Layout, arrays: Arrays, d_o_NTV, lse, dots):
    count = arrays.q_NTK.shape[0]

    def kernel(refs, d_o_ref, lse_ref, dot_ref, d_q_ref, d_slope_ref, d_q, d_slope):
        i, j = pl.program_id(1), pl.program_id(2)

        @pl.when(j == 0)
        def _():
            d_q[...] = jnp.zeros(d_q.shape, jnp.float32)
            d_slope[...] = jnp.zeros(d_slope.shape, jnp.float32)

        @pl.when(is_seen(plan, i, j))
        def _():
            _, d_scores, d_logits, distance = _score_gradients(
                plan, refs, d_o_ref, lse_ref, dot_ref, i, j
            )
            d_q[...] += plan.rule.scale * dot(d_logits, refs.k_MJK[...], plan.kind)
            if refs.slope_N11 is not None and distance is not None:
                pull = d_scores * distance.astype(jnp.float32)
                d_slope[...] -= jnp.sum(jnp.sum(pull, axis=1, keepdims=True), axis=0, keepdims=True)

        @pl.when(j == plan.blocks - 1)
        def _():
            d_q_ref[...] = d_q[...]
            d_slope_ref[...] = d_slope[...]

    def place(n, i, j):
        return n, i

    d_q, d_slope = pl.pallas_call(
        kernel,
        grid=(count, plan.rows, plan.blocks),
        in_specs=[
            specs(plan, arrays, lambda n, i, j: (n, i, j)),
            row_spec(plan.row, d_o_NTV.shape[2], place),
            numbers_spec(plan, place),
            numbers_spec(plan, place),
        ],
        out_specs=[
            row_spec(plan.row, arrays.q_NTK.shape[2], place),
            pl.BlockSpec((None, None, 1, 1), lambda n, i, j: (n, i, 0, 0)),
        ],
        out_shape=[
            compat.like(arrays.q_NTK.shape, jnp.float32, d_o_NTV),
            compat.like((count, plan.rows, 1, 1), jnp.float32, d_o_NTV),
        ],
        scratch_shapes=[
            pltpu.VMEM((plan.row, arrays.q_NTK.shape[2]), jnp.float32),
            pltpu.VMEM((1, 1), jnp.float32),
        ],
        name="attention_query_gradients",
        **compiler(plan),
    )(arrays, d_o_NTV, lse, dots)
    return d_q, d_slope


def _key_gradients(plan: Layout, arrays: Arrays, d_o_NTV, lse, dots):
    steps = plan.share * plan.rows

    def at(m, j, step):
        """Key head m, and its step-th block of queries, over the heads that read it."""
        head = quotient(step, plan.rows)
        return m * plan.share + head, step - head * plan.rows, j

    def kernel(refs, d_o_ref, lse_ref, dot_ref, d_k_ref, d_v_ref, d_k, d_v):
        j, step = pl.program_id(1), pl.program_id(2)
        i = at(0, j, step)[1]

        @pl.when(step == 0)
        def _():
            d_k[...] = jnp.zeros(d_k.shape, jnp.float32)
            d_v[...] = jnp.zeros(d_v.shape, jnp.float32)

        @pl.when(is_seen(plan, i, j))
        def _():
            weights, _, d_logits, _ = _score_gradients(plan, refs, d_o_ref, lse_ref, dot_ref, i, j)
            d_v[...] += columns_dot_columns(weights, d_o_ref[...], plan.kind)
            d_k[...] += plan.rule.scale * columns_dot_columns(d_logits, refs.q_NTK[...], plan.kind)

        @pl.when(step == steps - 1)
        def _():
            d_k_ref[...] = d_k[...]
            d_v_ref[...] = d_v[...]

    own = plan._replace(rule=plan.rule._replace(offset=None))  # a key block is never skipped here
    outs = [arrays.k_MJK, arrays.v_MJV]
    return pl.pallas_call(
        kernel,
        grid=(arrays.k_MJK.shape[0], plan.blocks, steps),
        in_specs=[
            specs(own, arrays, at),
            row_spec(plan.row, d_o_NTV.shape[2], lambda *g: at(*g)[:2]),
            numbers_spec(plan, lambda *g: at(*g)[:2]),
            numbers_spec(plan, lambda *g: at(*g)[:2]),
        ],
        out_specs=[row_spec(plan.block, x.shape[2], lambda m, j, step: (m, j)) for x in outs],
        out_shape=[compat.like(x.shape, jnp.float32, d_o_NTV) for x in outs],
        scratch_shapes=[pltpu.VMEM((plan.block, x.shape[2]), jnp.float32) for x in outs],
        name="attention_key_gradients",
        **compiler(plan),
    )(arrays, d_o_NTV, lse, dots)
