"""The diagonal scan token by token: the definition."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import accumulation_dtype


def diagonal_scan_reference(x, log_decay, initial_state, reset, *, chunk):
    """h_t = exp(g_t) h_{t-1} + x_t.  `chunk` is not used."""
    del chunk
    dtype = accumulation_dtype(x, log_decay)
    batch, tokens, channels = x.shape
    if reset is None:
        reset = jnp.zeros((batch, tokens), bool)
    h = jnp.zeros((batch, channels)) if initial_state is None else initial_state

    def token(h, xs):
        x, g, fresh = xs
        h = jnp.exp(g) * jnp.where(fresh[:, None], 0, h) + x
        return h, h

    by_token = [jnp.moveaxis(a.astype(dtype), 1, 0) for a in (x, log_decay)]
    last, h = lax.scan(token, h.astype(dtype), (*by_token, jnp.moveaxis(reset, 1, 0)))
    return jnp.moveaxis(h, 0, 1).astype(x.dtype), last
