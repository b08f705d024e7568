"""The mLSTM by a kernel of linear attention.

With the levels m known beforehand, the memory is gated linear attention: its decay is
log_forget_t + m_{t-1} - m_t, its keys are exp(log_input_t - m_t) k_t, and a column of ones beside
the values makes the normaliser.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunks import LOG_DECAY_FLOOR
from pallas_kernels.mlstm.reference import LEAST_DIVISOR


def mlstm_by(run: Callable, q, k, v, log_input, log_forget, state, reset):
    """The same as the reference, by `run(q, k, v, log_decay, state, reset)` of linear attention;
    see `pallas_kernels.mlstm` for shapes."""
    memory_BHKV, normaliser_BHK, level_BH = state
    size = v.shape[-1]
    log_forget = jnp.maximum(log_forget, LOG_DECAY_FLOOR)
    level_BTH = lax.stop_gradient(_levels(log_input, log_forget, level_BH, reset))
    # The initial level is an argument and has a gradient; the later ones are a choice.
    before_BTH = jnp.concatenate([level_BH[:, None], level_BTH[:, :-1]], axis=1)
    decay_BTH = log_forget + before_BTH - level_BTH
    decay_BTH = jnp.where(reset[..., None], 0, decay_BTH)
    decay_BTH = decay_BTH - lax.stop_gradient(jnp.maximum(decay_BTH, 0))  # of rounding
    keys = (k * jnp.exp(log_input - level_BTH)[..., None]).astype(k.dtype)
    values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    held = jnp.concatenate([memory_BHKV, normaliser_BHK[..., None]], axis=-1)
    o, held = run(q, keys, values, decay_BTH, held, reset)
    least_BTH = jnp.maximum(jnp.exp(-level_BTH), LEAST_DIVISOR)
    divisor_BTH = jnp.maximum(jnp.abs(o[..., size].astype(least_BTH.dtype)), least_BTH)
    h_BTHV = (o[..., :size] / divisor_BTH[..., None]).astype(q.dtype)
    return h_BTHV, (held[..., :size], held[..., size], level_BTH[:, -1])


def _levels(log_input, log_forget, level_BH, reset) -> jax.Array:
    """m_t = max(log_forget_t + m_{t-1}, log_input_t, 0): of sums and maxima, so associative."""
    kept_BTH = jnp.where(reset[..., None], -jnp.inf, log_forget)
    own_BTH = jnp.maximum(log_input, 0)

    def follow(first, second):
        return first[0] + second[0], jnp.maximum(second[0] + first[1], second[1])

    kept_BTH, own_BTH = lax.associative_scan(follow, (kept_BTH, own_BTH), axis=1)
    return jnp.maximum(kept_BTH + level_BH[:, None], own_BTH)
