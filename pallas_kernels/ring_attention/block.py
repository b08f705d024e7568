"""Attention of the queries of one device to the keys of one block: pieces that merge exactly."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.rule import Places, Rule
from pallas_kernels.attention.tile import (
    LOWEST,
    Tile,
    TileGradients,
    merge,
    tile_backward,
    tile_forward,
)
from pallas_kernels.products import accumulation_dtype

LARGEST_BLOCK = 512  # queries, and keys


class Queries(NamedTuple):
    q_BGRTK: jax.Array
    places: Places


class Keys(NamedTuple):
    k_BGJK: jax.Array
    v_BGJV: jax.Array
    places: Places


class Read(NamedTuple):
    """What queries have read so far: a normalised output, and the log-sum-exp behind it."""

    o_BGRTV: jax.Array
    lse_BGRT1: jax.Array


class Cotangent(NamedTuple):
    """lse over all keys, products of outputs and their cotangents, cotangents of outputs."""

    lse_BGRT1: jax.Array
    dot_BGRT1: jax.Array
    d_o_BGRTV: jax.Array


def nothing_read(queries: Queries, value_size: int) -> Read:
    q = queries.q_BGRTK
    dtype = accumulation_dtype(q)
    o = jnp.zeros((*q.shape[:4], value_size), dtype)
    return compat.vary_like(Read(o, jnp.full((*q.shape[:4], 1), LOWEST, dtype)), q)


def attend(rule: Rule, slopes_GR: jax.Array | None, queries: Queries, keys: Keys) -> Read:
    """A block of queries by a block of keys at a time: no array of scores grows with the shard."""
    blocks = _split(keys)

    def one_row(_, row: Queries):
        def one_block(read, keys):
            return Read(*merge(read, tile_forward(rule, _tile(slopes_GR, row, keys)))), None

        nothing = nothing_read(row, keys.v_BGJV.shape[-1])
        return None, lax.scan(one_block, nothing, blocks)[0]

    _, reads = lax.scan(one_row, None, _rows(queries))
    return jax.tree.map(_join_rows, reads)


def attend_backward(
    rule: Rule, slopes_GR: jax.Array | None, queries: Queries, keys: Keys, cotangent: Cotangent
) -> TileGradients:
    """Gradients in float32 or wider."""
    dtype, blocks = accumulation_dtype(queries.q_BGRTK), _split(keys)

    def zeros(tree):
        tree = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), tree)
        return compat.vary_like(tree, queries.q_BGRTK)

    def one_row(total, xs):
        row, cotangent = xs

        def one_block(total, keys_and_total):
            keys, d_keys = keys_and_total
            part = tile_backward(rule, _tile(slopes_GR, row, keys), *cotangent)
            d_q, d_slopes = total
            d_slopes = None if slopes_GR is None else d_slopes + part.slopes_GR
            d_keys = jax.tree.map(jnp.add, d_keys, (part.k_BGJK, part.v_BGJV))
            return (d_q + part.q_BGRCK, d_slopes), d_keys

        d_slopes, d_keys = total
        start = (zeros(row.q_BGRTK), d_slopes)
        (d_q, d_slopes), d_keys = lax.scan(one_block, start, (blocks, d_keys))
        return (d_slopes, d_keys), d_q

    rows = (_rows(queries), _rows(cotangent))
    (d_slopes, d_keys), d_q = lax.scan(one_row, (zeros(slopes_GR), zeros(tuple(blocks[:2]))), rows)
    d_k, d_v = (jnp.moveaxis(x, 0, 2).reshape(y.shape) for x, y in zip(d_keys, keys[:2]))
    return TileGradients(_join_rows(d_q), d_k, d_v, d_slopes)


def _tile(slopes_GR, queries: Queries, keys: Keys) -> Tile:
    return Tile(queries.q_BGRTK, keys.k_BGJK, keys.v_BGJV, slopes_GR, queries.places, keys.places)


def _split(keys: Keys) -> Keys:
    """Blocks of keys, `[N, ...]`: the largest equal ones."""
    places = jax.tree.map(partial(_cut, axis=1), keys.places)
    return Keys(_cut(keys.k_BGJK, 2), _cut(keys.v_BGJV, 2), places)


def _rows(tree: Any) -> Any:
    """Blocks of queries, or of arrays [B, G, R, T, ...] about them, `[N, ...]`."""
    if isinstance(tree, Queries):
        places = jax.tree.map(partial(_cut, axis=1), tree.places)
        return Queries(_cut(tree.q_BGRTK, 3), places)
    return jax.tree.map(partial(_cut, axis=3), tree)


def _cut(x: jax.Array, axis: int) -> jax.Array:
    count = x.shape[axis]
    size = max(n for n in range(1, min(count, LARGEST_BLOCK) + 1) if count % n == 0)
    shape = (*x.shape[:axis], count // size, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _join_rows(x_NBGRCK: jax.Array) -> jax.Array:
    """The inverse of `_rows`, of one array."""
    x_BGRNCK = jnp.moveaxis(x_NBGRCK, 0, 3)
    return x_BGRNCK.reshape(*x_BGRNCK.shape[:3], -1, x_BGRNCK.shape[-1])
