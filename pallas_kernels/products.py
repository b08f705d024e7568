"""Matrix products over the last two axes, accumulated in float32 or wider."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Maths(NamedTuple):
    """Products and transposes for lines that run on all heads at once and inside a kernel.

    Arguments are matrices of the last two axes. Kernels have `tile_math.TILES`, for axes of two.
    """

    dot: Callable[[jax.Array, jax.Array], jax.Array]
    rows_dot_rows: Callable[[jax.Array, jax.Array], jax.Array]
    columns_dot_columns: Callable[[jax.Array, jax.Array], jax.Array]
    as_column: Callable[[jax.Array], jax.Array]  # [..., 1, C] to [..., C, 1]


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 when an input is."""
    return jnp.result_type(jnp.float32, *arrays)


def rows_dot_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a bT over the last two axes, accumulated in float32 or wider."""
    return _rows_dot_rows(a, b) if _alike(a, b) else _product("...ik,...jk->...ij", a, b)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b over the last two axes, accumulated in float32 or wider."""
    return _dot(a, b) if _alike(a, b) else _product("...ij,...jk->...ik", a, b)


def columns_dot_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """aT b over the last two axes, accumulated in float32 or wider; a had better be the smaller."""
    return _columns(a, b) if _alike(a, b) else _product("...ck,...cv->...kv", a, b)


def _alike(a: jax.Array, b: jax.Array) -> bool:
    return a.shape[:-2] == b.shape[:-2]


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=accumulation_dtype(a, b))


@jax.custom_vjp
def _rows_dot_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    return _product("...ik,...jk->...ij", a, b)


@jax.custom_vjp
def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return _product("...ij,...jk->...ik", a, b)


@jax.custom_vjp
def _columns(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.platform_dependent(a, b, cpu=_columns_cpu, default=_columns_plain)


def _columns_plain(a: jax.Array, b: jax.Array) -> jax.Array:
    return _product("...ck,...cv->...kv", a, b)


def _columns_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
    """With a transposed first, by a copy.

    Products of XLA on CPU are up to twice as slow where the left operand is read by columns, as its
    own gradients of products have it. It has none for bfloat16 behind a barrier. Where a is much
    larger than b, as scores are than queries, b is copied, and the result.
    """
    if jnp.bfloat16 in (a.dtype, b.dtype):
        return _columns_plain(a, b)
    rows, columns, other = a.shape[-2], a.shape[-1], b.shape[-1]
    if rows * columns > (rows + columns) * other:
        return jnp.swapaxes(_columns_cpu(b, a), -1, -2)
    a_transposed = lax.optimization_barrier(jnp.swapaxes(a, -1, -2))
    return _product("...kc,...cv->...kv", a_transposed, b)


def _rows_dot_rows_backward(operands, g):
    a, b = operands
    return _dot(g, b).astype(a.dtype), _columns(g, a).astype(b.dtype)


def _dot_backward(operands, g):
    a, b = operands
    return _rows_dot_rows(g, b).astype(a.dtype), _columns(a, g).astype(b.dtype)


def _columns_backward(operands, g):
    a, b = operands
    return _rows_dot_rows(b, g).astype(a.dtype), _dot(a, g).astype(b.dtype)


_rows_dot_rows.defvjp(lambda a, b: (_rows_dot_rows(a, b), (a, b)), _rows_dot_rows_backward)
_dot.defvjp(lambda a, b: (_dot(a, b), (a, b)), _dot_backward)
_columns.defvjp(lambda a, b: (_columns(a, b), (a, b)), _columns_backward)


def last_row(x_CK: jax.Array) -> jax.Array:
    """The last row, `[..., 1, K]`."""
    return lax.slice_in_dim(x_CK, x_CK.shape[-2] - 1, x_CK.shape[-2], axis=x_CK.ndim - 2)


def earlier(x_CC: jax.Array) -> jax.Array:
    """Entries of row i and column j <= i, 0 for others."""
    shape = x_CC.shape[-2:]
    i, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return jnp.where(i >= j, x_CC, 0)


def _as_column(row_1C: jax.Array) -> jax.Array:
    return jnp.swapaxes(row_1C, -1, -2)


PLAIN = Maths(dot, rows_dot_rows, columns_dot_columns, _as_column)
