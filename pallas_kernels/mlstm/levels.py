"""The mLSTM by a kernel of linear attention.

With the levels m known beforehand, the memory is gated linear attention: its decay is
log_forget_t + m_{t-1} - m_t, and its keys are exp(log_input_t - m_t) k_t. The kernel reads it. What
a read is divided by, n_tT q_t, is made here in float32: it may be a small difference of large
terms, and is worth nothing if they are rounded to bfloat16, as those of a kernel are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import chunks
from pallas_kernels.mlstm.chunked import Weights, weigh
from pallas_kernels.sums import scaled, weighted_sum

CHUNK = 64


def mlstm_by(run: Callable, q, k, v, log_input, log_forget, state, reset, *, scale):
    """The same as the reference, by `run(q, k, v, log_decay, state, reset)` of linear attention,
    which scales what it reads by `scale`; see `pallas_kernels.mlstm` for shapes."""
    tokens = q.shape[1]
    # The later levels are a choice. The initial one is an argument: h depends on exp(m) C and
    # exp(m) n, so its gradient comes from those of C and n, which a kernel has more exactly than
    # that of a decay.
    level_BH = lax.stop_gradient(state[2])
    change_BH = jnp.exp(state[2] - level_BH)
    memory_BHKV = state[0] * change_BH[..., None, None]
    normaliser_BHK = state[1] * change_BH[..., None]
    log_forget = jnp.maximum(log_forget, chunks.LOG_DECAY_FLOOR)
    weights = weigh(log_forget, log_input, level_BH, reset, chunks.chunk_length(CHUNK, tokens))
    level_BTH = chunks.join_chunks(weights.level_NBHC[..., None], tokens)[..., 0]
    level_BTH = lax.stop_gradient(level_BTH)
    before_BTH = jnp.concatenate([level_BH[:, None], level_BTH[:, :-1]], axis=1)
    decay_BTH = log_forget + before_BTH - level_BTH
    decay_BTH = jnp.where(reset[..., None], 0, decay_BTH)
    decay_BTH = decay_BTH - lax.stop_gradient(jnp.maximum(decay_BTH, 0))  # of rounding
    keys = (k * jnp.exp(log_input - level_BTH)[..., None]).astype(k.dtype)
    o_BTHV, memory_BHKV = run(q, keys, v, decay_BTH, memory_BHKV, reset)
    reads_NBHC, normaliser_BHK = _read_normaliser(q, k, weights, normaliser_BHK)
    divisor_NBHC = jnp.maximum(jnp.abs(scale * reads_NBHC), weights.least_NBHC)
    inverse_BTH1 = chunks.join_chunks((1 / divisor_NBHC)[..., None], tokens)
    h_BTHV = scaled(o_BTHV.astype(inverse_BTH1.dtype), inverse_BTH1).astype(q.dtype)
    return h_BTHV, (memory_BHKV, normaliser_BHK, level_BTH[:, -1])


def _read_normaliser(q, k, weights: Weights, normaliser_BHK) -> tuple[jax.Array, jax.Array]:
    """n_tT q_t in chunks, and n after the last token."""
    length = weights.inside_NBHCC.shape[-1]
    q_NBHCK, k_NBHCK = (chunks.split_chunks(x, length) for x in (q, k))
    scores_NBHCC = jnp.einsum(
        "...ik,...jk->...ij",
        q_NBHCK,
        k_NBHCK,
        precision=lax.Precision.HIGHEST,  # a TPU would round float32 too
        preferred_element_type=normaliser_BHK.dtype,
    )
    counted_NBHK = weighted_sum(k_NBHCK, weights.inside_NBHCC[..., -1, :, None], -2)
    through_NBH1 = weights.enter_NBHC[..., -1, None]

    def follow(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    through_NBH1, counted_NBHK = lax.associative_scan(follow, (through_NBH1, counted_NBHK))
    after_NBHK = through_NBH1 * normaliser_BHK + counted_NBHK
    entering_NBHK = jnp.concatenate([normaliser_BHK[None], after_NBHK[:-1]])
    from_before_NBHC = weighted_sum(q_NBHCK, entering_NBHK[:, :, :, None], -1) * weights.enter_NBHC
    return jnp.sum(scores_NBHCC * weights.inside_NBHCC, -1) + from_before_NBHC, after_NBHK[-1]
