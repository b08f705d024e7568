"""Gated linear attention in chunks where heads share queries and keys and differ in their decay.

The products of queries and keys are made once a group, and all values of a group are read and
written in one product: only the decays, and the products inside a chunk, are per head.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import chunks, products
from pallas_kernels.sums import scaled, sum_of_products


def linear_attention_grouped(q, k, v, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference for q, k `[B, T, G, K]` and one decay a head (or none).

    G groups of R heads each; F is the values of all heads of a group side by side.
    """
    batch, tokens, groups, key_size = q.shape
    heads, value_size = v.shape[2:]
    dtype = products.accumulation_dtype(q, k, v)
    length = chunks.chunk_length(chunk, tokens)
    decay = _by_group(chunks.chunk_decay(log_decay, reset, tokens, length, dtype), groups)
    gates = chunks.gates(decay)
    q_NBGCK, k_NBGCK = (chunks.split_chunks(x, length) for x in (q, k))
    v_NBGCF = chunks.split_chunks(v.reshape(batch, tokens, groups, -1), length)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_size, value_size), dtype)
    state_BGRKV = initial_state.astype(dtype).reshape(batch, groups, -1, key_size, value_size)
    state_BGKF = jnp.swapaxes(state_BGRKV, 2, 3).reshape(batch, groups, key_size, -1)

    written_NBGCF = _scale_values(v_NBGCF, gates.leave_NBHCK, heads // groups).astype(v.dtype)
    increment_NBGKF = products.columns_dot_columns(k_NBGCK, written_NBGCF)
    through_NBGR = jnp.broadcast_to(
        gates.through_NBHK1[..., 0, 0], (*k_NBGCK.shape[:3], heads // groups)
    )
    state_BGKF, entering_NBGKF = _states(state_BGKF, through_NBGR, increment_NBGKF)

    read_NBGCF = products.dot(q_NBGCK, entering_NBGKF.astype(q.dtype))
    scores_NBGRCC = chunks.decayed_products(q_NBGCK[:, :, :, None], k_NBGCK[:, :, :, None], decay)
    v_NBGCRV = v_NBGCF.reshape(*v_NBGCF.shape[:4], -1, value_size)
    inside_NBGCRV = _weigh(scores_NBGRCC.astype(v.dtype), v_NBGCRV)
    o_NBGCF = _scale_values(read_NBGCF, gates.enter_NBHCK, heads // groups)
    o_NBGCF = o_NBGCF + inside_NBGCRV.reshape(v_NBGCF.shape)
    o_BTGF = chunks.join_chunks((scale * o_NBGCF).astype(q.dtype), tokens)
    state_BGKRV = state_BGKF.reshape(batch, groups, key_size, -1, value_size)
    state_BHKV = jnp.swapaxes(state_BGKRV, 2, 3).reshape(batch, heads, key_size, value_size)
    return o_BTGF.reshape(v.shape), state_BHKV


def _by_group(decay: chunks.ChunkDecay, groups: int) -> chunks.ChunkDecay:
    """Heads in groups: `[N, B, G, R, C, 1]`, and `[N, B, 1, 1, C]`."""

    def split(sums_NBHC1: jax.Array) -> jax.Array:
        count, lanes, heads = sums_NBHC1.shape[:3]
        return sums_NBHC1.reshape(count, lanes, min(groups, heads), -1, *sums_NBHC1.shape[3:])

    coarse, fine, document = decay
    return chunks.ChunkDecay(
        split(coarse), split(fine), None if document is None else document[:, :, None]
    )


def _scale_values(x_NBGCF: jax.Array, gate_NBGRC1: jax.Array, heads: int) -> jax.Array:
    """The values of each head times its gate (one that all share, if R is 1)."""
    x_NBGCRV = x_NBGCF.reshape(*x_NBGCF.shape[:-1], heads, -1)
    return scaled(x_NBGCRV, jnp.swapaxes(gate_NBGRC1, -2, -3)).reshape(x_NBGCF.shape)


def _weigh(scores_NBGRCC: jax.Array, v_NBGCRV: jax.Array) -> jax.Array:
    shape = (*v_NBGCRV.shape[:3], v_NBGCRV.shape[4], *scores_NBGRCC.shape[-2:])
    return jnp.einsum(
        "nbgrij,nbgjrv->nbgirv",
        jnp.broadcast_to(scores_NBGRCC, shape),
        v_NBGCRV,
        preferred_element_type=products.accumulation_dtype(v_NBGCRV),
    )


@jax.custom_vjp
def _states(state_BGKF, through_NBGR, increment_NBGKF):
    """The state after the last chunk, and the states that enter each.

    The backward pass scans the cotangent of the state alone. The gradient of a decay is summed over
    its values first: sums over other axes than the last are ten times as slow in XLA on CPU.
    """

    def one_chunk(state_BGKF, gate_and_increment):
        through_BGR, increment_BGKF = gate_and_increment
        return _decay(through_BGR, state_BGKF) + increment_BGKF, state_BGKF

    return lax.scan(one_chunk, state_BGKF, (through_NBGR, increment_NBGKF))


def _decay(through_BGR: jax.Array, state_BGKF: jax.Array) -> jax.Array:
    values = state_BGKF.shape[-1] // through_BGR.shape[-1]
    return jnp.repeat(through_BGR, values, -1)[..., None, :] * state_BGKF


def _states_forward(state_BGKF, through_NBGR, increment_NBGKF):
    out = _states(state_BGKF, through_NBGR, increment_NBGKF)
    return out, (through_NBGR, out[1])


def _states_backward(residuals, cotangents):
    through_NBGR, entering_NBGKF = residuals
    d_state_BGKF, d_entering_NBGKF = cotangents

    def one_chunk(d_next_BGKF, xs):
        through_BGR, d_entering_BGKF = xs
        return _decay(through_BGR, d_next_BGKF) + d_entering_BGKF, d_next_BGKF

    d_state_BGKF, d_next_NBGKF = lax.scan(
        one_chunk, d_state_BGKF, (through_NBGR, d_entering_NBGKF), reverse=True
    )
    shape = (*entering_NBGKF.shape[:-1], through_NBGR.shape[-1], -1)
    d_through_NBGKR1 = sum_of_products(
        entering_NBGKF.reshape(shape), d_next_NBGKF.reshape(shape), -1
    )
    return d_state_BGKF, jnp.sum(d_through_NBGKR1[..., 0], -2), d_next_NBGKF


_states.defvjp(_states_forward, _states_backward)
