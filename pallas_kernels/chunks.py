"""Chunked layout, decays and resets shared by the recurrences.

Inside the chunked implementations arrays are `[N, B, H, C, ...]`: the chunk axis leads, so that a scan over states needs
no further transpose.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# exp of it is zero even in float64, and sums of it over a chunk stay exact multiples of COARSE_STEP in float32.
LOG_DECAY_FLOOR = -800.0
COARSE_STEP = 1 / 32
# Pairs inside blocks of this many tokens are weighted one by one when decay is per channel.
PAIRWISE_TOKENS = 4


class ChunkDecay(NamedTuple):
    """Inclusive sums of log decay inside each chunk, and which document each token is in.

    The sum is kept as two parts. `coarse` is a sum of multiples of COARSE_STEP, which float32 adds without error; `fine`
    is the small remainder. A difference of sums is then accurate to the size of the difference, not of the sums: one
    token with log decay -500 does not blur the decays of those behind it.
    """

    coarse_NBHCK: jax.Array  # K is 1 when decay is per head; B and H are 1 when there is none
    fine_NBHCK: jax.Array
    document_NB1C: jax.Array | None  # counts resets since the start of the chunk


class Gates(NamedTuple):
    """Factors on what crosses a chunk border; exactly 0 where a reset lies between."""

    enter_NBHCK: jax.Array  # the entering state, as token i reads it
    leave_NBHCK: jax.Array  # the write of token j, as the leaving state holds it
    through_NBHK1: jax.Array  # the entering state, as the leaving state holds it


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 when an input is."""
    return jnp.result_type(jnp.float32, *arrays)


def chunk_length(chunk: int, tokens: int) -> int:
    """The power of two that is at least `chunk`, or at least `tokens` where those are fewer."""
    return 1 << (min(chunk, tokens) - 1).bit_length()


