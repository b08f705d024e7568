"""Gated linear attention in chunks, plain JAX: a scan over states, all else over all chunks."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import chunks, products
from pallas_kernels.linear_attention.grouped import linear_attention_grouped
from pallas_kernels.sums import scaled


def linear_attention_chunked(q, k, v, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.linear_attention` for shapes."""
    if q.shape[2] < v.shape[2]:
        return linear_attention_grouped(
            q, k, v, log_decay, initial_state, reset, scale=scale, chunk=chunk
        )
    batch, tokens, heads, key_size = q.shape
    dtype = products.accumulation_dtype(q, k, v)
    length = chunks.chunk_length(chunk, tokens)
    decay = chunks.chunk_decay(log_decay, reset, tokens, length, dtype)
    gates = chunks.gates(decay)
    q_NBHCK, k_NBHCK, v_NBHCV = (chunks.split_chunks(x, length) for x in (q, k, v))
    if initial_state is None:
        state_BHKV = jnp.zeros((batch, heads, key_size, v.shape[-1]), dtype)
    else:
        state_BHKV = initial_state.astype(dtype)

    scores_NBHCC = chunks.decayed_products(q_NBHCK, k_NBHCK, decay)
    written_NBHCK = scaled(k_NBHCK, gates.leave_NBHCK).astype(k.dtype)
    increment_NBHKV = products.columns_dot_columns(written_NBHCK, v_NBHCV)
    state_BHKV, entering_NBHKV = _states(state_BHKV, gates.through_NBHK1, increment_NBHKV)
    read_NBHCK = scaled(q_NBHCK, gates.enter_NBHCK).astype(q.dtype)
    o_NBHCV = products.dot(scores_NBHCC.astype(v.dtype), v_NBHCV)
    o_NBHCV = o_NBHCV + products.dot(read_NBHCK, entering_NBHKV.astype(q.dtype))
    return chunks.join_chunks((scale * o_NBHCV).astype(q.dtype), tokens), state_BHKV


def _states(state_BHKV, through_NBHK1, increment_NBHKV):
    """The state after the last chunk, and the states that enter each."""

    def one_chunk(state_BHKV, gate_and_increment):
        through_BHK1, increment_BHKV = gate_and_increment
        return through_BHK1 * state_BHKV + increment_BHKV, state_BHKV

    return lax.scan(one_chunk, state_BHKV, (through_NBHK1, increment_NBHKV))
