"""One tile of attention: a block of queries against a range of keys, forward and backward.

Axes: G key heads, R query heads that share one, C queries of the tile, S = R x C rows, J its keys.
A tile returns its normalised output and log-sum-exp, so tiles over different keys merge exactly,
and the backward pass of each stands alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.rule import Places, Rule, capped, distance, visible
from pallas_kernels.products import columns_dot_columns, dot, rows_dot_rows

# A hidden score is far below any maximum, and no maximum is below LOWEST: exp(HIDDEN - LOWEST) is
# 0, so a query that sees nothing gets weights of 0 without a special case.
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


class TransposedGradients(NamedTuple):
    """The same, with those of keys and values as their products give them: transposed.

    So it is the small operand of a product that is read by columns, not the weights.
    """

    q_BGRCK: jax.Array
    k_BGKJ: jax.Array
    v_BGVJ: jax.Array
    slopes_GR: jax.Array | None

    def upright(self) -> TileGradients:
        """Keys and values as they came."""
        k_BGJK, v_BGJV = (jnp.swapaxes(x, -1, -2) for x in (self.k_BGKJ, self.v_BGVJ))
        return TileGradients(self.q_BGRCK, k_BGJK, v_BGJV, self.slopes_GR)


def tile_forward(rule: Rule, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Output `[B, G, R, C, V]` and log-sum-exp `[B, G, R, C, 1]` over the keys of the tile."""
    scores_BGSJ, _ = _scores(rule, tile)
    largest_BGS1 = jnp.maximum(jnp.max(scores_BGSJ, axis=-1, keepdims=True), LOWEST)
    weights_BGSJ = jnp.exp(scores_BGSJ - largest_BGS1)
    total_BGS1 = jnp.sum(weights_BGSJ, axis=-1, keepdims=True)
    o_BGSV = dot(weights_BGSJ.astype(tile.v_BGJV.dtype), tile.v_BGJV)
    total_BGS1 = jnp.where(total_BGS1 > 0, total_BGS1, 1)
    lse_BGS1 = largest_BGS1 + jnp.log(total_BGS1)
    return _unfold(o_BGSV / total_BGS1, tile), _unfold(lse_BGS1, tile)


def tile_backward(
    rule: Rule, tile: Tile, lse_BGRC1: jax.Array, dot_BGRC1: jax.Array, d_o_BGRCV: jax.Array
) -> TileGradients:
    """Gradients, from the log-sum-exp over all keys and the products of outputs and cotangents."""
    return tile_transposed(rule, tile, lse_BGRC1, dot_BGRC1, d_o_BGRCV).upright()


def tile_transposed(
    rule: Rule, tile: Tile, lse_BGRC1: jax.Array, dot_BGRC1: jax.Array, d_o_BGRCV: jax.Array
) -> TransposedGradients:
    """`tile_backward`, for sums over tiles that are set upright once."""
    dtype = tile.q_BGRCK.dtype
    lse_BGS1, dot_BGS1, d_o_BGSV = _fold(lse_BGRC1), _fold(dot_BGRC1), _fold(d_o_BGRCV)
    scores_BGSJ, steepness_BGSJ = _scores(rule, tile)
    weights_BGSJ = jnp.exp(scores_BGSJ - lse_BGS1)
    d_v_BGVJ = columns_dot_columns(d_o_BGSV, weights_BGSJ.astype(dtype))
    d_scores_BGSJ = weights_BGSJ * (rows_dot_rows(d_o_BGSV, tile.v_BGJV) - dot_BGS1)
    d_slopes_GR = None
    if tile.slopes_GR is not None:
        away_B11CJ = distance(tile.queries, tile.keys)[:, None, None]
        d_slopes_GR = -jnp.sum(_unfold(d_scores_BGSJ, tile) * away_B11CJ, axis=(0, 3, 4))
    if steepness_BGSJ is not None:
        d_scores_BGSJ = d_scores_BGSJ * steepness_BGSJ
    d_scores_BGSJ = (d_scores_BGSJ * rule.scale).astype(dtype)
    d_q_BGRCK = _unfold(dot(d_scores_BGSJ, tile.k_BGJK), tile)
    d_k_BGKJ = columns_dot_columns(_fold(tile.q_BGRCK), d_scores_BGSJ)
    return TransposedGradients(d_q_BGRCK, d_k_BGKJ, d_v_BGVJ, d_slopes_GR)


def merge(
    left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of the same queries over the keys of both."""
    (left_o, left_lse), (right_o, right_lse) = left, right
    lse = jnp.logaddexp(left_lse, right_lse)
    return left_o * jnp.exp(left_lse - lse) + right_o * jnp.exp(right_lse - lse), lse


def _scores(rule: Rule, tile: Tile) -> tuple[jax.Array, jax.Array | None]:
    """Scores, HIDDEN where not seen, and the derivative of their cap (None without one)."""
    logits_BGSJ = rows_dot_rows(_fold(tile.q_BGRCK), tile.k_BGJK) * rule.scale
    scores_BGSJ, steepness_BGSJ = capped(rule, logits_BGSJ)
    scores_BGRCJ = _unfold(scores_BGSJ, tile)
    if tile.slopes_GR is not None:
        away_B11CJ = distance(tile.queries, tile.keys)[:, None, None]
        scores_BGRCJ = scores_BGRCJ - tile.slopes_GR[:, :, None, None] * away_B11CJ
    seen_BCJ = visible(rule, tile.queries, tile.keys)
    if seen_BCJ is not None:
        scores_BGRCJ = jnp.where(seen_BCJ[:, None, None], scores_BGRCJ, HIDDEN)
    return _fold(scores_BGRCJ), steepness_BGSJ


def _fold(x_BGRCK: jax.Array) -> jax.Array:
    """Query heads of one key head as more rows: XLA on CPU is slower with two axes of rows."""
    batch, groups, _, _, size = x_BGRCK.shape
    return x_BGRCK.reshape(batch, groups, -1, size)


def _unfold(x_BGSK: jax.Array, tile: Tile) -> jax.Array:
    return x_BGSK.reshape(*tile.q_BGRCK.shape[:4], x_BGSK.shape[-1])
