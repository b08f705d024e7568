"""Taylor attention on a TPU: the body of a chunk, for `pallas_kernels.chunk_scan_tpu`.

A lane's state is three matrices, one an order of the series; that of order two has a row for every
pair of channels i <= j, and rows of zeros for the others, so that it is made of whole tiles.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, lanes, tile_math
from pallas_kernels.chunk_scan_tpu import Plan, chunk_scan
from pallas_kernels.taylor_attention.features import normalise, with_ones


class Orders(NamedTuple):
    """The state, by order: `[..., 1, W]`, `[..., K, W]` and `[..., K K, W]`."""

    zero: jax.Array
    one: jax.Array
    two: jax.Array


@dataclasses.dataclass(frozen=True)
class ChunkBody:
    """Sums of w_tj [v_j, 1] over the chunk, by scores, and over what came before, by the state."""

    kind: Any
    scale: float

    def __call__(self, consts: Any, fixed: Any, xs: Any, state: Orders):
        q_CK, k_CK, v_CW = xs
        q_CK = self.scale * q_CK
        decay = tile_math.decay_of(None, fixed, q_CK.shape[0])
        enter_C1, leave_C1 = tile_math.enter(decay), tile_math.leave(decay)
        through_11 = tile_math.through(decay)
        scores_CC = tile_math.rows_dot_rows(q_CK, k_CK, self.kind)
        weights_CC = jnp.where(decay.visible_CC, 0.5 * (1 + jnp.square(1 + scores_CC)), 0)
        sums_CW = tile_math.dot(weights_CC, v_CW, self.kind) + enter_C1 * state.zero
        sums_CW = sums_CW + tile_math.dot(enter_C1 * q_CK, state.one, self.kind)
        sums_CW = sums_CW + tile_math.dot(enter_C1 * _pairs(q_CK), state.two, self.kind)

        def write(state: jax.Array, features: jax.Array) -> jax.Array:
            return through_11 * state + tile_math.columns_dot_columns(features, v_CW, self.kind)

        zero_1W = through_11 * state.zero + jnp.sum(leave_C1 * v_CW, axis=0, keepdims=True)
        one, two = write(state.one, leave_C1 * k_CK), write(state.two, leave_C1 * _pairs(k_CK))
        return sums_CW, Orders(zero_1W, one, two)


def _pairs(x_CK: jax.Array) -> jax.Array:
    """x_i x_j at column i K + j for i < j, x_i^2 / sqrt(2) for i = j, 0 for others."""
    size = x_CK.shape[1]
    shape = (size, size * size)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    # columns are picked by products with columns of the identity: exact, and whole tiles
    first = jnp.where(row == lax.div(column, jnp.int32(size)), 1.0, 0.0)
    second = jnp.where(row == lax.rem(column, jnp.int32(size)), 1.0, 0.0)
    column = lax.broadcasted_iota(jnp.int32, (1, size * size), 1)
    i, j = lax.div(column, jnp.int32(size)), lax.rem(column, jnp.int32(size))
    weight = jnp.where(i < j, 1.0, jnp.where(i == j, 0.5**0.5, 0.0))
    return tile_math.dot(x_CK, first) * tile_math.dot(x_CK, second) * weight


def unfit(q, k, v, *, chunk: int) -> str | None:
    """Why the kernel cannot take a call."""
    size, columns = q.shape[-1], v.shape[-1] + 1
    shapes = [(1, columns), (size, columns), (size * size, columns)]
    reason = lanes.dtype_unfit(q=q, k=k, v=v) or lanes.chunk_unfit(chunk)
    return reason or lanes.vmem_unfit(shapes)


def taylor_attention_tpu(q, k, v, initial_state, reset, *, scale, chunk):
    """Same as the reference; see `pallas_kernels.taylor_attention` for shapes."""
    batch, tokens, heads, size = q.shape
    length = lanes.chunk_length(chunk, tokens)
    xs = tuple(lanes.fold(x, length) for x in (q, k, with_ones(v)))
    fixed = None if reset is None else lanes.documents(reset, length)
    state = _orders(initial_state, batch, heads, size, v.shape[-1] + 1, q)
    kind = jnp.promote_types(jnp.promote_types(q.dtype, k.dtype), v.dtype)
    body = ChunkBody(kind, float(scale))
    plan = Plan(body, length, jnp.float32, dispatch.current_target().interpreter)
    sums_NLW, state = chunk_scan(plan, None, fixed, xs, state)
    pairs = state.two[:, _pair_rows(size)]
    state_NMW = jnp.concatenate([state.zero, state.one, pairs], axis=1)
    o_BTHV = normalise(lanes.unfold(sums_NLW, batch, tokens)).astype(q.dtype)
    return o_BTHV, state_NMW.reshape(batch, heads, *state_NMW.shape[1:])


def _orders(state_BHMW, batch: int, heads: int, size: int, columns: int, like) -> Orders:
    rows = _pair_rows(size)
    count = 1 + size + len(rows)
    state_NMW = lanes.fold_state(state_BHMW, batch, heads, count, columns, like=like)
    zero, one, pairs = jnp.split(state_NMW, [1, 1 + size], axis=1)
    empty = jnp.zeros_like(state_NMW, shape=(batch * heads, size * size, columns))
    return Orders(zero, one, empty.at[:, rows].set(pairs))


def _pair_rows(size: int) -> np.ndarray:
    """Where the pairs of `taylor_features` are among all."""
    i, j = np.triu_indices(size)
    return i * size + j
