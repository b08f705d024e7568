"""Taylor attention in chunks, plain JAX: a polynomial of scores inside, features for the state."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import chunks, products
from pallas_kernels.taylor_attention.features import (
    feature_count,
    normalise,
    taylor_features,
    with_ones,
)


def taylor_attention_chunked(q, k, v, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.taylor_attention` for shapes."""
    batch, tokens, heads, size = q.shape
    dtype = products.accumulation_dtype(q, k, v)
    length = chunks.chunk_length(chunk, tokens)
    decay = chunks.chunk_decay(None, reset, tokens, length, dtype)
    gates = chunks.gates(decay)
    # Padding behind the last token has value 0 and 0 beside it, so it adds nothing to the state.
    q_NBHCK, k_NBHCK, v_NBHCW = (chunks.split_chunks(x, length) for x in (q, k, with_ones(v)))
    if initial_state is None:
        state_BHMW = jnp.zeros((batch, heads, feature_count(size), v.shape[-1] + 1), dtype)
    else:
        state_BHMW = initial_state.astype(dtype)

    one = jnp.ones((1, 1, 1, length, 1), dtype)
    seen_NBHCC = chunks.decayed_products(one, one, decay)
    scores_NBHCC = scale * products.rows_dot_rows(q_NBHCK, k_NBHCK)
    weights_NBHCC = 0.5 * (1 + jnp.square(1 + scores_NBHCC)) * seen_NBHCC
    written_NBHCM = (taylor_features(k_NBHCK, dtype) * gates.leave_NBHCK).astype(k.dtype)
    increment_NBHMW = products.columns_dot_columns(written_NBHCM, v_NBHCW)
    state_BHMW, entering_NBHMW = _states(state_BHMW, gates.through_NBHK1, increment_NBHMW)
    read_NBHCM = (taylor_features(scale * q_NBHCK, dtype) * gates.enter_NBHCK).astype(q.dtype)
    sums_NBHCW = products.dot(weights_NBHCC.astype(v.dtype), v_NBHCW)
    sums_NBHCW = sums_NBHCW + products.dot(read_NBHCM, entering_NBHMW.astype(q.dtype))
    o_NBHCV = normalise(sums_NBHCW).astype(q.dtype)
    return chunks.join_chunks(o_NBHCV, tokens), state_BHMW


def _states(state_BHMW, through_NBHK1, increment_NBHMW):
    """The state after the last chunk, and the states that enter each."""

    def one_chunk(state_BHMW, xs):
        through_BHK1, increment_BHMW = xs
        return through_BHK1 * state_BHMW + increment_BHMW, state_BHMW

    return lax.scan(one_chunk, state_BHMW, (through_NBHK1, increment_NBHMW))
