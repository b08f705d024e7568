"""Softmax attention over a window, and over persistent tokens that every query sees."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from memjax.layers import Linear, document_ids, normal
from memjax.mixers.base import tokens_seen
from memjax.positions import Position, apply_position, positions
from pallas_kernels.products import dot, rows_dot_rows

# Not infinity: a row behind the last token sees nothing, and is dropped. Without a prefix its
# weights would be 0 / 0, and the gradient of every key with them.
UNSEEN = -1e30


class WindowState(NamedTuple):
    """Keys (with their positions worked in) and values of the last window - 1 tokens.

    valid: whether a slot holds a token of the document that goes on. position: of the next token.
    """

    k_BMHK: Float[Array, "B M H K"]
    v_BMHK: Float[Array, "B M H K"]
    valid_BM: Bool[Array, "B M"]
    position_B: Int[Array, "B"]


class Prefix(NamedTuple):
    """Keys and values of persistent tokens, `[H, P, K]`, without positions."""

    k_HPK: jax.Array
    v_HPK: jax.Array


def attend(q_HCK, plain_HCK, k_HJK, v_HJK, prefix: Prefix, seen_CJ, penalty_HCJ=None):
    """sum_j softmax_j(q . k_j / sqrt(K) - penalty_j) v_j over the keys seen and over the prefix.

    Arrays are `[..., H, C, K]`; `seen_CJ` and `penalty_HCJ` broadcast against the scores. The
    prefix is asked with `plain`, the query without its position, so that where a token stands in
    its document does not change what it gets from there.
    """
    size = q_HCK.shape[-1]
    scores_HCJ = rows_dot_rows(q_HCK, k_HJK) * size**-0.5
    if penalty_HCJ is not None:
        scores_HCJ -= penalty_HCJ
    scores_HCJ = jnp.where(seen_CJ, scores_HCJ, UNSEEN)
    # Spread to the lanes and blocks of the keys: XLA on CPU would turn all scores round instead, to
    # make of the prefix one product a head.
    k_HPK, v_HPK = (jnp.broadcast_to(a, (*k_HJK.shape[:-3], *a.shape)) for a in prefix)
    scores_HCP = rows_dot_rows(plain_HCK, k_HPK) * size**-0.5
    weights = jax.nn.softmax(jnp.concatenate([scores_HCJ, scores_HCP], -1), -1).astype(v_HJK.dtype)
    o_HCK = dot(weights, jnp.concatenate([v_HJK, v_HPK], -2))
    return o_HCK.astype(q_HCK.dtype)


def attend_window(queries, keys, prefix: Prefix, *, window: int, slopes_H=None) -> jax.Array:
    """`attend` over 0 <= t - j < window and the prefix, heads' outputs side by side, `[B, T, D]`.

    queries: q_BTHK, the same without positions, and the documents id_BT. keys: k_BJHK, v_BJHK and
    id_BJ of the window - 1 tokens before the segment and of its own. slopes_H: of ALiBi.
    Computed in blocks of `window` tokens, each against itself and the block before it.
    """
    (q_BTHK, plain_BTHK, id_BT), (k_BJHK, v_BJHK, id_BJ) = queries, keys
    batch, tokens = id_BT.shape
    block, before = min(window, tokens), window - 1
    count = -(-tokens // block)
    extra = block - before if count > 1 else 0  # the reach to the left, in whole blocks
    behind = count * block - tokens

    def query_blocks(x_BT: jax.Array) -> jax.Array:
        x_BT = jnp.pad(x_BT, ((0, 0), (0, behind), (0, 0), (0, 0)))
        x_BNCH = x_BT.reshape(batch, count, block, *x_BT.shape[2:])
        return jnp.swapaxes(x_BNCH, 2, 3)

    def key_blocks(x_BJ: jax.Array, fill: int = 0) -> jax.Array:
        more = ((0, 0),) * (x_BJ.ndim - 2)
        x_BJ = jnp.pad(x_BJ, ((0, 0), (extra, behind), *more), constant_values=fill)
        if count == 1:
            return x_BJ[:, None]
        x_BNC = x_BJ.reshape(batch, count + 1, block, *x_BJ.shape[2:])
        return jnp.concatenate([x_BNC[:, :-1], x_BNC[:, 1:]], 2)

    id_BNC = jnp.pad(id_BT, ((0, 0), (0, behind)), constant_values=-2)
    id_BNC, id_BNJ = id_BNC.reshape(batch, count, block), key_blocks(id_BJ, -1)
    gap_CJ = before + extra + jnp.arange(block)[:, None] - jnp.arange(id_BNJ.shape[-1])
    seen_BNCJ = id_BNC[..., :, None] == id_BNJ[..., None, :]
    seen_BNCJ &= (gap_CJ >= 0) & (gap_CJ < window)
    penalty = None if slopes_H is None else slopes_H[:, None, None] * gap_CJ
    o_BNHCK = jax.checkpoint(attend)(
        query_blocks(q_BTHK),
        query_blocks(plain_BTHK),
        jnp.swapaxes(key_blocks(k_BJHK), 2, 3),
        jnp.swapaxes(key_blocks(v_BJHK), 2, 3),
        prefix,
        seen_BNCJ[:, :, None],
        penalty,
    )
    o_BTD = jnp.swapaxes(o_BNHCK, 2, 3).reshape(batch, count * block, -1)
    return o_BTD[:, :tokens]


def keep_window(k_BJHK, v_BJHK, id_BJ, position_BT, window: int) -> WindowState:
    """The state after a segment: what of its keys and values the next one may still see."""
    keep = slice(k_BJHK.shape[1] - (window - 1), None)
    valid_BM = id_BJ[:, keep] == id_BJ[:, -1:]
    k_BMHK, v_BMHK = (
        jnp.where(valid_BM[..., None, None], a[:, keep], 0).astype(jnp.float32)
        for a in (k_BJHK, v_BJHK)
    )
    return WindowState(k_BMHK, v_BMHK, valid_BM, position_BT[:, -1] + 1)


def empty_window(batch: int, window: int, heads: int, size: int) -> WindowState:
    """The state before a document."""
    cache = jnp.zeros((batch, window - 1, heads, size), jnp.float32)
    valid_BM = jnp.zeros((batch, window - 1), bool)
    return WindowState(cache, cache, valid_BM, jnp.zeros((batch,), jnp.int32))


def read_window(
    state: WindowState,
    streams: Iterable[jax.Array],
    prefix: Prefix,
    reset_BT: Bool[Array, "B T"],
    *,
    window: int,
    position: Position,
) -> tuple[WindowState, Float[Array, "B T D"]]:
    """The state after a segment, and `attend_window` to it and to what came before.

    streams: queries, keys and values [B, T, H, K], without positions.
    """
    position_BT = positions(state.position_B, reset_BT)
    plain_BTHK, k_BTHK, v_BTHK = streams
    q_BTHK, k_BTHK = (apply_position(position, a, position_BT) for a in (plain_BTHK, k_BTHK))
    k_BJHK = jnp.concatenate([state.k_BMHK.astype(k_BTHK.dtype), k_BTHK], 1)
    v_BJHK = jnp.concatenate([state.v_BMHK.astype(v_BTHK.dtype), v_BTHK], 1)
    id_BT = document_ids(reset_BT)
    id_BJ = jnp.concatenate([jnp.where(state.valid_BM, 0, -1), id_BT], 1)
    o_BTD = attend_window(
        (q_BTHK, plain_BTHK, id_BT),
        (k_BJHK, v_BJHK, id_BJ),
        prefix,
        window=window,
        slopes_H=position.slopes(plain_BTHK.shape[2]),
    )
    return keep_window(k_BJHK, v_BJHK, id_BJ, position_BT, window), o_BTD


class WindowAttention(nnx.Module):
    """o_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j over 0 <= t - j < window, and the prefix.

    The heads' outputs side by side; the projection behind them is the caller's.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        window: int,
        persistent: int,
        position: Position,
        *,
        rngs: nnx.Rngs,
    ):
        self.heads, self.size, self.window = heads, d_model // heads, window
        self.position = position
        self.query, self.key, self.value = (
            Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed")) for _ in range(3)
        )
        self.persistent = nnx.Param(
            normal(rngs, (persistent, d_model), 1.0), axes=("rank", "embed")
        )

    def init_state(self, batch: int) -> WindowState:
        return empty_window(batch, self.window, self.heads, self.size)

    def split_heads(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., H, K]."""
        return x.reshape(*x.shape[:-1], self.heads, self.size)

    def prefix(self, dtype: jnp.dtype) -> Prefix:
        """Keys and values of the persistent tokens."""
        tokens_PD = self.persistent[...].astype(dtype)
        k_PHK, v_PHK = (self.split_heads(p(tokens_PD)) for p in (self.key, self.value))
        return Prefix(jnp.swapaxes(k_PHK, 0, 1), jnp.swapaxes(v_PHK, 0, 1))

    def __call__(
        self,
        state: WindowState,
        x_BTD: Float[Array, "B T D"],
        reset_BT: Bool[Array, "B T"],
    ) -> tuple[WindowState, Float[Array, "B T D"]]:
        streams = (self.split_heads(p(x_BTD)) for p in (self.query, self.key, self.value))
        prefix = self.prefix(x_BTD.dtype)
        return read_window(
            state, streams, prefix, reset_BT, window=self.window, position=self.position
        )

    def attention_flops(self, segment: int) -> float:
        """Operations a token of scores and sums."""
        seen = tokens_seen(self.window, segment)
        return 4.0 * (seen + self.persistent.shape[0]) * self.heads * self.size
