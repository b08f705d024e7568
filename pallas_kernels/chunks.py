"""Chunked layout, decays and resets shared by the recurrences.

Inside the chunked implementations arrays are `[N, B, H, C, ...]`: the chunk axis leads, so that a
scan over states needs no further transpose.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.once import cotangent_once, once
from pallas_kernels.products import rows_dot_rows

# exp of it is zero even in float64, and sums of it are exact multiples of the step in float32.
LOG_DECAY_FLOOR = -800.0
COARSE_STEP = 1 / 32
# Pairs inside blocks of this many tokens are weighted one by one when decay is per channel.
PAIRWISE_TOKENS = 4


class ChunkDecay(NamedTuple):
    """Sums of log decay inside each chunk, and which document each token is in.

    A sum runs from the first token of the chunk, or from the last reset, to the token itself: only
    sums of one document may be subtracted, and no sum depends on an earlier document.
    It is kept as two parts. `coarse` is a sum of multiples of COARSE_STEP, which float32 adds
    without error; `fine` is the small remainder. A difference of sums is then accurate to the size
    of the difference, not of the sums: one token with log decay -500 does not blur the decays of
    those behind it.
    """

    coarse_NBHCK: jax.Array  # K is 1 when decay is per head; B and H are 1 when there is none
    fine_NBHCK: jax.Array
    document_NB1C: jax.Array | None  # counts resets since the start of the chunk, in float32


class Gates(NamedTuple):
    """Factors on what crosses a chunk border; exactly 0 where a reset lies between."""

    enter_NBHCK: jax.Array  # the entering state, as token i reads it
    leave_NBHCK: jax.Array  # the write of token j, as the leaving state holds it
    through_NBHK1: jax.Array  # the entering state, as the leaving state holds it


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
    return once(jnp.transpose(x_BNCH, (1, 0, 3, 2, *range(4, x_BNCH.ndim))))


def join_chunks(x_NBHCV: jax.Array, tokens: int) -> jax.Array:
    """`[N, B, H, C, V]` to `[B, T, H, V]`, without the padding."""
    chunks, batch, heads, length, size = x_NBHCV.shape
    x_BNCHV = jnp.transpose(cotangent_once(x_NBHCV), (1, 0, 3, 2, 4))
    return once(x_BNCHV.reshape(batch, chunks * length, heads, size)[:, :tokens])


def chunk_decay(
    log_decay: jax.Array | None,
    reset_BT: jax.Array | None,
    tokens: int,
    length: int,
    dtype: jnp.dtype,
) -> ChunkDecay:
    """Sums of log decay (None, `[B, T, H]` or `[B, T, H, K]`) and document counts by chunk."""
    chunks = -(-tokens // length)
    document = None
    if reset_BT is not None:
        # By a product, and of floats: XLA on CPU would finish a running sum again in each loop that
        # reads it, and turn ten times as slow. Counts are exact.
        fresh_NB1C = split_chunks(reset_BT[:, :, None].astype(jnp.float32), length)
        until = jnp.triu(jnp.ones((length, length), jnp.float32))
        document = jnp.dot(fresh_NB1C, until, precision=lax.Precision.HIGHEST)
    if log_decay is None:
        zeros = jnp.zeros((chunks, 1, 1, length, 1), dtype)
        coarse, fine = zeros, zeros
    else:
        if log_decay.ndim == 3:
            log_decay = log_decay[..., None]
        log_decay = jnp.maximum(split_chunks(log_decay.astype(dtype), length), LOG_DECAY_FLOOR)
        step = lax.stop_gradient(jnp.round(log_decay / COARSE_STEP) * COARSE_STEP)
        coarse = _running_sum(step, document)
        fine = _running_sum(log_decay - step, document)
    return ChunkDecay(coarse, fine, document)


def gates(decay: ChunkDecay) -> Gates:
    """Factors for the state that enters each chunk and the state that leaves it."""
    coarse, fine, document = decay
    last_coarse, last_fine = coarse[..., -1:, :], fine[..., -1:, :]
    enter = coarse + fine
    leave = (last_coarse - coarse) + (last_fine - fine)
    if document is not None:
        document = document[..., None]
        enter = jnp.where(document == 0, enter, -jnp.inf)
        leave = jnp.where(document == document[..., -1:, :], leave, -jnp.inf)
    enter = jnp.exp(enter)
    through = jnp.swapaxes(enter[..., -1:, :], -1, -2)
    return Gates(enter, jnp.exp(leave), through)


def decayed_products(a_NBHCK: jax.Array, b_NBHCK: jax.Array, decay: ChunkDecay) -> jax.Array:
    """`sum_k a[i, k] b[j, k] exp(sum of log decay over j+1..i)`; 0 for j > i and across a reset.

    Only differences of sums that are at most 0 are exponentiated.
    """
    if decay.coarse_NBHCK.shape[-1] > 1:
        return _channel_products(a_NBHCK, b_NBHCK, decay)
    coarse, fine = decay.coarse_NBHCK[..., 0], decay.fine_NBHCK[..., 0]
    gap = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    visible = _earlier_of_document(a_NBHCK.shape[-2], decay.document_NB1C)
    weight = jnp.exp(jnp.where(visible, gap, -jnp.inf))
    return _shared(rows_dot_rows(a_NBHCK, b_NBHCK), weight.shape[-3]) * weight


def _shared(x_1CC: jax.Array, heads: int) -> jax.Array:
    """Products that heads share, once for each of them; as they are where they do not."""
    return _once_each(x_1CC, heads) if x_1CC.shape[-3] < heads else x_1CC


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _once_each(x_1CC: jax.Array, heads: int) -> jax.Array:
    return jnp.broadcast_to(x_1CC, (*x_1CC.shape[:-3], heads, *x_1CC.shape[-2:]))


def _sum_of_heads(heads: int, _: None, g_HCC: jax.Array) -> tuple[jax.Array]:
    """Slice by slice on a CPU: XLA sums over other axes than the last twenty times as slowly."""

    def by_slices(g_HCC: jax.Array) -> jax.Array:
        return once(functools.reduce(jnp.add, (g_HCC[..., h : h + 1, :, :] for h in range(heads))))

    def plain(g_HCC: jax.Array) -> jax.Array:
        return jnp.sum(g_HCC, -3, keepdims=True)

    return (lax.platform_dependent(g_HCC, cpu=by_slices, default=plain),)


_once_each.defvjp(lambda x_1CC, heads: (_once_each(x_1CC, heads), None), _sum_of_heads)


def _earlier_of_document(length: int, document: jax.Array | None) -> jax.Array:
    """`[..., C, C]`: whether token j is token i or an earlier one of the same document."""
    earlier = jnp.tril(jnp.ones((length, length), bool))
    if document is None:
        return earlier
    return earlier & (document[..., :, None] == document[..., None, :])


def _running_sum(x_NBHCK: jax.Array, document_NB1C: jax.Array | None) -> jax.Array:
    """Inclusive sums over the chunk; with documents, over the tokens of the same document."""
    if document_NB1C is None and x_NBHCK.shape[-1] == 1:
        return jnp.cumsum(x_NBHCK, axis=-2)
    # A masked product: in a difference of sums over the whole chunk, earlier documents would cancel
    # in exact arithmetic only, and their gradient would be rounding noise instead of 0.
    # Exact for multiples of COARSE_STEP unless an accelerator rounds its operands to bfloat16.
    earlier = _earlier_of_document(x_NBHCK.shape[-2], document_NB1C).astype(x_NBHCK.dtype)
    return jnp.einsum("...ij,...jk->...ik", earlier, x_NBHCK, precision=lax.Precision.HIGHEST)


def _channel_products(a_NBHCK: jax.Array, b_NBHCK: jax.Array, decay: ChunkDecay) -> jax.Array:
    """The products where decay is per channel.

    Halve every block: its diagonal halves by recursion, the part below them as one product of
    factors anchored at the border, the last token of the early half.
    The blocks of one size share one axis: XLA on CPU aborts on a product of arrays of 8 axes.
    """
    coarse, fine, document = decay
    a, b, coarse, fine = (x[..., None, :, :] for x in (a_NBHCK, b_NBHCK, coarse, fine))
    document = None if document is None else document[..., None, :]
    return _block_products(a, b, ChunkDecay(coarse, fine, document))[..., 0, :, :]


def _block_products(a: jax.Array, b: jax.Array, decay: ChunkDecay) -> jax.Array:
    coarse, fine, document = decay
    count, length = a.shape[-3:-1]
    if length <= PAIRWISE_TOKENS:
        visible, columns = _earlier_of_document(length, document), []
        for j in (slice(j, j + 1) for j in range(length)):
            gap = (coarse - coarse[..., j, :]) + (fine - fine[..., j, :])
            weight = jnp.exp(jnp.where(visible[..., j], gap, -jnp.inf))
            # One column at a time: without AVX-512, XLA on CPU ends the process in a sum of
            # products of arrays of 7 axes.
            columns.append(jnp.sum(a * b[..., j, :] * weight, axis=-1, keepdims=True))
        return jnp.concatenate(columns, axis=-1)
    half = length // 2
    a0, b0, coarse0, fine0 = (
        x.reshape(*x.shape[:-3], 2 * count, half, x.shape[-1]) for x in (a, b, coarse, fine)
    )
    document0 = document
    if document is not None:
        document0 = document.reshape(*document.shape[:-2], 2 * count, half)
    diagonal = _block_products(a0, b0, ChunkDecay(coarse0, fine0, document0))
    diagonal = diagonal.reshape(*diagonal.shape[:-3], count, 2, half, half)
    gate = _from_border(coarse) + _from_border(fine)
    if document is not None:
        of_border = document == document[..., half - 1 : half]
        gate = jnp.where(of_border[..., None], gate, -jnp.inf)
    late = a[..., half:, :] * jnp.exp(gate[..., half:, :])
    early = b[..., :half, :] * jnp.exp(gate[..., :half, :])
    below = rows_dot_rows(late.astype(a.dtype), early.astype(b.dtype))
    upper = jnp.concatenate([diagonal[..., 0, :, :], jnp.zeros_like(below)], axis=-1)
    lower = jnp.concatenate([below, diagonal[..., 1, :, :]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _from_border(sums_CK: jax.Array) -> jax.Array:
    """Sums from each early token to the last early one, and from that to each late token."""
    half = sums_CK.shape[-2] // 2
    border = sums_CK[..., half - 1 : half, :]
    early, late = border - sums_CK[..., :half, :], sums_CK[..., half:, :] - border
    return jnp.concatenate([early, late], axis=-2)
