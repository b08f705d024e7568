"""Gated delta rule in chunks, plain JAX.

Every token writes k_t d_tT, where d_t = beta_t (v_t - exp(g_t) S_{t-1}T k_t). Inside a chunk the d
solve a unit lower triangular system, so all chunks are prepared at once and a scan passes only
states: d = U - W S.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import chunks, products
from pallas_kernels.sums import scaled, sum_of_products


def delta_rule_chunked(q, k, v, beta, log_decay, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.delta_rule` for shapes."""
    batch, tokens, heads, key_size = q.shape
    dtype = products.accumulation_dtype(q, k, v)
    length = chunks.chunk_length(chunk, tokens)
    decay = chunks.chunk_decay(log_decay, reset, tokens, length, dtype)
    gates = chunks.gates(decay)
    q_NBHCK, k_NBHCK, v_NBHCV = (chunks.split_chunks(x, length) for x in (q, k, v))
    beta_NBHC = chunks.split_chunks(beta.astype(dtype), length)
    if initial_state is None:
        state_BHKV = jnp.zeros((batch, heads, key_size, v.shape[-1]), dtype)
    else:
        state_BHKV = initial_state.astype(dtype)

    overlap_NBHCC = jnp.tril(chunks.decayed_products(k_NBHCK, k_NBHCK, decay), -1)
    solve_NBHCC = unit_lower_inverse(scaled(overlap_NBHCC, beta_NBHC[..., :, None]))
    solve_NBHCC = scaled(solve_NBHCC, beta_NBHC[..., None, :])
    reads_NBHCK = products.dot(solve_NBHCC, scaled(k_NBHCK, gates.enter_NBHCK))
    values_NBHCV = products.dot(solve_NBHCC, v_NBHCV.astype(dtype))
    keys_NBHCK = scaled(k_NBHCK, gates.leave_NBHCK)
    through_NBHK1 = jnp.broadcast_to(
        gates.through_NBHK1, (len(k_NBHCK), batch, heads, gates.through_NBHK1.shape[-2], 1)
    )
    state_BHKV, entering_NBHKV, written_NBHCV = _states(
        reads_NBHCK, values_NBHCV, keys_NBHCK, through_NBHK1, state_BHKV
    )
    scores_NBHCC = chunks.decayed_products(q_NBHCK, k_NBHCK, decay)
    o_NBHCV = products.dot(scores_NBHCC, written_NBHCV)
    o_NBHCV = o_NBHCV + products.dot(scaled(q_NBHCK, gates.enter_NBHCK), entering_NBHKV)
    return chunks.join_chunks((scale * o_NBHCV).astype(q.dtype), tokens), state_BHKV


@jax.custom_vjp
def unit_lower_inverse(strict_CC: jax.Array) -> jax.Array:
    """(I + A)^-1 for strictly lower triangular A of a power of two rows, over the last two axes.

    Blocks on the diagonal are merged in pairs, [[P, 0], [N, Q]]^-1 = [[P', 0], [-Q' N P', Q']], as
    masked products of whole matrices. Nothing is summed that grows, unlike in the series
    I - A + A^2 - ...
    """
    length = strict_CC.shape[-1]
    row, column = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    inverse_CC = jnp.broadcast_to(jnp.eye(length, dtype=strict_CC.dtype), strict_CC.shape)
    size = 1
    while size < length:
        same_pair = row // (2 * size) == column // (2 * size)
        below = same_pair & (row // size % 2 == 1) & (column // size % 2 == 0)
        link_CC = jnp.where(below, strict_CC, 0)
        if size > 1:
            link_CC = products.dot(inverse_CC, products.dot(link_CC, inverse_CC))
        inverse_CC = inverse_CC - link_CC
        size *= 2
    return inverse_CC


def _inverse_forward(strict_CC):
    inverse_CC = unit_lower_inverse(strict_CC)
    return inverse_CC, inverse_CC


def _inverse_backward(inverse_CC, cotangent_CC):
    """d (I + A)^-1 = -(I + A)^-1 dA (I + A)^-1."""
    left_CC = jnp.einsum("...ji,...jk->...ik", inverse_CC, cotangent_CC)
    return (-jnp.tril(products.rows_dot_rows(left_CC, inverse_CC), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


@jax.custom_vjp
def _states(reads_NBHCK, values_NBHCV, keys_NBHCK, through_NBHK1, state_BHKV):
    """d = values - reads S;  S' = through S + keysT d.

    Returns the last S', the S that enters each chunk, and each chunk's d. The backward pass scans
    the cotangent of S alone; gradients of the other inputs are products over all chunks at once.
    """

    def one_chunk(state_BHKV, xs):
        reads_BHCK, values_BHCV, keys_BHCK, through_BHK1 = xs
        written_BHCV = values_BHCV - products.dot(reads_BHCK, state_BHKV)
        next_BHKV = through_BHK1 * state_BHKV + products.columns_dot_columns(
            keys_BHCK, written_BHCV
        )
        return next_BHKV, (state_BHKV, written_BHCV)

    xs = (reads_NBHCK, values_NBHCV, keys_NBHCK, through_NBHK1)
    state_BHKV, (entering_NBHKV, written_NBHCV) = lax.scan(one_chunk, state_BHKV, xs)
    return state_BHKV, entering_NBHKV, written_NBHCV


def _states_forward(reads_NBHCK, values_NBHCV, keys_NBHCK, through_NBHK1, state_BHKV):
    out = _states(reads_NBHCK, values_NBHCV, keys_NBHCK, through_NBHK1, state_BHKV)
    return out, (reads_NBHCK, keys_NBHCK, through_NBHK1, *out[1:])


def _states_backward(residuals, cotangents):
    reads_NBHCK, keys_NBHCK, through_NBHK1, entering_NBHKV, written_NBHCV = residuals
    d_state_BHKV, d_entering_NBHKV, d_written_NBHCV = cotangents

    def one_chunk(d_next_BHKV, xs):
        reads_BHCK, keys_BHCK, through_BHK1, d_entering_BHKV, d_written_BHCV = xs
        d_written_BHCV = d_written_BHCV + products.dot(keys_BHCK, d_next_BHKV)
        d_state_BHKV = d_entering_BHKV + through_BHK1 * d_next_BHKV
        d_state_BHKV = d_state_BHKV - products.columns_dot_columns(reads_BHCK, d_written_BHCV)
        return d_state_BHKV, (d_next_BHKV, d_written_BHCV)

    xs = (reads_NBHCK, keys_NBHCK, through_NBHK1, d_entering_NBHKV, d_written_NBHCV)
    d_state_BHKV, (d_next_NBHKV, d_written_NBHCV) = lax.scan(
        one_chunk, d_state_BHKV, xs, reverse=True
    )
    over = (-1,) if through_NBHK1.shape[-2] > 1 else (-2, -1)
    d_through = sum_of_products(entering_NBHKV, d_next_NBHKV, *over)
    d_reads_NBHCK = -products.rows_dot_rows(d_written_NBHCV, entering_NBHKV)
    d_keys_NBHCK = products.rows_dot_rows(written_NBHCV, d_next_NBHKV)
    return d_reads_NBHCK, d_written_NBHCV, d_keys_NBHCK, d_through, d_state_BHKV


_states.defvjp(_states_forward, _states_backward)
