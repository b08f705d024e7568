"""Attention of the queries of one device to the keys of one block: pieces that merge exactly."""

from functools import partial
from typing import NamedTuple

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

LARGEST_BLOCK = 512  # keys


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
    """A block at a time, so that no array of all local queries by all local keys is formed."""

    def one_block(read, keys):
        return Read(*merge(read, tile_forward(rule, _tile(slopes_GR, queries, keys)))), None

    nothing = nothing_read(queries, keys.v_BGJV.shape[-1])
    read, _ = lax.scan(one_block, nothing, _split(keys))
    return read


def attend_backward(
    rule: Rule, slopes_GR: jax.Array | None, queries: Queries, keys: Keys, cotangent: Cotangent
) -> TileGradients:
    """Gradients in float32 or wider."""
    dtype = accumulation_dtype(queries.q_BGRTK)

    def one_block(total, keys):
        part = tile_backward(rule, _tile(slopes_GR, queries, keys), *cotangent)
        d_q, d_slopes = total
        d_slopes = None if slopes_GR is None else d_slopes + part.slopes_GR
        return (d_q + part.q_BGRCK, d_slopes), (part.k_BGJK, part.v_BGJV)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), (queries.q_BGRTK, slopes_GR))
    zeros = compat.vary_like(zeros, queries.q_BGRTK)
    (d_q, d_slopes), d_keys = lax.scan(one_block, zeros, _split(keys))
    d_k, d_v = (jnp.moveaxis(x, 0, 2).reshape(y.shape) for x, y in zip(d_keys, keys[:2]))
    return TileGradients(d_q, d_k, d_v, d_slopes)


def _tile(slopes_GR, queries: Queries, keys: Keys) -> Tile:
    return Tile(queries.q_BGRTK, keys.k_BGJK, keys.v_BGJV, slopes_GR, queries.places, keys.places)


def _split(keys: Keys) -> Keys:
    """Blocks of keys, `[N, ...]`: the largest equal ones."""
    count = keys.k_BGJK.shape[2]
    size = max(n for n in range(1, min(count, LARGEST_BLOCK) + 1) if count % n == 0)

    def split(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], count // size, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    places = jax.tree.map(partial(split, axis=1), keys.places)
    return Keys(split(keys.k_BGJK, 2), split(keys.v_BGJV, 2), places)
