"""The mLSTM in chunks, plain JAX: scans over levels and states, all else over all chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import chunks, products
from pallas_kernels.mlstm.reference import LEAST_DIVISOR
from pallas_kernels.sums import scaled, weighted_sum


def mlstm_chunked(q, k, v, log_input, log_forget, state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.mlstm` for shapes."""
    tokens = q.shape[1]
    memory, normaliser, level = state
    length = chunks.chunk_length(chunk, tokens)
    weights = weigh(log_forget, log_input, level, reset, length)
    q_NBHCK, k_NBHCK, v_NBHCV = (chunks.split_chunks(x, length) for x in (q, k, v))

    kept_NBHCK = scaled(k_NBHCK, weights.inside_NBHCC[..., -1, :, None])
    written_NBHKV = products.columns_dot_columns(kept_NBHCK.astype(k.dtype), v_NBHCV)
    increments = (written_NBHKV, jnp.sum(kept_NBHCK, -2))
    through_NBH = weights.enter_NBHC[..., -1]
    state, entering = _states(memory, normaliser, through_NBH, increments)
    entering_NBHKV, entering_NBHK = entering

    scores_NBHCC = products.rows_dot_rows(q_NBHCK, k_NBHCK) * weights.inside_NBHCC
    read_NBHCK = scaled(q_NBHCK, weights.enter_NBHC[..., None])
    h_NBHCV = products.dot(scores_NBHCC.astype(v.dtype), v_NBHCV)
    h_NBHCV = h_NBHCV + products.dot(read_NBHCK.astype(q.dtype), entering_NBHKV.astype(q.dtype))
    norm_NBHC = jnp.sum(scores_NBHCC, -1)
    norm_NBHC = norm_NBHC + weighted_sum(read_NBHCK, entering_NBHK[:, :, :, None], -1)
    divisor_NBHC = jnp.maximum(jnp.abs(scale * norm_NBHC), weights.least_NBHC)
    h_NBHCV = scaled(h_NBHCV, (scale / divisor_NBHC)[..., None])
    level_BH = weights.level_NBHC[-1, ..., -1]
    return chunks.join_chunks(h_NBHCV.astype(q.dtype), tokens), (*state, level_BH)


class Weights(NamedTuple):
    """Factors relative to the level of the token that reads; those of the last token of a chunk
    are relative to the level of the state that leaves it."""

    inside_NBHCC: jax.Array  # the write of token j, as token i reads it
    enter_NBHC: jax.Array  # the entering state, as token i reads it
    level_NBHC: jax.Array  # behind the last token as there
    least_NBHC: jax.Array  # the least divisor


def weigh(log_forget, log_input, level_BH, reset, length) -> Weights:
    """The weights; a level is the largest exponent that meets at a token."""
    decay = chunks.chunk_decay(log_forget, reset, log_input.shape[1], length, level_BH.dtype)
    coarse_NBHC, fine_NBHC = decay.coarse_NBHCK[..., 0], decay.fine_NBHCK[..., 0]
    document_NB1C = decay.document_NB1C
    assert document_NB1C is not None  # there is an array of resets
    # Behind the last token log_input is 0 and k is 0: the level, at least 0, stays as it is.
    write_NBH1C = chunks.split_chunks(log_input, length)[..., None, :]
    gap_NBHCC = _differences(coarse_NBHC) + _differences(fine_NBHC)
    visible = jnp.tril(jnp.ones((length, length), bool))
    visible &= document_NB1C[..., :, None] == document_NB1C[..., None, :]
    reach_NBHC = jnp.where(document_NB1C == 0, coarse_NBHC + fine_NBHC, -jnp.inf)

    largest_NBHC = jnp.max(jnp.where(visible, gap_NBHCC + write_NBH1C, -jnp.inf), -1)
    own_NBHC = lax.stop_gradient(jnp.maximum(largest_NBHC, 0))
    kept_NBHC = lax.stop_gradient(reach_NBHC)

    def follow(first, second):  # sums and maxima, so associative
        return first[0] + second[0], jnp.maximum(second[0] + first[1], second[1])

    chunk_ends = (kept_NBHC[..., -1], own_NBHC[..., -1])
    kept_NBH, own_NBH = lax.associative_scan(follow, chunk_ends)
    after_NBH = jnp.maximum(kept_NBH + lax.stop_gradient(level_BH), own_NBH)
    # The initial level is an argument and has a gradient; the later ones are a choice.
    before_NBH = jnp.concatenate([level_BH[None], after_NBH[:-1]])
    level_NBHC = jnp.maximum(own_NBHC, kept_NBHC + lax.stop_gradient(before_NBH)[..., None])
    exponent_NBHCC = gap_NBHCC + (write_NBH1C - level_NBHC[..., None])
    return Weights(
        jnp.exp(jnp.where(visible, exponent_NBHCC, -jnp.inf)),
        jnp.exp(reach_NBHC + (before_NBH[..., None] - level_NBHC)),
        level_NBHC,
        jnp.maximum(jnp.exp(-level_NBHC), LEAST_DIVISOR),
    )


def _differences(sums_NBHC: jax.Array) -> jax.Array:
    return sums_NBHC[..., :, None] - sums_NBHC[..., None, :]


def _states(memory_BHKV, normaliser_BHK, through_NBH, increments):
    """The state after the last chunk, and the states that enter each."""

    def one_chunk(state, gate_and_increments):
        (memory_BHKV, normaliser_BHK), (through_BH, written_BHKV, counted_BHK) = (
            state,
            gate_and_increments,
        )
        after = (
            through_BH[..., None, None] * memory_BHKV + written_BHKV,
            through_BH[..., None] * normaliser_BHK + counted_BHK,
        )
        return after, state

    return lax.scan(one_chunk, (memory_BHKV, normaliser_BHK), (through_NBH, *increments))
