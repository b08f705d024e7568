"""Sums of products of single entries, written so that XLA on CPU makes one loop of each.

It hands a sum of products to its library of matrix products. If an axis of length 1 is among those
that are left, as with a batch of one row or heads that share one group, that library takes the
rest for a batch of products of two vectors, and 5 to 25 times as long.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch


def sum_of_products(x: jax.Array, y: jax.Array, *axes: int) -> jax.Array:
    """The sum of x * y, arrays of one shape, over axes, which stay with length 1."""
    over = {axis % x.ndim for axis in axes}
    if dispatch.current_target().platform != "cpu":
        return jnp.sum(x * y, tuple(over), keepdims=True)
    if dispatch.partitioned() is None:  # axes of length 1 change no sum, and it is one loop
        ones = (axis for axis, size in enumerate(x.shape) if size == 1)
        return jnp.sum(x * y, tuple({*ones, *over}), keepdims=True)
    # Which axes will have length 1 on a device is not known here. Products of XLA lose those.
    rest = tuple(axis for axis in range(x.ndim) if axis not in over)
    kind, highest = jnp.result_type(jnp.float32, x, y), lax.Precision.HIGHEST
    dimensions = ((tuple(over), tuple(over)), (rest, rest))
    total = lax.dot_general(x, y, dimensions, highest, preferred_element_type=kind)
    return jnp.expand_dims(total, tuple(over)).astype(jnp.result_type(x, y))


@jax.custom_vjp
def scaled(x: jax.Array, by: jax.Array) -> jax.Array:
    """x * by, where by is broadcast to the shape of x."""
    return x * by


def _scaled_forward(x, by):
    return x * by, (x, by)


def _scaled_backward(operands, g):
    x, by = operands
    return (g * by).astype(x.dtype), _gradient_of_factor(x, by, g)


scaled.defvjp(_scaled_forward, _scaled_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def weighted_sum(x: jax.Array, by: jax.Array, axis: int) -> jax.Array:
    """The sum of x * by over an axis, which is gone, where by is broadcast to the shape of x."""
    total = sum_of_products(x, jnp.broadcast_to(by, x.shape), axis)
    return jnp.squeeze(total, axis)


def _weighted_forward(x, by, axis):
    return weighted_sum(x, by, axis), (x, by)


def _weighted_backward(axis, operands, g):
    x, by = operands
    g = jnp.broadcast_to(jnp.expand_dims(g, axis), x.shape)
    return (g * by).astype(x.dtype), _gradient_of_factor(x, by, g)


weighted_sum.defvjp(_weighted_forward, _weighted_backward)


def _gradient_of_factor(x: jax.Array, by: jax.Array, g: jax.Array) -> jax.Array:
    """The sum of x * g over those axes along which `by` is broadcast."""
    shape = [1] * (x.ndim - by.ndim) + list(by.shape)
    axes = [axis for axis, (size, full) in enumerate(zip(shape, x.shape)) if size != full]
    return sum_of_products(x.astype(g.dtype), g, *axes).reshape(by.shape).astype(by.dtype)
