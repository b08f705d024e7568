"""Gated linear attention with a decay a key channel on a Hopper GPU, forward and backward.

Forward: `pairs` (P and the decayed Q and K of all chunks at once), `walk_states` (in order),
`read_states` (outputs, all at once). P is kept for the backward pass, which computes the rest
again, walks backward for the cotangents of the states, R = dS' / c, and makes all else of all
chunks at once: dV = c (PT dO + K_leave R), and by `pair_gradients` dQ, dK and dg.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, lanes
from pallas_kernels.chunk_gates_gpu import flat, heads_of
from pallas_kernels.chunks import LOG_DECAY_FLOOR
from pallas_kernels.linear_attention.gpu_pairs import pair_gradients, pairs
from pallas_kernels.linear_attention.gpu_states import read_states, walk_states
from pallas_kernels.warpgroup_gpu import CHUNK


def parts_of_decay(log_decay_BTHK: jax.Array, reset: jax.Array | None):
    """g of all tokens in two bfloat16 parts `[B, L, H K]`, and e^(sum of a chunk) `[N, M, K]`.

    Padding does not decay. A reset is a decay that nothing survives.
    """
    g = jnp.maximum(log_decay_BTHK.astype(jnp.float32), LOG_DECAY_FLOOR)
    if reset is not None:
        g = jnp.where(reset[..., None, None], LOG_DECAY_FLOOR, g)
    batch, _, heads, size = g.shape
    g_BLF = flat(g)
    # Not by casts to and fro, which XLA may drop: nothing would be left for the second part.
    high = lax.reduce_precision(g_BLF, exponent_bits=8, mantissa_bits=7)
    high, low = (x.astype(jnp.bfloat16) for x in (high, g_BLF - high))
    sums_BMHK = jnp.sum(g_BLF.reshape(batch, -1, CHUNK, heads, size), 2)
    through = jnp.exp(jnp.swapaxes(sums_BMHK, 1, 2)).reshape(batch * heads, -1, size)
    return (high, low), through


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_by_channel(scale, *inputs):
    """o and the last state of q, k, v, log_decay `[B, T, H, K]`, initial_state and reset."""
    return _forward(scale, *inputs)[0]


def _forward(scale, q, k, v, log_decay, initial_state, reset):
    batch, tokens, heads, key_size = q.shape
    q_, k_, v_ = (flat(x) for x in (q, k, v))
    g, through = parts_of_decay(log_decay, reset)
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    settings = {"heads": heads, "interpreter": dispatch.current_target().interpreter}
    entering, leaving, weights = pairs(q_, k_, g, products=True, **settings)
    states, last = walk_states(leaving, v_, through, state, reverse=False, **settings)
    o = read_states(weights, v_, entering, states, scale=scale, reverse=False, **settings)
    residuals = (q, k, v, log_decay, initial_state, reset, weights)
    return (heads_of(o, heads, tokens), last.reshape(batch, heads, key_size, -1)), residuals


def _backward(scale, residuals, cotangents):
    q, k, v, log_decay, initial_state, reset, weights = residuals
    d_o, d_last = cotangents
    batch, tokens, heads, key_size = q.shape
    q_, k_, v_, d_o_ = (flat(x) for x in (q, k, v, d_o.astype(q.dtype)))
    g, through = parts_of_decay(log_decay, reset)
    state = lanes.fold_state(initial_state, batch, heads, key_size, v.shape[-1], like=q)
    settings = {"heads": heads, "interpreter": dispatch.current_target().interpreter}
    entering, leaving = pairs(q_, k_, g, products=False, **settings)
    states, _ = walk_states(leaving, v_, through, state, reverse=False, **settings)
    d_last = d_last.astype(jnp.float32).reshape(state.shape) / scale
    behind, d_state = walk_states(entering, d_o_, through, d_last, reverse=True, **settings)
    d_v = read_states(weights, d_o_, leaving, behind, scale=scale, reverse=True, **settings)
    d_q, d_k, d_g = pair_gradients(
        q_, k_, g, v_, d_o_, states, behind, through, scale=scale, **settings
    )
    d_q, d_k, d_v, d_g = (heads_of(x, heads, tokens) for x in (d_q, d_k, d_v, d_g))
    d_log_decay = d_g.astype(log_decay.dtype)
    d_initial = None
    if initial_state is not None:
        d_initial = (scale * d_state).reshape(initial_state.shape).astype(initial_state.dtype)
    return d_q, d_k, d_v, d_log_decay, d_initial, None


attention_by_channel.defvjp(_forward, _backward)
