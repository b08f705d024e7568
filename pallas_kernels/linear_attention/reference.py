"""Gated linear attention token by token: the definition."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import accumulation_dtype


def linear_attention_reference(q, k, v, log_decay, initial_state, reset, *, scale, chunk):
    """S_t = diag(exp g_t) S_{t-1} + k_t v_tT;  o_t = scale S_tT q_t.  `chunk` is not used."""
    del chunk
    dtype = accumulation_dtype(q, k, v)
    batch, tokens, heads, key_size = q.shape
    if log_decay is None:
        log_decay = jnp.zeros((batch, tokens, heads), dtype)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if reset is None:
        reset = jnp.zeros((batch, tokens), bool)
    S = jnp.zeros((batch, heads, key_size, v.shape[-1])) if initial_state is None else initial_state

    def token(S, xs):
        q, k, v, g, fresh = xs
        S = jnp.where(fresh[:, None, None, None], 0, S)
        S = jnp.exp(g)[..., None] * S + k[..., :, None] * v[..., None, :]
        o = scale * jnp.einsum("bhkv,bhk->bhv", S, q, precision=lax.Precision.HIGHEST)
        return S, o

    by_token = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, log_decay)]
    S, o = lax.scan(token, S.astype(dtype), (*by_token, jnp.moveaxis(reset, 1, 0)))
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), S
