"""Zigzag: each device gets an early and a late half shard, so that causal work is the same for all.

Of 2 n half shards in order, device d of n gets number d and number 2 n - 1 - d.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _pairs(size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where each device sends its first and its second half."""

    def owner(half: int) -> int:
        return half if half < size else 2 * size - 1 - half

    return (
        [(i, owner(2 * i)) for i in range(size)],
        [(i, owner(2 * i + 1)) for i in range(size)],
    )


def _even(axis_name: str) -> jax.Array:
    return lax.axis_index(axis_name) % 2 == 0


def to_zigzag(tree: Any, axis_name: str) -> tuple[Any, Any]:
    """Of arrays `[B, T, ...]` in order, the early and the late half that this device works on."""
    first, second = _pairs(lax.axis_size(axis_name))

    def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, right = jnp.split(x, 2, axis=1)
        left, right = lax.ppermute(left, axis_name, first), lax.ppermute(right, axis_name, second)
        even = _even(axis_name)
        return jnp.where(even, left, right), jnp.where(even, right, left)

    leaves, structure = jax.tree.flatten(tree)
    early, late = zip(*map(halves, leaves), strict=True)
    return jax.tree.unflatten(structure, early), jax.tree.unflatten(structure, late)


def from_zigzag(early_BT: jax.Array, late_BT: jax.Array, axis_name: str) -> jax.Array:
    """The inverse: `[B, T, ...]` in order."""
    first, second = ([(b, a) for a, b in pairs] for pairs in _pairs(lax.axis_size(axis_name)))
    even = _even(axis_name)
    left = lax.ppermute(jnp.where(even, early_BT, late_BT), axis_name, first)
    right = lax.ppermute(jnp.where(even, late_BT, early_BT), axis_name, second)
    return jnp.concatenate([left, right], axis=1)
