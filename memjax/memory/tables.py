"""Large tables of which every token reads a few rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

AT_ONCE = 1 << 21
"""Floats of table rows that are gathered at a time: what stays in a cache of the processor."""


@jax.custom_vjp
def sum_rows(
    table_NV: Float[Array, "N V"], index_TJ: Int[Array, "T J"], weight_TJ: Float[Array, "T J"]
) -> Float[Array, "T V"]:
    """y_t = sum_j weight_tj table[index_tj], float32. Indices must be in range.

    Forward and backward in pieces of the tokens, so that the rows of all of them, J times as large
    as y, are never held; the shares of the table's gradient are added up where they belong.
    """
    cut, size = _pieces(table_NV, index_TJ)

    def piece(xs):
        index_CJ, weight_CJ = xs
        return jnp.einsum("cj,cjv->cv", weight_CJ, _rows(table_NV, index_CJ))

    y_NCV = jax.lax.map(piece, (cut(index_TJ), cut(weight_TJ)))
    return y_NCV.reshape(size, -1)[: len(index_TJ)]


def _pieces(table_NV: jax.Array, index_TJ: jax.Array):
    """A function that cuts arrays of tokens into pieces, `[N, C, ...]`, 0 at the end; and N C."""
    tokens, reads = index_TJ.shape
    length = min(tokens, max(1, AT_ONCE // (reads * table_NV.shape[1])))
    count = -(-tokens // length)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, count * length - tokens), (0, 0)))
        return x.reshape(count, length, x.shape[1])

    return cut, count * length


def _rows(table_NV: jax.Array, index_CJ: jax.Array) -> jax.Array:
    return table_NV.at[index_CJ].get(mode="promise_in_bounds")


def _forward(table_NV, index_TJ, weight_TJ):
    return sum_rows(table_NV, index_TJ, weight_TJ), (table_NV, index_TJ, weight_TJ)


def _backward(residuals, dy_TV):
    table_NV, index_TJ, weight_TJ = residuals
    cut, size = _pieces(table_NV, index_TJ)

    def piece(dtable_NV, xs):
        index_CJ, weight_CJ, dy_CV = xs
        dweight_CJ = jnp.einsum("cv,cjv->cj", dy_CV, _rows(table_NV, index_CJ))
        shares_CJV = weight_CJ[..., None] * dy_CV[:, None]
        return dtable_NV.at[index_CJ].add(shares_CJV, mode="promise_in_bounds"), dweight_CJ

    xs = cut(index_TJ), cut(weight_TJ), cut(dy_TV)
    dtable_NV, dweight_NCJ = jax.lax.scan(piece, jnp.zeros_like(table_NV), xs)
    return dtable_NV, None, dweight_NCJ.reshape(size, -1)[: len(index_TJ)]


sum_rows.defvjp(_forward, _backward)
