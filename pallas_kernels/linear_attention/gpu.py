"""Gated linear attention on a Hopper GPU, forward and backward, by `walk_gpu`.

Forward is one walk. So is each gradient: with cotangents dO and dS' the same sums are

    dq_i = scale (sum_{j <= i} pair_ij (do_i . v_j) k_j + enter_i S do_i)       a, b, c = do, v, k
    dv_j = scale (sum_{i >= j} pair_ij (k_j . q_i) do_i + leave_j RT k_j)       a, b, c = k, q, do
    dk_j = scale (sum_{i >= j} pair_ij (v_j . do_i) q_i + leave_j R v_j)        a, b, c = v, do, q

where R = dS' / scale, and the last two walk backward. With q_i . dq_i = o_i . do_i and k_j . dk_j =
v_j . dv_j, `chunk_gates_gpu` sums the gradient of the decay. Where lanes are few, each is cut in
segments that are walked at once, from states that a first walk over keys and values has summed.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import chunk_gates_gpu, dispatch, lanes
from pallas_kernels.chunk_gates_gpu import decay_gradient, flat, gates_of, heads_of, row_products
from pallas_kernels.walk_gpu import COLUMNS, walk
from pallas_kernels.warpgroup_gpu import CHUNK, ENTER

BLOCKS = 528  # of threads: four for each of 132 processors, which hold two at a time
LEAST_CHUNKS = 4  # a segment


def linear_attention_gpu(q, k, v, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.linear_attention` for shapes.

    Chunks are of 64 tokens, whatever `chunk` is.
    """
    del chunk
    return _attention(float(scale), q, k, v, log_decay, initial_state, reset)


def unfit(q, k, v, log_decay, *, scale: float | None) -> str | None:
    """Why the kernel cannot take a call."""
    reason = chunk_gates_gpu.unfit(q, k, v, log_decay)
    return "scale=0 has no cotangent of the state" if scale == 0 and reason is None else reason


def segments_of(lanes_: int, chunks: int, value_size: int) -> int:
    """Segments a lane, so that every processor has work."""
    wanted = BLOCKS // (lanes_ * (value_size // COLUMNS))
    segments = max(1, min(wanted, chunks // LEAST_CHUNKS))
    return -(-chunks // -(-chunks // segments))


def _through(gates, count, segments):
    """Factor on a state that crosses a segment, `[N, S]`."""
    if gates is None:
        return jnp.ones((count, segments), jnp.float32)
    through_NM = gates[:, :, ENTER, -1]
    per_segment = -(-through_NM.shape[1] // segments)
    rest = segments * per_segment - through_NM.shape[1]
    through_NM = jnp.pad(through_NM, ((0, 0), (0, rest)), constant_values=1)
    return jnp.prod(through_NM.reshape(count, segments, per_segment), -1)


def _starts(increments_NSKV, through_NS, state_NKV, *, reverse):
    """The state that enters each segment, from what each adds."""
    segments = through_NS.shape[1]
    if segments == 1:
        return state_NKV[:, None]
    if reverse:
        increments_NSKV, through_NS = increments_NSKV[:, ::-1], through_NS[:, ::-1]
    parts = jnp.concatenate([state_NKV[:, None], increments_NSKV[:, :-1]], 1)
    to, since, at = (
        jnp.arange(segments).reshape(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    )
    crossed = (at >= since) & (at < to)  # part `since` enters segment `since`
    weight = jnp.prod(jnp.where(crossed, through_NS[:, None, None, :], 1), -1)
    weight = jnp.where((since <= to)[..., 0], weight, 0)
    starts = jnp.einsum("nst,ntkv->nskv", weight, parts, precision="highest")
    return starts[:, ::-1] if reverse else starts


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, *inputs):
    return _forward(scale, *inputs)[0]


def _forward(scale, q, k, v, log_decay, initial_state, reset):
    batch, tokens, groups, key_size = q.shape
    heads, value_size = v.shape[2:]
    interpreter = dispatch.current_target().interpreter
    q_, k_, v_ = (flat(x) for x in (q, k, v))
    gates = gates_of(log_decay, reset, batch, heads, q_.shape[1])
    state = lanes.fold_state(initial_state, batch, heads, key_size, value_size, like=q)
    segments = segments_of(batch * heads, q_.shape[1] // CHUNK, value_size)
    run = partial(walk, segments=segments, interpreter=interpreter)
    added = None
    if segments > 1:
        sizes = (groups, groups, heads, heads)
        _, added = run(None, k_, v_, gates, None, heads=sizes, scale=1.0)
    starts = _starts(added, _through(gates, batch * heads, segments), state, reverse=False)
    o, ends = run(q_, k_, v_, gates, starts, heads=(groups, groups, heads, heads), scale=scale)
    last = ends[:, -1].reshape(batch, heads, key_size, value_size)
    o = heads_of(o, heads, tokens).astype(q.dtype)
    return (o, last), (q, k, v, log_decay, initial_state, reset, gates, o, starts, ends)


def _backward(scale, residuals, cotangents):
    q, k, v, log_decay, initial_state, reset, gates, o, starts, ends = residuals
    d_o, d_last = cotangents
    batch, tokens, groups, _ = q.shape
    heads = v.shape[2]
    q_, k_, v_, d_o_ = (flat(x) for x in (q, k, v, d_o.astype(q.dtype)))
    segments = starts.shape[1]
    run = partial(walk, segments=segments, interpreter=dispatch.current_target().interpreter)
    swap = partial(jnp.swapaxes, axis1=-1, axis2=-2)

    d_q, _ = run(
        d_o_, v_, k_, gates, swap(starts), heads=(heads, heads, groups, heads), scale=scale
    )
    from_last = d_last.astype(jnp.float32).reshape(batch * heads, *d_last.shape[2:]) / scale
    sizes, added = (groups, groups, heads, heads), None
    if segments > 1:
        _, added = run(None, q_, d_o_, gates, None, heads=sizes, scale=1.0, reverse=True)
    through = _through(gates, batch * heads, segments)
    d_ends = _starts(added, through, from_last, reverse=True)
    d_v, d_starts = run(k_, q_, d_o_, gates, d_ends, heads=sizes, scale=scale, reverse=True)
    sizes = (heads, heads, groups, heads)
    d_k, _ = run(v_, d_o_, q_, gates, swap(d_ends), heads=sizes, scale=scale, reverse=True)

    d_q, d_k, d_v = (heads_of(x, heads, tokens) for x in (d_q, d_k, d_v))
    d_log_decay = d_initial = None
    if log_decay is not None:
        along = row_products(d_o, o) - row_products(d_v, v)
        ahead = scale * jnp.sum(ends * d_ends, (-1, -2)).reshape(batch, heads, segments)
        d_log_decay = decay_gradient(along, log_decay, reset, ahead)
    if initial_state is not None:
        d_initial = (
            (scale * d_starts[:, 0]).reshape(initial_state.shape).astype(initial_state.dtype)
        )

    def by_group(x):
        shape = (batch, tokens, groups, heads // groups, -1)
        return (
            jnp.sum(x.reshape(shape), 3, dtype=jnp.float32).astype(x.dtype) if groups < heads else x
        )

    return by_group(d_q), by_group(d_k), d_v, d_log_decay, d_initial, None


_attention.defvjp(_forward, _backward)
