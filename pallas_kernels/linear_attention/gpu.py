"""Gated linear attention on a Hopper GPU, forward and backward, by `walk_gpu`.

Forward is one walk. So is each gradient: with cotangents dO and dS' the same sums are

    dq_i = scale (sum_{j <= i} pair_ij (do_i . v_j) k_j + enter_i S do_i)       a, b, c = do, v, k
    dv_j = scale (sum_{i >= j} pair_ij (k_j . q_i) do_i + leave_j RT k_j)       a, b, c = k, q, do
    dk_j = scale (sum_{i >= j} pair_ij (v_j . do_i) q_i + leave_j R v_j)        a, b, c = v, do, q

where R = dS' / scale, and the last two walk backward. With q_i . dq_i = o_i . do_i and k_j . dk_j =
v_j . dv_j, `chunk_gates_gpu` sums the gradient of the decay. Where lanes are few, each is cut in
segments that are walked at once, from states that a first walk over keys and values has summed.
Where the decay is one a channel, it is `gpu_channels` that runs.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, lanes
from pallas_kernels.chunk_gates_gpu import decay_gradient, flat, gates_of, row_products
from pallas_kernels.linear_attention.gpu_channels import attention_by_channel
from pallas_kernels.parts_gpu import in_value_parts, in_whole_tiles, part_size, size_unfit
from pallas_kernels.walk_gpu import COLUMNS, Heads, walk
from pallas_kernels.warpgroup_gpu import CHUNK, ENTER, SIZES, card_unfit, dtype_unfit

BLOCKS = 528  # of threads: four for each of 132 processors, which hold two at a time
LEAST_CHUNKS = 4  # a segment


def linear_attention_gpu(q, k, v, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.linear_attention` for shapes.

    Chunks are of 64 tokens, whatever `chunk` is.
    """
    del chunk
    if log_decay is None or log_decay.ndim == 3:

        def run(*args):
            return _attention(float(scale), *args, reset)

        return in_whole_tiles(run, q, k, v, log_decay, initial_state)

    def by_channel(q, k, log_decay, v, state):
        return attention_by_channel(float(scale), q, k, v, log_decay, state, reset)

    def in_parts(q, k, v, log_decay, state):
        return in_value_parts(by_channel, (q, k, log_decay), v, state)

    return in_whole_tiles(in_parts, q, k, v, log_decay, initial_state)


def unfit(q, k, v, log_decay, *, scale: float | None) -> str | None:
    """Why the kernel cannot take a call."""
    if scale == 0:
        return "scale=0 has no cotangent of the state"
    by_channel = log_decay is not None and log_decay.ndim == 4
    return (
        size_unfit(q, v, SIZES[-1] if by_channel else None)
        or dtype_unfit(q=q, k=k, v=v)
        or card_unfit()
    )


