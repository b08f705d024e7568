"""Sums of products of single entries and their gradients, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.sums import scaled, sum_of_products, weighted_sum

SHAPES = [  # of x and of its factor
    ((2, 5, 3, 4), (2, 5, 3, 1)),
    ((1, 5, 3, 4), (1, 5, 3, 1)),
    ((1, 5, 1, 4), (1, 1, 4)),
    ((3, 5, 4), (4,)),
    ((1, 5, 4), (4,)),
    ((2, 1, 5, 4), (1, 5, 1)),
    ((1, 1), (1, 1)),
]


@pytest.fixture(params=["one device", "partitioned"])
def program(request, monkeypatch):
    if request.param == "partitioned":
        monkeypatch.setattr(dispatch, "partitioned", lambda: "several devices")


def _draws(*shapes, kind=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), kind) for shape in shapes]


def _wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def _unbroadcast(d, shape):
    d = d.sum(tuple(range(d.ndim - len(shape))))
    return d.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def _close(ours, right, tolerance=1e-6):
    right = np.asarray(right)
    assert ours.shape == right.shape
    np.testing.assert_allclose(_wide(ours)[0], right, atol=tolerance * max(1, np.abs(right).max()))


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 5, 3), (2, 1, 1)])
@pytest.mark.parametrize("axes", [(-1,), (1,), (0, 1), (0, 1, 2)])
def test_sums_keep_their_axes(program, shape, axes):
    x, y = _draws(shape, shape)
    a, b = _wide(x, y)
    _close(sum_of_products(x, y, *axes), (a * b).sum(axes, keepdims=True))


@pytest.mark.parametrize("shape, factor", SHAPES)
def test_a_scaled_array_and_its_gradients(program, shape, factor):
    x, by, g = _draws(shape, factor, shape)
    y, pull = jax.vjp(scaled, x, by)
    d_x, d_by = pull(g)
    a, b, c = _wide(x, by, g)
    _close(y, a * b)
    _close(d_x, c * b)
    _close(d_by, _unbroadcast(a * c, factor))


@pytest.mark.parametrize("shape, factor", SHAPES)
@pytest.mark.parametrize("axis", [0, -1])
def test_a_weighted_sum_and_its_gradients(program, shape, factor, axis):
    x, by = _draws(shape, factor)
    y, pull = jax.vjp(lambda x, by: weighted_sum(x, by, axis), x, by)
    (g,) = _draws(y.shape)
    d_x, d_by = pull(g)
    a, b, c = _wide(x, by, g)
    whole = np.broadcast_to(np.expand_dims(c, axis), shape)
    _close(y, (a * b).sum(axis))
    _close(d_x, whole * b)
    _close(d_by, _unbroadcast(a * whole, factor))


def test_types_are_those_of_the_product_and_its_factors(program):
    """Gradients of a bfloat16 factor are summed in float32: one rounding, not one a token."""
    x, g = _draws((1, 4096, 2), (1, 4096, 2), kind=jnp.bfloat16)
    (by,) = _draws((2,))
    y, pull = jax.vjp(scaled, x, by.astype(jnp.bfloat16))
    d_x, d_by = pull(g)
    assert (y.dtype, d_x.dtype, d_by.dtype) == (jnp.bfloat16,) * 3
    a, c = _wide(x, g)
    _close(d_by, (a * c).sum((0, 1)), 4e-3)
    y, pull = jax.vjp(scaled, x, by)
    d_x, d_by = pull(g.astype(jnp.float32))
    assert (y.dtype, d_x.dtype, d_by.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    _close(d_by, (a * c).sum((0, 1)), 1e-5)


def test_no_axis_of_length_one_is_left_to_the_library_of_products():
    """The form that the module is for: the sum of one row runs over its axis too."""
    x = jnp.ones((1, 6, 4))
    text = jax.jit(lambda x: sum_of_products(x, x + 1, 1)).lower(x).as_text()
    assert "dimensions = [0, 1]" in text
