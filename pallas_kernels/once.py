"""Values that XLA on CPU shall compute once and keep.

It computes what is cheap again in every loop that reads it, and with it all that this was made of:
of a chain of sums and products behind a norm or a short convolution, with a dozen operands, each
reader makes its own. A barrier of JAX does not hinder it. What ends in a division it makes once.
"""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def once(x: jax.Array) -> jax.Array:
    """x. On a CPU it is computed once, whoever reads it, and its cotangent too."""
    return lax.platform_dependent(x, cpu=_divided, default=_as_it_is)


@jax.custom_vjp
def cotangent_once(x: jax.Array) -> jax.Array:
    """x. On a CPU its cotangent is computed once, whoever reads it."""
    return x


def _divided(x: jax.Array) -> jax.Array:
    """x / 1, exact but for subnormal numbers, which are 0 in all arithmetic of XLA on CPU.

    The compiler must not know that it is 1: it is 2 for NaN.
    """
    return x / jnp.where(x == x, jnp.ones((), x.dtype), jnp.full((), 2, x.dtype))


def _as_it_is(x: jax.Array) -> jax.Array:
    return x


once.defvjp(lambda x: (once(x), None), lambda _, g: (once(g),))
cotangent_once.defvjp(lambda x: (x, None), lambda _, g: (once(g),))
