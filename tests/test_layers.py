"""Parts that mixers share, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.layers import Linear, LinearPair, ShortConv


def slow_convolution(weight_WF, tail_MF, x_TF, reset_T):
    """y_t = sum_j weight_j x_{t-j} over the taps with no reset between, one product at a time."""
    padded_JF = np.concatenate([tail_MF, x_TF])
    y_TF = np.zeros(x_TF.shape)
    for t in range(len(x_TF)):
        for lag in range(len(weight_WF)):
            if not reset_T[max(t - lag + 1, 0) : t + 1].any():
                y_TF[t] += weight_WF[lag] * padded_JF[t - lag + len(tail_MF)]
    return y_TF


def slow_gradients(weight_WF, tail_MF, x_TF, reset_T, dy_TF):
    """Of sum(dy * y): y is linear in each argument, so unit arguments give every entry."""

    def gradient(argument, function):
        entries = np.zeros(argument.shape)
        for place in np.ndindex(*argument.shape):
            unit = np.zeros(argument.shape)
            unit[place] = 1
            entries[place] = np.sum(dy_TF * function(unit))
        return entries

    zero_MF, zero_TF = np.zeros_like(tail_MF), np.zeros_like(x_TF)
    return (
        gradient(weight_WF, lambda w: slow_convolution(w, tail_MF, x_TF, reset_T)),
        gradient(tail_MF, lambda tail: slow_convolution(weight_WF, tail, zero_TF, reset_T)),
        gradient(x_TF, lambda x: slow_convolution(weight_WF, zero_MF, x, reset_T)),
    )


@pytest.mark.parametrize(("width", "length"), [(1, 5), (4, 2), (4, 11)])
def test_short_convolution_and_its_gradients_are_those_of_the_definition(width, length):
    rng, lanes, size = np.random.default_rng(width + length), 2, 3
    definition, _ = nnx.split(ShortConv(size, width, rngs=nnx.Rngs(0)))
    weight_WF = rng.normal(size=(width, size))
    tail_BMF = rng.normal(size=(lanes, width - 1, size))
    x_BTF, dy_BTF = (rng.normal(size=(lanes, length, size)) for _ in range(2))
    reset_BT = rng.random((lanes, length)) < 0.3
    reset_BT[0], reset_BT[1, -1] = False, True

    def loss(weight_WF, tail_BMF, x_BTF):
        conv = nnx.merge(definition, nnx.State({"weight": weight_WF}))
        y_BTF = conv(tail_BMF, x_BTF, jnp.asarray(reset_BT))[1]
        return (y_BTF * dy_BTF.astype(np.float32)).sum(), y_BTF

    arguments = [a.astype(np.float32) for a in (weight_WF, tail_BMF, x_BTF)]
    grads, y_BTF = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
    by_lane = [slow_gradients(weight_WF, *lane) for lane in zip(tail_BMF, x_BTF, reset_BT, dy_BTF)]
    wanted_y = [slow_convolution(weight_WF, *lane) for lane in zip(tail_BMF, x_BTF, reset_BT)]
    np.testing.assert_allclose(y_BTF, wanted_y, atol=1e-5)
    wanted = sum(g[0] for g in by_lane), [g[1] for g in by_lane], [g[2] for g in by_lane]
    for ours, right in zip(grads, wanted):
        np.testing.assert_allclose(ours, right, atol=2e-5)  # sums of some ten float32 products


def test_a_pair_is_two_products_of_one_input_with_their_gradients():
    generator = np.random.default_rng(0)
    x_BTI, bias_2O = generator.standard_normal((2, 3, 5)), generator.standard_normal((2, 4))
    dy_2BTO = generator.standard_normal((2, 2, 3, 4))
    pair = LinearPair(5, 4, rngs=nnx.Rngs(0), bias=True)
    pair.bias[...] = jnp.asarray(bias_2O, jnp.float32)
    definition, params = nnx.split(pair)

    def loss(params, x_BTI):
        y_2BTO = jnp.stack(nnx.merge(definition, params)(x_BTI))
        return jnp.sum(y_2BTO * dy_2BTO), y_2BTO

    x = jnp.asarray(x_BTI, jnp.float32)
    (dparams, dx_BTI), y_2BTO = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    weight_2OI = np.asarray(pair.weight[...], np.float64)
    for i in range(2):
        np.testing.assert_allclose(y_2BTO[i], x_BTI @ weight_2OI[i].T + bias_2O[i], atol=1e-5)
    weight = np.einsum("pbto,bti->poi", dy_2BTO, x_BTI)
    np.testing.assert_allclose(dparams["weight"][...], weight, atol=1e-5)
    np.testing.assert_allclose(dparams["bias"][...], dy_2BTO.sum((1, 2)), atol=1e-5)
    np.testing.assert_allclose(dx_BTI, np.einsum("pbto,poi->bti", dy_2BTO, weight_2OI), atol=1e-5)


def test_a_pair_starts_as_one_matrix_of_twice_the_size():
    pair, whole = LinearPair(5, 4, rngs=nnx.Rngs(3)), Linear(5, 8, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(pair.weight[...].reshape(8, 5), whole.weight[...])
