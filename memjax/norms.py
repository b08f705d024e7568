"""Rows brought to unit size, with a gradient that suits a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.sums import sum_of_products


def unit_rms(x: Float[Array, "*lead size"], eps: float) -> Float[Array, "*lead size"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    return _scaled(x.astype(jnp.float32), 1.0 / x.shape[-1], eps)


def unit_norm(x: Float[Array, "*lead size"], eps: float) -> Float[Array, "*lead size"]:
    """x / sqrt(sum(x^2) + eps) over the last axis, in float32."""
    return _scaled(x.astype(jnp.float32), 1.0, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scaled(x: jax.Array, weight: float, eps: float) -> jax.Array:
    """y = s x, s = 1 / sqrt(weight sum(x^2) + eps);   dx = s (dy - weight y sum(y dy))."""
    return x * _scale(x, weight, eps)


def _scale(x: jax.Array, weight: float, eps: float) -> jax.Array:
    return jax.lax.rsqrt(weight * sum_of_products(x, x, -1) + eps)


def _forward(x, weight, eps):
    scale = _scale(x, weight, eps)
    return x * scale, (x, scale)


def _backward(weight, eps, residuals, dy):
    x, scale = residuals
    y = x * scale
    along = weight * sum_of_products(y, dy, -1)
    return (scale * (dy - y * along),)


_scaled.defvjp(_forward, _backward)