def split_chunks(x_BT: jax.Array, length: int) -> jax.Array:
    """`[B, T, H, ...]` to `[N, B, H, C, ...]`, with zeros behind the last token."""
    tokens = x_BT.shape[1]
    chunks = -(-tokens // length)
    padding = [(0, 0)] * x_BT.ndim
    padding[1] = (0, chunks * length - tokens)
    x_BT = jnp.pad(x_BT, padding)
    x_BNCH = x_BT.reshape(x_BT.shape[0], chunks, length, *x_BT.shape[2:])
    return jnp.transpose(x_BNCH, (1, 0, 3, 2, *range(4, x_BNCH.ndim)))


def join_chunks(x_NBHCV: jax.Array, tokens: int) -> jax.Array:
    """`[N, B, H, C, V]` to `[B, T, H, V]`, without the padding."""
    chunks, batch, heads, length, size = x_NBHCV.shape
    x_BNCHV = jnp.transpose(x_NBHCV, (1, 0, 3, 2, 4))
    return x_BNCHV.reshape(batch, chunks * length, heads, size)[:, :tokens]


def chunk_decay(
    log_decay: jax.Array | None, reset_BT: jax.Array | None, tokens: int, length: int, dtype: jnp.dtype
) -> ChunkDecay:
    """Sums of log decay (None, `[B, T, H]` or `[B, T, H, K]`) and document counts by chunk."""
    chunks = -(-tokens // length)
    if log_decay is None:
        zeros = jnp.zeros((chunks, 1, 1, length, 1), dtype)
        coarse, fine = zeros, zeros
    else:
        if log_decay.ndim == 3:
            log_decay = log_decay[..., None]
        log_decay = jnp.maximum(split_chunks(log_decay.astype(dtype), length), LOG_DECAY_FLOOR)
        step = lax.stop_gradient(jnp.round(log_decay / COARSE_STEP) * COARSE_STEP)
        coarse, fine = _running_sum(step), _running_sum(log_decay - step)
    document = None
    if reset_BT is not None:
        document = jnp.cumsum(split_chunks(reset_BT[:, :, None].astype(jnp.int32), length), axis=-1)
    return ChunkDecay(coarse, fine, document)


def gates(decay: ChunkDecay) -> Gates:
    """Factors for the state that enters each chunk and the state that leaves it."""
    coarse, fine, document = decay
    last_coarse, last_fine = coarse[..., -1:, :], fine[..., -1:, :]
    enter = jnp.exp(coarse + fine)
    leave = jnp.exp((last_coarse - coarse) + (last_fine - fine))
    through = jnp.swapaxes(jnp.exp(last_coarse + last_fine), -1, -2)
    if document is not None:
        document = document[..., None]
        last = document[..., -1:, :]
        enter = jnp.where(document == 0, enter, 0)
        leave = jnp.where(document == last, leave, 0)
        through = jnp.where(last == 0, through, 0)
    return Gates(enter, leave, through)


def decayed_products(a_NBHCK: jax.Array, b_NBHCK: jax.Array, decay: ChunkDecay) -> jax.Array:
    """`sum_k a[i, k] b[j, k] exp(sum of log decay over j+1..i)`; 0 for j > i and across a reset.

    Only differences of sums that are at most 0 are exponentiated.
    """
    length = a_NBHCK.shape[-2]
    visible = jnp.tril(jnp.ones((length, length), bool))
    if decay.document_NB1C is not None:
        document = decay.document_NB1C
        visible = visible & (document[..., :, None] == document[..., None, :])
    if decay.coarse_NBHCK.shape[-1] > 1:
        products = _channel_products(a_NBHCK, b_NBHCK, decay.coarse_NBHCK, decay.fine_NBHCK)
        return jnp.where(visible, products, 0)
    coarse, fine = decay.coarse_NBHCK[..., 0], decay.fine_NBHCK[..., 0]
    gap = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    return rows_dot_rows(a_NBHCK, b_NBHCK) * jnp.exp(jnp.where(visible, gap, -jnp.inf))


def rows_dot_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a bT over the last two axes, accumulated in float32 or wider."""
    return jnp.einsum("...ik,...jk->...ij", a, b, preferred_element_type=accumulation_dtype(a, b))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b over the last two axes, accumulated in float32 or wider."""
    return jnp.einsum("...ij,...jk->...ik", a, b, preferred_element_type=accumulation_dtype(a, b))


def columns_dot_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """aT b over the last two axes, accumulated in float32 or wider."""
    return jnp.einsum("...ck,...cv->...kv", a, b, preferred_element_type=accumulation_dtype(a, b))


def _running_sum(x_NBHCK: jax.Array) -> jax.Array:
    if x_NBHCK.shape[-1] == 1:
        return jnp.cumsum(x_NBHCK, axis=-2)
    length = x_NBHCK.shape[-2]
    ones = jnp.tril(jnp.ones((length, length), x_NBHCK.dtype))
    # Exact for multiples of COARSE_STEP only if the product is not rounded to bfloat16 on an accelerator.
    return jnp.einsum("ij,...jk->...ik", ones, x_NBHCK, precision=lax.Precision.HIGHEST)


def _channel_products(a: jax.Array, b: jax.Array, coarse: jax.Array, fine: jax.Array) -> jax.Array:
    """Halve the block: each diagonal half by recursion, the part below it as one product anchored at the border."""
    length = a.shape[-2]
    if length <= PAIRWISE_TOKENS:
        visible = jnp.tril(jnp.ones((length, length), bool))[:, :, None]
        gap = _pairs(coarse) + _pairs(fine)
        weight = jnp.exp(jnp.where(visible, gap, -jnp.inf))
        return jnp.sum(a[..., :, None, :] * b[..., None, :, :] * weight, axis=-1)
    halves = [x.reshape(*x.shape[:-2], 2, length // 2, x.shape[-1]) for x in (a, b, coarse, fine)]
    diagonal = _channel_products(*halves)
    (a0, a1), (b0, b1), (c0, c1), (f0, f1) = (
        (x[..., 0, :, :], x[..., 1, :, :]) for x in halves
    )
    border_coarse, border_fine = c0[..., -1:, :], f0[..., -1:, :]
    later = a1 * jnp.exp((c1 - border_coarse) + (f1 - border_fine))
    earlier = b0 * jnp.exp((border_coarse - c0) + (border_fine - f0))
    below = rows_dot_rows(later.astype(a.dtype), earlier.astype(b.dtype))
    upper = jnp.concatenate([diagonal[..., 0, :, :], jnp.zeros_like(below)], axis=-1)
    lower = jnp.concatenate([below, diagonal[..., 1, :, :]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _pairs(x: jax.Array) -> jax.Array:
    return x[..., :, None, :] - x[..., None, :, :]
