"""What neighbouring tokens on different devices need to know of each other."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import compat


def of_last(tree, axis_name: str):
    """The value that the last device of the axis has, on all of them."""
    is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_last, x, 0), axis_name), tree)


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


def same_everywhere(tree, array: jax.Array):
    """Arguments that all devices share, marked so that their gradients are summed over devices."""
    return compat.vary_like(tree, array)
