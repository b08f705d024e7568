"""What is computed once on a CPU, and rows of unit size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.norms import unit_norm, unit_rms
from pallas_kernels.once import cotangent_once, once

MARK = 1.2345679  # printed by XLA with more or fewer digits


def _chain(x):
    return x[:, :-1] * MARK + x[:, 1:]


def _times_computed(keep):
    """How many loops of the compiled program compute `_chain`, which three of them read."""

    def readers(x):
        y = keep(_chain(x))
        rows = y.reshape(4, 8, 64)
        return jnp.transpose(rows, (1, 2, 0)), jnp.transpose(rows, (2, 0, 1)) * 2, jnp.exp(y)

    text = jax.jit(readers).lower(jnp.ones((64, 33))).compile().as_text()
    return text.count("constant(1.23456")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA on CPU fuses loops")
def test_a_cpu_computes_once_what_it_otherwise_repeats_for_every_reader():
    assert _times_computed(once) == 1
    assert _times_computed(lambda y: y) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_once_changes_no_value(dtype):
    values = [0.0, -0.0, 1.0, -2.5, 1.2e-38, 3e38, np.inf, -np.inf, np.nan]
    x = jnp.asarray(values, dtype)
    same = jax.jit(once)(x)
    assert same.dtype == x.dtype
    bits = np.uint32 if dtype == "float32" else np.uint16
    finite = slice(0, -1)
    np.testing.assert_array_equal(
        np.asarray(same[finite]).view(bits), np.asarray(x[finite]).view(bits)
    )
    assert np.isnan(np.asarray(same[-1], np.float32))


@pytest.mark.parametrize("keep", [once, cotangent_once])
def test_what_is_kept_passes_gradients_of_any_order(keep):
    x = jnp.linspace(-1.0, 2.0, 7)
    f = jax.grad(lambda x: jnp.sum(keep(x) ** 3))
    np.testing.assert_allclose(f(x), 3 * x**2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(f(x)))(x), 6 * x, rtol=1e-6)


@pytest.mark.parametrize("unit, weight", [(unit_rms, 1 / 6), (unit_norm, 1.0)])
def test_unit_rows_and_their_gradients_are_those_of_the_formula(unit, weight):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 6)) * np.array([1.0, 1e-3, 0.0])[:, None]
    dy, eps = rng.normal(size=x.shape), 1e-6

    scale = (weight * np.sum(x * x, -1, keepdims=True) + eps) ** -0.5
    along = np.sum(x * dy, -1, keepdims=True)
    dx = scale * dy - weight * scale**3 * x * along

    y, pull = jax.vjp(lambda x: unit(x, eps), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, x * scale, rtol=2e-6)
    largest = np.max(np.abs(dx), -1, keepdims=True)  # terms cancel: relative to the row
    np.testing.assert_array_less(
        np.abs(np.asarray(pull(jnp.asarray(dy, jnp.float32))[0]) - dx) / largest, 3e-6
    )
