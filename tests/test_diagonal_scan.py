"""diagonal_scan against a token loop, its gradients and its extremes.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import assert_near
from oracles.diagonal_scan import diagonal_scan as oracle
from scans import assert_chunks_equal_the_token_loop, outputs_and_gradients, resets

from pallas_kernels import diagonal_scan

BATCH, TOKENS, CHANNELS = 3, 37, 5


def draw(tokens=TOKENS, batch=BATCH, dtype=np.float64):
    normal = np.random.default_rng(0).standard_normal
    shape = (batch, tokens, CHANNELS)
    args = {"x": normal(shape), "log_decay": -np.exp(2 * normal(shape))}
    args["initial_state"] = normal((batch, CHANNELS))
    return {name: array.astype(dtype) for name, array in args.items()}


def expected(args, reset):
    return oracle(args["x"], args["log_decay"], args["initial_state"], reset)


@pytest.mark.parametrize("packed, chunk", [(True, 16), (False, 7), (True, 1), (True, 64)])
def test_chunks_equal_the_token_loop_and_its_gradients(packed, chunk):
    args, reset = draw(), resets() if packed else None
    assert_chunks_equal_the_token_loop(diagonal_scan, args, reset, expected(args, reset), chunk)


@pytest.mark.parametrize("split", [1, 16, 30])
def test_any_split_equals_whole(split):
    args, reset = draw(), resets()
    state, parts = args["initial_state"], []
    with jax.enable_x64(True):
        for piece in (slice(0, split), slice(split, None)):
            x, log_decay = (jnp.asarray(args[name][:, piece]) for name in ("x", "log_decay"))
            fresh = jnp.asarray(reset[:, piece])
            h, state = diagonal_scan(x, log_decay, jnp.asarray(state), fresh, chunk=16)
            parts.append(h)
    assert_near((np.concatenate(parts, 1), state), expected(args, reset), 1e-9)


def test_no_state_is_a_state_of_zeros():
    args = draw()
    args["initial_state"] = 0 * args["initial_state"]
    with jax.enable_x64(True):
        out = diagonal_scan(jnp.asarray(args["x"]), jnp.asarray(args["log_decay"]), chunk=8)
    assert_near(out, expected(args, None), 1e-9)


def test_nothing_crosses_a_reset():
    args, reset = draw(dtype=np.float32), resets([(0, 9), (1, 9), (2, 9)])
    args["log_decay"][:, 9] = 0.0  # the reset alone parts the documents

    def after(args):
        h, state = diagonal_scan(**args, reset=jnp.asarray(reset), chunk=16)
        return jnp.sum(h[:, 9:] ** 2) + jnp.sum(state**2)

    got = jax.grad(after)({name: jnp.asarray(array) for name, array in args.items()})
    assert jnp.abs(got.pop("initial_state")).max() == 0
    for gradient in got.values():
        assert jnp.abs(gradient[:, :9]).max() == 0
        assert jnp.abs(gradient[:, 9:]).max() > 0
    assert jnp.abs(got["log_decay"][:, 9]).max() == 0


def test_4096_tokens_with_decays_near_0_and_1_agree_with_the_definition():
    args = draw(tokens=4096, batch=1, dtype=np.float32)
    levels = np.array([-np.inf, -30.0, -1e-6, 0.0], np.float32)
    args["log_decay"][:, :, :4] = levels
    mixed = np.random.default_rng(2).choice(levels, args["log_decay"][:, :, 4].shape)
    args["log_decay"][:, :, 4] = mixed
    out, gradients = outputs_and_gradients(diagonal_scan, args)
    with jax.enable_x64(True):
        wide = {name: array.astype(np.float64) for name, array in args.items()}
        want, want_gradients = outputs_and_gradients(diagonal_scan, wide, impl="reference")
    # A decay near 1 is rounded by up to 3e-8 in float32, and acts up to 4,096 times.
    assert_near(out, want, 1e-4)
    for name in args:
        assert jnp.isfinite(gradients[name]).all()
        assert_near(gradients[name], want_gradients[name], 1e-4)


def test_bfloat16_stays_near_float32_with_a_float32_state():
    args = draw(dtype=np.float32)
    half = {name: jnp.asarray(array) for name, array in args.items()}
    half["x"] = half["x"].astype(jnp.bfloat16)
    (h, state), gradients = outputs_and_gradients(diagonal_scan, half)
    assert h.dtype == gradients["x"].dtype == jnp.bfloat16
    assert state.dtype == gradients["log_decay"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding
    assert_near((h.astype(jnp.float32), state), expected(args, None), 0.01)
