"""Matrix products over the last two axes, accumulated in float32 or wider."""

import jax
import jax.numpy as jnp


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 when an input is."""
    return jnp.result_type(jnp.float32, *arrays)


def rows_dot_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a bT over the last two axes, accumulated in float32 or wider."""
    return jnp.einsum("...ik,...jk->...ij", a, b, preferred_element_type=accumulation_dtype(a, b))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b over the last two axes, accumulated in float32 or wider."""
    return jnp.einsum("...ij,...jk->...ik", a, b, preferred_element_type=accumulation_dtype(a, b))


def columns_dot_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """aT b over the last two axes, accumulated in float32 or wider."""
    return jnp.einsum("...ck,...cv->...kv", a, b, preferred_element_type=accumulation_dtype(a, b))
