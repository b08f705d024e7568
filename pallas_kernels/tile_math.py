"""Matrices of one tile, written so that they compile inside a kernel for a TPU.

A tile holds C tokens of one head. Everything is a matrix: numbers of tokens are a column `[C, 1]`
or a row `[1, C]`. Products round their operands to `kind` and add in float32; all else is float32.
No cumsum, no slice that is not aligned, no reshape: Mosaic has none of them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunks import COARSE_STEP, LOG_DECAY_FLOOR
from pallas_kernels.products import Maths, last_row

# Pairs inside blocks of this many tokens are weighted one by one when decay is per channel.
PAIRWISE_TOKENS = 16

_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


def _product(a: jax.Array, b: jax.Array, dimensions: Any, kind: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if kind == jnp.float32 else lax.Precision.DEFAULT
    a, b = a.astype(kind), b.astype(kind)
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(a: jax.Array, b: jax.Array, kind: Any = jnp.float32) -> jax.Array:
    """a b. Gradients are products of the same kind, and float32."""
    return _product(a, b, _NN, kind)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_dot_rows(a: jax.Array, b: jax.Array, kind: Any = jnp.float32) -> jax.Array:
    """a bT."""
    return _product(a, b, _NT, kind)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def columns_dot_columns(a: jax.Array, b: jax.Array, kind: Any = jnp.float32) -> jax.Array:
    """aT b."""
    return _product(a, b, _TN, kind)


dot.defvjp(
    lambda a, b, kind: (dot(a, b, kind), (a, b)),
    lambda kind, ab, d: (_product(d, ab[1], _NT, kind), _product(ab[0], d, _TN, kind)),
)
rows_dot_rows.defvjp(
    lambda a, b, kind: (rows_dot_rows(a, b, kind), (a, b)),
    lambda kind, ab, d: (_product(d, ab[1], _NN, kind), _product(d, ab[0], _TN, kind)),
)
columns_dot_columns.defvjp(
    lambda a, b, kind: (columns_dot_columns(a, b, kind), (a, b)),
    lambda kind, ab, d: (_product(ab[1], d, _NT, kind), _product(ab[0], d, _NN, kind)),
)


def places(length: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of every entry of `[C, C]`."""
    shape = (length, length)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def as_column(row_1C: jax.Array) -> jax.Array:
    """`[1, C]` to `[C, 1]`: a transpose by a masked sum."""
    i, j = places(row_1C.shape[1])
    return jnp.sum(jnp.where(i == j, row_1C, 0), axis=1, keepdims=True)


def as_row(column_C1: jax.Array) -> jax.Array:
    """`[C, 1]` to `[1, C]`."""
    i, j = places(column_C1.shape[0])
    return jnp.sum(jnp.where(i == j, column_C1, 0), axis=0, keepdims=True)


TILES = Maths(dot, rows_dot_rows, columns_dot_columns, as_column)  # in full float32


class Decay(NamedTuple):
    """Sums of log decay from the first token of the tile, or the last reset, to each token.

    In two parts, as `pallas_kernels.chunks.ChunkDecay`. K is 1 where decay is per head.
    """

    coarse_CK: jax.Array
    fine_CK: jax.Array
    document_C1: jax.Array | None  # resets since the start of the tile, float32
    document_1C: jax.Array | None
    visible_CC: jax.Array  # token j is token i or an earlier one of the same document


def decay_of(log_decay: jax.Array | None, document_1C: jax.Array | None, length: int) -> Decay:
    """From log decay: None, a row `[1, C]` (per head) or `[C, K]` (per key channel)."""
    i, j = places(length)
    visible_CC = i >= j
    document_C1 = None
    if document_1C is not None:
        document_C1 = as_column(document_1C)
        visible_CC = visible_CC & (document_C1 == document_1C)
    if log_decay is None:
        zeros = jnp.zeros((length, 1), jnp.float32)
        return Decay(zeros, zeros, document_C1, document_1C, visible_CC)
    log_decay = jnp.where(log_decay > LOG_DECAY_FLOOR, log_decay, LOG_DECAY_FLOOR)
    step = lax.stop_gradient(jnp.round(log_decay * (1 / COARSE_STEP)) * COARSE_STEP)
    if log_decay.shape[0] == 1:
        sums = [jnp.where(visible_CC, x, 0) for x in (step, log_decay - step)]
        coarse, fine = (jnp.sum(x, axis=1, keepdims=True) for x in sums)
    else:
        earlier_CC = jnp.where(visible_CC, 1.0, 0.0)
        coarse, fine = dot(earlier_CC, step), dot(earlier_CC, log_decay - step)
    return Decay(coarse, fine, document_C1, document_1C, visible_CC)


def enter(decay: Decay) -> jax.Array:
    """Factor on the entering state as token i reads it, `[C, K]`: 0 behind a reset."""
    return _masked_exp(
        decay.coarse_CK + decay.fine_CK,
        None if decay.document_C1 is None else decay.document_C1 == 0,
    )


