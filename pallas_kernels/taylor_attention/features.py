"""The features whose products are the Taylor series, and what both forms do at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def feature_count(size: int) -> int:
    """1 + K + K (K + 1) / 2: orders zero, one and two of K channels."""
    return 1 + size + size * (size + 1) // 2


def taylor_features(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """phi with phi(x) . phi(y) = 1 + x . y + (x . y)^2 / 2, over the last axis, in `dtype`.

    phi(x) = [1, x, x_i x_j for i < j, x_i^2 / sqrt(2)].
    """
    x = x.astype(dtype)
    size = x.shape[-1]
    rows, columns = np.triu_indices(size)
    weight = np.where(rows == columns, 0.5**0.5, 1.0)
    # Channels are picked by products with columns of the identity, forward and backward: a gather
    # and the scatter of its gradient run one entry at a time on a CPU.
    pick = np.eye(size)
    first, second = (
        jnp.dot(x, jnp.asarray(pick[:, index], dtype), precision=lax.Precision.HIGHEST)
        for index in (rows, columns)
    )
    pairs = first * second * jnp.asarray(weight, dtype)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, pairs], -1)


def with_ones(v: jax.Array) -> jax.Array:
    """[v, 1]: what the last column adds up is the sum of weights."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def normalise(sums: jax.Array) -> jax.Array:
    """The first V columns over the last, the sum of weights.

    It is at least 1/2, the least weight of the token itself: a smaller one is rounding.
    """
    return sums[..., :-1] / jnp.maximum(sums[..., -1:], 0.5)
