"""The mLSTM token by token: the definition."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import accumulation_dtype

# Its square is above 0 in float32. Matters where exp(-level) is less and the query is 0.
LEAST_DIVISOR = 1e-18


def mlstm_reference(q, k, v, log_input, log_forget, state, reset, *, scale, chunk):
    """The equations of `pallas_kernels.mlstm`; m_t is a constant to gradients."""
    del chunk
    dtype = accumulation_dtype(q, k, v)

    def token(state, xs):
        q, k, v, i, f, fresh = xs
        C, n, m = (jnp.where(fresh.reshape(-1, *[1] * (s.ndim - 1)), 0, s) for s in state)
        m_next = lax.stop_gradient(jnp.maximum(jnp.maximum(f + m, i), 0))
        forget, write = jnp.exp(f + m - m_next), jnp.exp(i - m_next)
        C = forget[..., None, None] * C + write[..., None, None] * k[..., :, None] * v[..., None, :]
        n = forget[..., None] * n + write[..., None] * k
        read = scale * jnp.einsum("bhkv,bhk->bhv", C, q, precision=lax.Precision.HIGHEST)
        norm = scale * jnp.einsum("bhk,bhk->bh", n, q, precision=lax.Precision.HIGHEST)
        least = jnp.maximum(jnp.exp(-m_next), LEAST_DIVISOR)
        h = read / jnp.maximum(jnp.abs(norm), least)[..., None]
        return (C, n, m_next), h

    by_token = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, log_input, log_forget)]
    state, h = lax.scan(token, state, (*by_token, jnp.moveaxis(reset, 1, 0)))
    return jnp.moveaxis(h, 0, 1).astype(q.dtype), state
