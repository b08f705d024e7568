"""Taylor attention token by token: the definition."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import accumulation_dtype
from pallas_kernels.taylor_attention.features import (
    feature_count,
    normalise,
    taylor_features,
    with_ones,
)


def taylor_attention_reference(q, k, v, initial_state, reset, *, scale, chunk):
    """S_t = S_{t-1} + phi(k_t) [v_t, 1]T;  o_t = ST phi(scale q_t), normalised.

    `chunk` is not used.
    """
    del chunk
    dtype = accumulation_dtype(q, k, v)
    batch, tokens, heads, size = q.shape
    if reset is None:
        reset = jnp.zeros((batch, tokens), bool)
    S = jnp.zeros((batch, heads, feature_count(size), v.shape[-1] + 1))
    S = S if initial_state is None else initial_state

    def token(S, xs):
        q, k, v, fresh = xs
        S = jnp.where(fresh[:, None, None, None], 0, S)
        S = S + taylor_features(k, dtype)[..., :, None] * with_ones(v)[..., None, :]
        read = taylor_features(scale * q, dtype)
        return S, jnp.einsum("bhmw,bhm->bhw", S, read, precision=lax.Precision.HIGHEST)

    by_token = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v)]
    S, sums = lax.scan(token, S.astype(dtype), (*by_token, jnp.moveaxis(reset, 1, 0)))
    return jnp.moveaxis(normalise(sums), 0, 1).astype(q.dtype), S