def heads_in_parts(q, v) -> Heads:
    """Parts of 128 channels, or of 64."""
    parts = (x.shape[3] // part_size(x.shape[3]) for x in (q, v))
    return Heads(v.shape[2], q.shape[2], *parts)


def segments_of(lanes_: int, chunks: int, value_size: int) -> int:
    """Segments a lane, so that every processor has work."""
    wanted = BLOCKS // (lanes_ * (value_size // COLUMNS))
    segments = max(1, min(wanted, chunks // LEAST_CHUNKS))
    return -(-chunks // -(-chunks // segments))


def _through(gates, batch, heads: Heads, segments):
    """Factor on a state that crosses a segment, `[N, S]`."""
    if gates is None:
        return jnp.ones((batch * heads.lanes, segments), jnp.float32)
    through_NM = gates[:, :, ENTER, -1]
    per_segment = -(-through_NM.shape[1] // segments)
    rest = segments * per_segment - through_NM.shape[1]
    through_NM = jnp.pad(through_NM, ((0, 0), (0, rest)), constant_values=1)
    through_NS = jnp.prod(through_NM.reshape(-1, segments, per_segment), -1)
    return jnp.repeat(through_NS, heads.lanes // heads.heads, 0)


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


def _to_parts(state_BHKV, heads: Heads):
    """`[B, H, K, V]` to lanes of parts `[N, k, v]`."""
    batch, count, key_size, value_size = state_BHKV.shape
    k, v = heads.key_parts, heads.value_parts
    parts = state_BHKV.astype(jnp.float32).reshape(batch, count, k, key_size // k, v, -1)
    return jnp.swapaxes(parts, 3, 4).reshape(batch * heads.lanes, key_size // k, value_size // v)


def _from_parts(state_NKV, heads: Heads):
    _, key_size, value_size = state_NKV.shape
    k, v = heads.key_parts, heads.value_parts
    parts = state_NKV.reshape(-1, heads.heads, k, v, key_size, value_size)
    return jnp.swapaxes(parts, 3, 4).reshape(-1, heads.heads, k * key_size, v * value_size)


def _joined(x_BLF, heads: Heads, tokens: int, role: str):
    """Sums over what a role does not tell apart: `[B, T, H, V]` ("v") or `[B, T, G, K]` ("k")."""
    share = heads.heads // heads.groups
    shape = (heads.groups, share, heads.key_parts, heads.value_parts)
    over = [n for n, length in ((3, share), (5, shape[3])) if length > 1] if role == "k" else []
    if role == "v" and heads.key_parts > 1:
        over = [4]
    x = x_BLF.reshape(*x_BLF.shape[:2], *shape, -1)[:, :tokens]
    if over:
        x = jnp.sum(x, over, dtype=jnp.float32).astype(x_BLF.dtype)
    return x.reshape(*x.shape[:2], heads.groups if role == "k" else heads.heads, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, *inputs):
    return _forward(scale, *inputs)[0]


def _forward(scale, q, k, v, log_decay, initial_state, reset):
    batch, tokens, _, key_size = q.shape
    value_size = v.shape[3]
    heads = heads_in_parts(q, v)
    q_, k_, v_ = (flat(x) for x in (q, k, v))
    gates = gates_of(log_decay, reset, batch, heads.heads, q_.shape[1])
    state = lanes.fold_state(initial_state, batch, heads.heads, key_size, value_size, like=q)
    state = _to_parts(state.reshape(batch, heads.heads, key_size, value_size), heads)
    segments = segments_of(len(state), q_.shape[1] // CHUNK, state.shape[2])
    interpreter = dispatch.current_target().interpreter
    run = partial(walk, heads=heads, segments=segments, interpreter=interpreter)
    added = None
    if segments > 1:
        _, added = run(None, k_, v_, gates, None, roles="kv", scale=1.0)
    through = _through(gates, batch, heads, segments)
    starts = _starts(added, through, state, reverse=False)
    o, ends = run(q_, k_, v_, gates, starts, roles="kkv", scale=scale)
    o = _joined(o, heads, tokens, "v").astype(q.dtype)
    residuals = (q, k, v, log_decay, initial_state, reset, gates, o, starts, ends)
    return (o, _from_parts(ends[:, -1], heads)), residuals


def _backward(scale, residuals, cotangents):
    q, k, v, log_decay, initial_state, reset, gates, o, starts, ends = residuals
    d_o, d_last = cotangents
    batch, tokens = q.shape[:2]
    heads, segments = heads_in_parts(q, v), starts.shape[1]
    q_, k_, v_, d_o_ = (flat(x) for x in (q, k, v, d_o.astype(q.dtype)))
    interpreter = dispatch.current_target().interpreter
    run = partial(walk, heads=heads, segments=segments, scale=scale, interpreter=interpreter)
    swap = partial(jnp.swapaxes, axis1=-1, axis2=-2)

    d_q, _ = run(d_o_, v_, k_, gates, swap(starts), roles="vvk")
    added = None
    if segments > 1:
        _, added = run(None, q_, d_o_, gates, None, roles="kv", reverse=True)
    through = _through(gates, batch, heads, segments)
    d_ends = _starts(added, through, _to_parts(d_last, heads) / scale, reverse=True)
    d_v, d_starts = run(k_, q_, d_o_, gates, d_ends, roles="kkv", reverse=True)
    d_k, _ = run(v_, d_o_, q_, gates, swap(d_ends), roles="vvk", reverse=True)
    d_q, d_k = (_joined(x, heads, tokens, "k") for x in (d_q, d_k))
    d_v = _joined(d_v, heads, tokens, "v")

    d_log_decay = d_initial = None
    if log_decay is not None:
        along = row_products(d_o, o) - row_products(d_v, v)
        ahead = scale * jnp.sum(ends * d_ends, (-1, -2))
        ahead = jnp.sum(ahead.reshape(batch, heads.heads, -1, segments), 2)
        d_log_decay = decay_gradient(along, log_decay, reset, ahead)
    if initial_state is not None:
        d_initial = _from_parts(scale * d_starts[:, 0], heads).astype(initial_state.dtype)
    return d_q, d_k, d_v, d_log_decay, d_initial, None


_attention.defvjp(_forward, _backward)
