"""selective_scan against a token loop, its gradients, its extremes, and the memory that it takes.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import assert_near
from oracles.selective_scan import selective_scan as oracle
from scans import assert_chunks_equal_the_token_loop, outputs_and_gradients, resets

from pallas_kernels import selective_scan

BATCH, TOKENS, CHANNELS, STATES = 3, 37, 5, 4


def draw(tokens=TOKENS, batch=BATCH, dtype=np.float64):
    """Arguments by name; time times rate runs from near 0 to about 50."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    args = {
        "x": normal((batch, tokens, CHANNELS)),
        "dt": np.exp(1.5 * normal((batch, tokens, CHANNELS)) - 1),
        "A": -np.exp(normal((CHANNELS, STATES))),
        "B": normal((batch, tokens, STATES)),
        "C": normal((batch, tokens, STATES)),
        "D": normal(CHANNELS),
        "initial_state": normal((batch, CHANNELS, STATES)),
    }
    return {name: array.astype(dtype) for name, array in args.items()}


def expected(args, reset):
    return oracle(*(args[n] for n in ("x", "dt", "A", "B", "C", "D", "initial_state")), reset)


@pytest.mark.parametrize("packed, chunk", [(True, 16), (False, 7), (True, 1), (True, 64)])
def test_chunks_equal_the_token_loop_and_its_gradients(packed, chunk):
    args, reset = draw(), resets() if packed else None
    assert_chunks_equal_the_token_loop(selective_scan, args, reset, expected(args, reset), chunk)


def test_no_skip_no_state_and_no_reset_are_zeros():
    args = draw()
    want = {**args, "D": 0 * args["D"], "initial_state": 0 * args["initial_state"]}
    del args["D"], args["initial_state"]
    with jax.enable_x64(True):
        out = selective_scan(**{name: jnp.asarray(array) for name, array in args.items()})
    assert_near(out, expected(want, None), 1e-9)


@pytest.mark.parametrize("split", [1, 16, 30])
def test_any_split_equals_whole(split):
    args, reset = draw(), resets()
    parts = []
    with jax.enable_x64(True):
        part = {name: jnp.asarray(array) for name, array in args.items()}
        for piece in (slice(0, split), slice(split, None)):
            part |= {name: jnp.asarray(args[name][:, piece]) for name in ("x", "dt", "B", "C")}
            fresh = jnp.asarray(reset[:, piece])
            y, part["initial_state"] = selective_scan(**part, reset=fresh, chunk=16)
            parts.append(y)
    out = np.concatenate(parts, 1), part["initial_state"]
    assert_near(out, expected(args, reset), 1e-9)


def test_nothing_crosses_a_reset_not_even_infinity():
    args, reset = draw(dtype=np.float32), resets([(0, 9), (1, 9), (2, 9)])
    args["x"][:, 3] = np.inf

    def after(args):
        y, state = selective_scan(**args, reset=jnp.asarray(reset), chunk=16)
        return jnp.sum(y[:, 9:] ** 2) + jnp.sum(state**2)

    args = {name: jnp.asarray(array) for name, array in args.items()}
    assert jnp.isfinite(after(args))
    args["x"] = args["x"].at[:, 3].set(1e4)
    got = jax.grad(after)(args)
    assert jnp.abs(got.pop("initial_state")).max() == 0
    for name in ("x", "dt", "B", "C"):
        assert jnp.abs(got[name][:, :9]).max() == 0
        assert jnp.isfinite(got[name]).all()
        assert jnp.abs(got[name][:, 9:]).max() > 0


def test_4096_tokens_with_decays_near_0_and_1_agree_with_the_definition():
    args = draw(tokens=4096, batch=1, dtype=np.float32)
    times = np.array([0.0, 1e-6, 1.0, 1e4], np.float32)
    args["dt"][:, :, :4] = times
    args["dt"][:, :, 4] = np.random.default_rng(2).choice(times, args["dt"][:, :, 4].shape)
    out, gradients = outputs_and_gradients(selective_scan, args)
    with jax.enable_x64(True):
        wide = {name: array.astype(np.float64) for name, array in args.items()}
        want, want_gradients = outputs_and_gradients(selective_scan, wide, impl="reference")
    # float32 sums of 4,096 terms: some 60 units in the last place of the largest.
    assert_near(out, want, 1e-5)
    for name in args:
        assert jnp.isfinite(gradients[name]).all()
        assert_near(gradients[name], want_gradients[name], 1e-4)


def test_bfloat16_stays_near_float32_with_a_float32_state():
    args = draw(dtype=np.float32)
    half = {name: jnp.asarray(array) for name, array in args.items()}
    half |= {name: half[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    (y, state), gradients = outputs_and_gradients(selective_scan, half)
    assert y.dtype == gradients["x"].dtype == jnp.bfloat16
    assert state.dtype == gradients["dt"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few roundings deep
    assert_near((y.astype(jnp.float32), state), expected(args, None), 0.02)


def test_training_never_holds_the_state_of_every_token():
    shapes = {"x": (1, 2048, 64), "dt": (1, 2048, 64), "A": (64, 16), "D": (64,)}
    shapes |= {"B": (1, 2048, 16), "C": (1, 2048, 16), "initial_state": (1, 64, 16)}
    args = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def loss(args, impl):
        y, state = selective_scan(**args, impl=impl)
        return jnp.sum(y**2) + jnp.sum(state**2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole = 4 * 2048 * 64 * 16
    taken = {
        impl: gradient.lower(args, impl).compile().memory_analysis().temp_size_in_bytes
        for impl in ("xla", "reference")
    }
    assert taken["xla"] < whole < taken["reference"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(A=1.0), "A has a value of 1; it must be at most 0"),
        (dict(dt=-1.0), "dt has a value of -1; it must be at least 0"),
    ],
)
def test_signs_that_would_let_states_grow_are_refused(change, message):
    args = {name: jnp.asarray(array) for name, array in draw(dtype=np.float32).items()}
    args |= {name: jnp.full_like(args[name], value) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**args)
