"""One tile of attention: a block of queries against a range of keys, forward and backward.

Axes: G key heads, R query heads that share one, C queries of the tile, J its keys. A tile returns its normalised output
and log-sum-exp, so tiles over different keys merge exactly, and the backward pass of each stands alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.rule import Places, Rule, distance, visible
from pallas_kernels.chunks import accumulation_dtype

# A hidden score is far below any maximum, and no maximum is below LOWEST: exp(HIDDEN - LOWEST) is 0, so a query that
# sees nothing gets weights of 0 without a special case.
HIDDEN = -1e30
LOWEST = -1e20


class Tile(NamedTuple):
    """Inputs of a tile."""

    q_BGRCK: jax.Array
    k_BGJK: jax.Array
    v_BGJV: jax.Array
    slopes_GR: jax.Array | None
    queries: Places
    keys: Places


class TileGradients(NamedTuple):
    """Gradients of a tile's inputs, in float32 or wider."""

    q_BGRCK: jax.Array
    k_BGJK: jax.Array
    v_BGJV: jax.Array
    slopes_GR: jax.Array | None


def tile_forward(rule: Rule, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Output `[B, G, R, C, V]` and log-sum-exp `[B, G, R, C, 1]` over the keys of the tile."""
    scores_BGRCJ = _scores(rule, tile)
    largest_BGRC1 = jnp.maximum(jnp.max(scores_BGRCJ, axis=-1, keepdims=True), LOWEST)
    weights_BGRCJ = jnp.exp(scores_BGRCJ - largest_BGRC1)
    total_BGRC1 = jnp.sum(weights_BGRCJ, axis=-1, keepdims=True)
    o_BGRCV = _product("bgrcj,bgjv->bgrcv", weights_BGRCJ.astype(tile.v_BGJV.dtype), tile.v_BGJV)
    total_BGRC1 = jnp.where(total_BGRC1 > 0, total_BGRC1, 1)
    return o_BGRCV / total_BGRC1, largest_BGRC1 + jnp.log(total_BGRC1)


def tile_backward(
    rule: Rule, tile: Tile, lse_BGRC1: jax.Array, dot_BGRC1: jax.Array, d_o_BGRCV: jax.Array
) -> TileGradients:
    """Gradients, from the log-sum-exp over all keys and the products of each output with its cotangent."""
    dtype = tile.q_BGRCK.dtype
    weights_BGRCJ = jnp.exp(_scores(rule, tile) - lse_BGRC1)
    d_v_BGJV = _product("bgrcj,bgrcv->bgjv", weights_BGRCJ.astype(dtype), d_o_BGRCV)
    d_weights_BGRCJ = _product("bgrcv,bgjv->bgrcj", d_o_BGRCV, tile.v_BGJV)
    d_scores_BGRCJ = weights_BGRCJ * (d_weights_BGRCJ - dot_BGRC1)
    d_slopes_GR = None
    if tile.slopes_GR is not None:
        away_B11TJ = distance(tile.queries, tile.keys)[:, None, None]
        d_slopes_GR = -jnp.sum(d_scores_BGRCJ * away_B11TJ, axis=(0, 3, 4))
    d_scores_BGRCJ = (d_scores_BGRCJ * rule.scale).astype(dtype)
    d_q_BGRCK = _product("bgrcj,bgjk->bgrck", d_scores_BGRCJ, tile.k_BGJK)
    d_k_BGJK = _product("bgrcj,bgrck->bgjk", d_scores_BGRCJ, tile.q_BGRCK)
    return TileGradients(d_q_BGRCK, d_k_BGJK, d_v_BGJV, d_slopes_GR)


def merge(
    left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of the same queries over the keys of both."""
    (left_o, left_lse), (right_o, right_lse) = left, right
    lse = jnp.logaddexp(left_lse, right_lse)
    return left_o * jnp.exp(left_lse - lse) + right_o * jnp.exp(right_lse - lse), lse


def _scores(rule: Rule, tile: Tile) -> jax.Array:
    scores_BGRCJ = _product("bgrck,bgjk->bgrcj", tile.q_BGRCK, tile.k_BGJK) * rule.scale
    if tile.slopes_GR is not None:
        away_B11CJ = distance(tile.queries, tile.keys)[:, None, None]
        scores_BGRCJ = scores_BGRCJ - tile.slopes_GR[:, :, None, None] * away_B11CJ
    seen_BCJ = visible(rule, tile.queries, tile.keys)
    if seen_BCJ is None:
        return scores_BGRCJ
    return jnp.where(seen_BCJ[:, None, None], scores_BGRCJ, HIDDEN)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(left, right)
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)
