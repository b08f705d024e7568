"""What neighbouring tokens on different devices need to know of each other."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import compat


def of_last(tree, axis_name: str):
    """The value that the last device of the axis has, on all of them."""
    is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1

    def of_last_device(x: jax.Array) -> jax.Array:
        return lax.psum(jnp.where(is_last, x, 0), axis_name).astype(x.dtype)  # bool counts as int

    return jax.tree.map(of_last_device, tree)


def from_left(tree, axis_name: str):
    """The value of the device before; zeros on the first."""
    size = lax.axis_size(axis_name)
    pairs = [(i, i + 1) for i in range(size - 1)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, pairs), tree)


def exchange_tail(
    x_BTE: Float[Array, "B T E"],
    tail_BME: Float[Array, "B M E"],
    reset_BT: Bool[Array, "B T"] | None,
    *,
    axis_name: str,
) -> tuple[Float[Array, "B M E"], Float[Array, "B M E"]]:
    """Tails of a short convolution over a sharded sequence.

    Shapes: x `[B, T, E]`, the shard; tail `[B, M, E]`, the M inputs before the first shard.
    Returns the M inputs before this shard, and those at the end of the last shard; an input of a
    document that has ended by then is 0. Traffic: one tail to the right.
    Errors: ValueError if T < M: a tail must come from one neighbour.
    """
    tokens, reach = x_BTE.shape[1], tail_BME.shape[1]
    if tokens < reach:
        raise ValueError(
            f"exchange_tail: a shard has T={tokens} tokens; it must have at least the "
            f"M={reach} of the tail"
        )
    own_BME = x_BTE[:, tokens - reach :]
    if reset_BT is not None:
        left_BT = jnp.cumsum(reset_BT[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]
        behind_BT = jnp.pad(left_BT[:, 1:], ((0, 0), (0, 1)))  # resets after each token
        own_BME = jnp.where((behind_BT[:, tokens - reach :] == 0)[..., None], own_BME, 0)
    is_first = lax.axis_index(axis_name) == 0
    entering_BME = jnp.where(is_first, tail_BME, from_left(own_BME, axis_name))
    return entering_BME.astype(tail_BME.dtype), of_last(own_BME, axis_name).astype(tail_BME.dtype)


def document_numbers(reset_BT: Bool[Array, "B T"], *, axis_name: str) -> Int[Array, "B T"]:
    """How many resets there are up to each token, over all shards: segment ids for attention."""
    count_BT = jnp.cumsum(reset_BT.astype(jnp.int32), axis=1)
    totals_PB = lax.all_gather(count_BT[:, -1], axis_name)
    earlier_P = jnp.arange(totals_PB.shape[0]) < lax.axis_index(axis_name)
    return count_BT + jnp.sum(jnp.where(earlier_P[:, None], totals_PB, 0), axis=0)[:, None]


def positions(
    start_B: Int[Array, "B"], reset_BT: Bool[Array, "B T"], *, axis_name: str
) -> Int[Array, "B T"]:
    """Places of this shard's tokens in their documents; start: that of token 0 of the sequence."""
    tokens, me = reset_BT.shape[1], lax.axis_index(axis_name)
    step_T = me * tokens + jnp.arange(tokens, dtype=jnp.int32)
    last_BT = lax.cummax(jnp.where(reset_BT, step_T, -1), axis=1)
    last_PB = lax.all_gather(last_BT[:, -1], axis_name)
    earlier_P1 = (jnp.arange(last_PB.shape[0]) < me)[:, None]
    before_B = jnp.max(jnp.where(earlier_P1, last_PB, -1), axis=0)
    last_BT = jnp.maximum(last_BT, before_B[:, None])
    return jnp.where(last_BT >= 0, step_T - last_BT, start_B[:, None] + step_T)


def last_tokens(old_BM: Array, x_BT: Array, *, axis_name: str) -> Array:
    """The last M tokens of a sequence that follows on M older ones; the same on all devices.

    old `[B, M, ...]`, the same on all devices; x `[B, T, ...]`, the shard. Traffic: M tokens, or
    the sequence if it is shorter.
    """
    tokens, me, size = x_BT.shape[1], lax.axis_index(axis_name), lax.axis_size(axis_name)
    count = min(old_BM.shape[1], size * tokens)
    place = (size - me) * tokens - count + jnp.arange(count)  # in this shard, if it is there
    own_BM = jnp.take(x_BT, jnp.clip(place, 0, tokens - 1), axis=1)
    here = ((place >= 0) & (place < tokens)).reshape(-1, *[1] * (x_BT.ndim - 2))
    own_BM = lax.psum(jnp.where(here, own_BM, 0), axis_name)
    return jnp.concatenate([old_BM[:, count:].astype(x_BT.dtype), own_BM.astype(x_BT.dtype)], 1)


def same_everywhere(tree, array: jax.Array):
    """Arguments that all devices share, marked so that their gradients are summed over devices."""
    return compat.vary_like(tree, array)
