"""A window no longer than a shard: what it reaches in front of the shard is on one neighbour.

Each device gets the last window - 1 keys of the device before, and the first those of the cache.
Then it is `attention` with a cache: no ring, and every implementation of `attention` serves.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention import attention
from pallas_kernels.context_parallel.tokens import from_left


def reaches(causal: bool, window: int | None, tokens: int) -> bool:
    """Whether shards of so many tokens can be read in this way."""
    return causal and window is not None and window - 1 <= tokens


def attend(
    q, k, v, segment_ids, bias, sinks, cache, *, axis_name: str, window: int, **settings
) -> jax.Array:
    """o_BTHV. cache: k `[B, J, G, K]`, v, ids `[B, J]` or None; or None.

    settings: more of `attention`.
    """
    bias, sinks = compat.vary_like((bias, sinks), q)
    settings |= {"window": window, "bias": bias, "sinks": sinks}
    reach, kind = window - 1, jnp.result_type(k, v)
    ids_BT = jnp.zeros(k.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    own = (k.astype(kind), v.astype(kind), ids_BT)
    if reach == 0:
        return attention(q, *own[:2], segment_ids=ids_BT, **settings)
    left = from_left([x[:, x.shape[1] - reach :] for x in own], axis_name)
    first = compat.vary_like(_front(cache, left, reach), q)
    is_first = lax.axis_index(axis_name) == 0
    k_BJGK, v_BJGV, ids_BJ = (
        jnp.concatenate([jnp.where(is_first, x, y).astype(z.dtype), z], 1)
        for x, y, z in zip(first, left, own, strict=True)
    )
    return attention(q, k_BJGK, v_BJGV, segment_ids=(ids_BT, ids_BJ), **settings)


def _front(cache, left, reach: int) -> list[jax.Array]:
    """Keys, values and ids in front of the first shard: `reach` of them, hidden where none are."""
    if cache is None:
        return [jnp.zeros_like(left[0]), jnp.zeros_like(left[1]), jnp.full_like(left[2], -1)]
    k_BJGK, v_BJGV, ids_BJ = cache
    if ids_BJ is None:
        ids_BJ = jnp.zeros(k_BJGK.shape[:2], left[2].dtype)
    return [_last(k_BJGK, reach), _last(v_BJGV, reach), _last(ids_BJ, reach, fill=-1)]


def _last(x_BJ: jax.Array, count: int, fill: int = 0) -> jax.Array:
    missing = max(count - x_BJ.shape[1], 0)
    widths = [(0, 0), (missing, 0)] + [(0, 0)] * (x_BJ.ndim - 2)
    return jnp.pad(x_BJ[:, max(x_BJ.shape[1] - count, 0) :], widths, constant_values=fill)
