"""The training state as named arrays, the form in which it is saved."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def describe(flat: Mapping[str, Any]) -> dict[str, list]:
    """Type and shape of each array, as JSON values."""
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in flat.items()}


def flatten(state: Any) -> dict[str, Any]:
    """Arrays (or their shapes) by path; random keys as the integers they hold.

    Empty arrays are left out: Orbax does not save them, and their shape says all.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.size == 0:
            continue
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data
            leaf = data(leaf) if isinstance(leaf, jax.Array) else _like(data, leaf)
        flat[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    return flat


def _like(fn: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    out = jax.eval_shape(fn, leaf)
    return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=leaf.sharding)


def unflatten(abstract: Any, flat: Mapping[str, jax.Array]) -> Any:
    """The inverse of `flatten`, in the structure of `abstract`."""

    def one(path: tuple, leaf: Any) -> jax.Array:
        if leaf.size == 0:
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        array = flat[jax.tree_util.keystr(path, simple=True, separator="/")]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(array)
        return array

    return jax.tree_util.tree_map_with_path(one, abstract)


def groups(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arrays of params, of ema and of the rest, to be read one without the others."""
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in flat.items():
        first = name.split("/")[0]
        groups.setdefault(first if first in ("params", "ema") else "rest", {})[name] = leaf
    return groups


def place(flat: Mapping[str, Any]) -> Any:
    """Where an array lives that belongs to all of these: everywhere on their devices."""
    sharding = next(iter(flat.values())).sharding
    if isinstance(sharding, jax.NamedSharding):
        return jax.NamedSharding(sharding.mesh, jax.P())
    return sharding
