"""The selective scan token by token: the definition."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import accumulation_dtype


def selective_scan_reference(x, dt, A, B, C, D, initial_state, reset, *, chunk):
    """h = exp(dt A) h + (dt x) BT;  y = h C + D x.  `chunk` has no meaning here."""
    del chunk
    dtype = accumulation_dtype(x, dt, A, B, C)
    batch, tokens, channels = x.shape
    A = A.astype(dtype)
    if reset is None:
        reset = jnp.zeros((batch, tokens), bool)
    h = jnp.zeros((batch, channels, A.shape[1])) if initial_state is None else initial_state

    def token(h, xs):
        x, dt, B, C, fresh = xs
        h = jnp.where(fresh[:, None, None], 0, h)
        h = jnp.exp(dt[:, :, None] * A) * h + (dt * x)[:, :, None] * B[:, None, :]
        return h, jnp.einsum("ben,bn->be", h, C, precision=lax.Precision.HIGHEST)

    by_token = [jnp.moveaxis(a.astype(dtype), 1, 0) for a in (x, dt, B, C)]
    h, y = lax.scan(token, h.astype(dtype), (*by_token, jnp.moveaxis(reset, 1, 0)))
    y = jnp.moveaxis(y, 0, 1)
    y = y if D is None else y + D.astype(dtype) * x
    return y.astype(x.dtype), h
