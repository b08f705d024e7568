"""Numbers of tokens that the kernels for a Hopper GPU read, and the gradient of the decay."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import lanes, tile_math
from pallas_kernels.chunks import COARSE_STEP, LOG_DECAY_FLOOR
from pallas_kernels.warpgroup_gpu import CHUNK

# A decay below exp(-30) ends a sum of gradients as a reset does: what crosses it is under 1e-13.
ENDS = -30.0


def flat(x_BTHK: jax.Array) -> jax.Array:
    """`[B, T, H, K]` to `[B, L, H K]` of whole chunks."""
    x_BLHK = lanes.pad_tokens(x_BTHK, CHUNK)
    return x_BLHK.reshape(*x_BLHK.shape[:2], -1)


def heads_of(x_BLF: jax.Array, heads: int, tokens: int) -> jax.Array:
    """`[B, L, H K]` to `[B, T, H, K]`."""
    return x_BLF.reshape(*x_BLF.shape[:2], heads, -1)[:, :tokens]


def row_products(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), -1)


def gates_of(
    log_decay, reset, batch: int, heads: int, tokens: int, *, beta=None
) -> jax.Array | None:
    """Of every chunk of every lane `[N, M, 5, C]`, float32: coarse, fine, document, enter, leave.

    pair_ij = exp((coarse_i - coarse_j) + (fine_i - fine_j)) in a document. With `beta` it is a
    sixth row. None without any.
    """
    if log_decay is None and reset is None and beta is None:
        return None
    shape = (batch, heads, tokens // CHUNK, CHUNK)
    zeros = jnp.zeros(shape, jnp.float32)
    rows = zeros if log_decay is None else lanes.fold_rows(log_decay, CHUNK).reshape(shape)
    if reset is None:
        gates = _without_reset(rows)
    else:
        document = jnp.broadcast_to(lanes.documents(reset, CHUNK)[:, None, :, 0], shape)
        gates = jnp.vectorize(_one_chunk, signature="(c),(c)->(g,c)")(rows, document)
    gates = gates.reshape(batch * heads, -1, 5, CHUNK)
    if beta is None:
        return gates
    return jnp.concatenate([gates, lanes.fold_rows(beta, CHUNK)], 2)


def _one_chunk(row_C: jax.Array, document_C: jax.Array) -> jax.Array:
    decay = tile_math.decay_of(row_C[None], document_C[None], CHUNK)
    columns: list[Any] = [decay.coarse_CK, decay.fine_CK, decay.document_C1]
    return jnp.concatenate([*columns, tile_math.enter(decay), tile_math.leave(decay)], 1).T


def _without_reset(rows_BHMC: jax.Array) -> jax.Array:
    """The same for whole arrays: a sum is one product with a triangle of ones."""
    rows = jnp.where(rows_BHMC > LOG_DECAY_FLOOR, rows_BHMC, LOG_DECAY_FLOOR)
    coarse = jnp.round(rows * (1 / COARSE_STEP)) * COARSE_STEP
    earlier_CC = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))
    parts = jnp.stack([coarse, rows - coarse], 3)
    sums = jnp.matmul(parts, earlier_CC, precision="highest")
    coarse, fine = sums[..., 0, :], sums[..., 1, :]
    leave = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    return jnp.stack([coarse, fine, jnp.zeros_like(fine), jnp.exp(coarse + fine), leave], 3)


def decay_gradient(differences_BTH, log_decay_BTH, reset, ahead_BHS) -> jax.Array:
    """dg_t = sum of (q_i . dq_i - k_i . dk_i) for i >= t, up to the next token that ends sums.

    The sums start anew behind each segment, from `ahead`, the product of the state there with its
    cotangent: errors of rounding do not gather over the sequence.
    """
    batch, tokens, heads = differences_BTH.shape
    segments = ahead_BHS.shape[2]
    chunks = -(-tokens // CHUNK)
    per_segment = -(-chunks // segments)
    length = segments * per_segment * CHUNK
    shape = (batch, heads, segments, per_segment, CHUNK)

    def in_chunks(x_BTH):
        x_BLH = jnp.pad(x_BTH, ((0, 0), (0, length - tokens), (0, 0)))
        return jnp.moveaxis(x_BLH, 2, 1).reshape(shape)

    ends_BTH = log_decay_BTH < ENDS
    if reset is not None:
        ends_BTH = ends_BTH | reset[..., None]
    terms, ends = in_chunks(differences_BTH), in_chunks(ends_BTH.astype(jnp.float32))
    t, i = jnp.arange(CHUNK)[:, None], jnp.arange(CHUNK)[None, :]
    count = jnp.matmul(ends, (t <= i).astype(jnp.float32))  # of ends in the chunk, up to each token
    near = (i >= t) & (count[..., None, :] == count[..., :, None])
    inside = jnp.sum(jnp.where(near, terms[..., None, :], 0), -1)
    head = jnp.sum(jnp.where(count == 0, terms, 0), -1)  # of a chunk, before its first end
    total = count[..., -1]
    before = jnp.cumsum(total, -1)  # of ends in the segment, up to each chunk
    chunk, later = jnp.arange(per_segment)[:, None], jnp.arange(per_segment)[None, :]
    open_ = (before - total)[..., None, :] == before[..., :, None]
    behind = jnp.sum(jnp.where((later > chunk) & open_, head[..., None, :], 0), -1)
    behind = behind + jnp.where(before == before[..., -1:], ahead_BHS[..., None], 0)
    sums = inside + jnp.where(count == total[..., None], behind[..., None], 0)
    d_BHL = jnp.where(ends > 0, 0, sums).reshape(batch, heads, length)
    return jnp.moveaxis(d_BHL[..., :tokens], 1, 2).astype(log_decay_BTH.dtype)