def leave(decay: Decay) -> jax.Array:
    """Factor on the write of token j as the leaving state holds it, `[C, K]`."""
    sums = (last_row(decay.coarse_CK) - decay.coarse_CK) + (last_row(decay.fine_CK) - decay.fine_CK)
    document = decay.document_C1
    return _masked_exp(sums, None if document is None else document == last_row(document))


def through(decay: Decay) -> jax.Array:
    """Factor on the entering state as the leaving state holds it, `[K, 1]` or `[1, 1]`."""
    last_1K = last_row(enter(decay))
    return last_1K if last_1K.shape[1] == 1 else as_column(last_1K)


def _masked_exp(sums: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jnp.exp(sums) if mask is None else jnp.where(mask, jnp.exp(jnp.where(mask, sums, 0)), 0)


def decayed_products(a_CK: jax.Array, b_CK: jax.Array, decay: Decay, kind: Any) -> jax.Array:
    """`sum_k a[i, k] b[j, k] exp(sum of log decay over j+1..i)`; 0 for j > i and across a reset."""
    if decay.coarse_CK.shape[1] > 1:
        return _channel_products(a_CK, b_CK, decay, kind)
    return rows_dot_rows(a_CK, b_CK, kind) * between(decay)


def between(decay: Decay) -> jax.Array:
    """Factor on the write of token j as token i reads it, `[C, C]`, for a decay per head."""
    gap_CC = decay.coarse_CK - as_row(decay.coarse_CK)
    gap_CC = gap_CC + (decay.fine_CK - as_row(decay.fine_CK))
    return _masked_exp(gap_CC, decay.visible_CC)


def _channel_products(a_CK: jax.Array, b_CK: jax.Array, decay: Decay, kind: Any) -> jax.Array:
    """Rows of blocks: pairs one by one on the diagonal, before it one product of factors.

    The factors are anchored at the last token before the block, so that no exponent is positive.
    """
    length = a_CK.shape[0]
    size = min(PAIRWISE_TOKENS, length)
    rows = []
    for start in range(0, length, size):
        own = slice(start, start + size)
        parts = []
        if start:
            parts.append(_before(a_CK, b_CK, decay, start, size, kind))
        parts.append(_pairs(a_CK[own], b_CK[own], decay.coarse_CK[own], decay.fine_CK[own]))
        if start + size < length:
            parts.append(jnp.zeros((size, length - start - size), jnp.float32))
        rows.append(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1))
    products_CC = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=0)
    return jnp.where(decay.visible_CC, products_CC, 0)


def _before(a_CK, b_CK, decay: Decay, start: int, size: int, kind: Any) -> jax.Array:
    coarse, fine, document = decay.coarse_CK, decay.fine_CK, decay.document_C1
    own, earlier, anchor = (
        slice(start, start + size),
        slice(0, start),
        slice(start - 1, start),
    )
    late = (coarse[own] - coarse[anchor]) + (fine[own] - fine[anchor])
    early = (coarse[anchor] - coarse[earlier]) + (fine[anchor] - fine[earlier])
    late_mask = early_mask = None
    if document is not None:
        late_mask = document[own] == document[anchor]
        early_mask = document[earlier] == document[anchor]
    late_a = a_CK[own] * _masked_exp(late, late_mask)
    early_b = b_CK[earlier] * _masked_exp(early, early_mask)
    return rows_dot_rows(late_a, early_b, kind)


def _pairs(a_CK, b_CK, coarse_CK, fine_CK) -> jax.Array:
    """Where j > i, or across a reset, the gap may be positive: cut at 1, and masked by the caller.

    Cut at 1 and not at 0, where the gradient of a token without decay would be halved.
    """
    gap_CCK = coarse_CK[:, None, :] - coarse_CK[None, :, :]
    gap_CCK = gap_CCK + (fine_CK[:, None, :] - fine_CK[None, :, :])
    weight_CCK = jnp.exp(jnp.minimum(gap_CCK, 1.0))
    return jnp.sum(a_CK[:, None, :] * b_CK[None, :, :] * weight_CCK, axis=2)


@jax.custom_vjp
def unit_lower_inverse(strict_CC: jax.Array) -> jax.Array:
    """(I + A)^-1 for strictly lower triangular A of a power of two rows, by merging of blocks."""
    length = strict_CC.shape[0]
    i, j = places(length)
    inverse_CC = jnp.where(i == j, 1.0, 0.0)
    for level in range(length.bit_length() - 1):
        # shifts: the lowering of an integer // asks for the generation of the TPU
        same = (i >> (level + 1)) == (j >> (level + 1))
        below = same & (((i >> level) & 1) > ((j >> level) & 1))
        link_CC = jnp.where(below, strict_CC, 0)
        inverse_CC = inverse_CC - dot(inverse_CC, dot(link_CC, inverse_CC))
    return inverse_CC


def _inverse_forward(strict_CC):
    inverse_CC = unit_lower_inverse(strict_CC)
    return inverse_CC, inverse_CC


def _inverse_backward(inverse_CC, d_CC):
    return (-columns_dot_columns(inverse_CC, rows_dot_rows(d_CC, inverse_CC)),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
