"""Digests of arrays that do not depend on how the arrays are sharded."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def digests(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """A uint32 digest of each array, in the order of the sorted names.

    digest = sum over words of mix(word + position * odd) mod 2^32, with mix a bijection: any
    change within one word changes it, and so, but for one chance in 2^32, does any other change.
    """
    leaves = [arrays[name] for name in sorted(arrays)]
    sharding = leaves[0].sharding
    if isinstance(sharding, jax.NamedSharding):
        return _replicated(jax.NamedSharding(sharding.mesh, jax.P()))(leaves)
    return jax.jit(_all)(leaves)


_COMPILED: dict[jax.NamedSharding, jax.stages.Wrapped] = {}


def _replicated(sharding: jax.NamedSharding) -> jax.stages.Wrapped:
    if sharding not in _COMPILED:
        _COMPILED[sharding] = jax.jit(_all, out_shardings=sharding)
    return _COMPILED[sharding]


def _all(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_digest(leaf) for leaf in leaves])


def _digest(x: jax.Array) -> jax.Array:
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):  # row-major, without a reshape that would gather
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += along * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words + position * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32, in its own layout."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit (the finaliser of MurmurHash3)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
