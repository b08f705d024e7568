"""The laws of the contract, on every mixer of the registry.

Tolerance: float32 sums in another order differ by a few units in the last place of values of
order one; 2e-5 leaves room for the products of two of them.

Nearly all of the time goes into compilation: tests share a few lengths, programs are whole, and
what needs a gradient weights the outputs of one program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONFIGS, KINDS, VARIANTS, WIDTH, apply, busy_state, mixer_of, segment
from flax import nnx
from oracles.mixers import ORACLES

from memjax.mixers import MIXERS

CLOSE = dict(rtol=2e-5, atol=2e-5)
LENGTH = 37
ONE_FORM = {
    "all_attention",  # blocks are as long as the reach
    "base_conv",  # a convolution of a few taps is all there is
    "compressive",  # whole segments, each by itself
    "landmark",  # whole blocks, each by itself
}
# Of their states the gradient reaches some leaves and not others; see test_mixer_memories.
IN_PART = {
    "compressive",  # its memories have none
    "landmark",  # counts its blocks in floating point
}
IN_PART_CLASSES = tuple(MIXERS[kind][1] for kind in IN_PART)
RESETS = [(0, 5), (0, 6), (1, 0), (1, 21), (2, 36)]


def assert_close(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or CLOSE))


@pytest.fixture(params=KINDS, scope="module")
def mixer(request):
    return mixer_of(request.param)


def floats(state):
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@jax.jit
def weighted(mixer, start, x, reset, y_weight, state_weight):
    """State, outputs, and the gradients of their weighted squares for (start, x)."""

    def loss(start, x):
        state, y = mixer(start, x, reset)
        squares = sum((leaf**2).sum() for leaf in floats(state))
        return (y_weight[:, None] * y**2).sum() + state_weight * squares, (state, y)

    gradients, (state, y) = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(start, x)
    return state, y, *gradients


@pytest.mark.parametrize(
    "split", [(5, 16, 16), (16, 5, 16), (1,) * 5 + (16, 16), (16, 16) + (1,) * 5]
)
def test_any_split_equals_whole(mixer, split):
    check_split(mixer, split)


@pytest.mark.parametrize("name", VARIANTS)
def test_any_split_equals_whole_with_other_settings(name):
    check_split(mixer_of(name), (5, 16, 16))


def check_split(mixer, split):
    x, reset = segment(LENGTH, resets=RESETS)
    start = busy_state(mixer)
    want_state, want = apply(mixer, start, x, reset)
    state, parts, at = start, [], 0
    for length in split:
        state, y = apply(mixer, state, x[:, at : at + length], reset[:, at : at + length])
        parts.append(y)
        at += length
    assert_close(jnp.concatenate(parts, 1), want)
    assert_close(state, want_state)


def test_mixer_is_the_body_of_a_scan_over_segments(mixer):
    x, reset = segment(32, resets=[(0, 5), (1, 16)])
    pieces = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(3, 2, 16, *a.shape[2:]), 1, 0), (x, reset)
    )
    scan = jax.jit(lambda mixer, *xs: jax.lax.scan(lambda s, xs: mixer(s, *xs), *xs))
    state, y = scan(mixer, mixer.init_state(3), pieces)
    want_state, want = apply(mixer, mixer.init_state(3), x, reset)
    assert_close(jnp.moveaxis(y, 0, 1).reshape(want.shape), want)
    assert_close(state, want_state)


def test_outputs_do_not_depend_on_later_tokens(mixer):
    x, reset = segment(LENGTH)
    start = busy_state(mixer)
    for t in (1, 20, 36):
        _, changed = apply(mixer, start, x.at[:, t:].add(3.0), reset)
        _, whole = apply(mixer, start, x, reset)
        np.testing.assert_allclose(changed[:, :t], whole[:, :t], rtol=1e-6, atol=1e-6)
        assert jnp.abs(changed[:, t:] - whole[:, t:]).max() > 1e-3
    early = (jnp.arange(LENGTH) < 20).astype(float)
    *_, gradient = weighted(mixer, start, x, reset, early, 0.0)
    assert jnp.abs(gradient[:, 20:]).max() == 0
    assert jnp.abs(gradient[:, :20]).max() > 0


def test_nothing_crosses_a_reset(mixer):
    x, reset = segment(LENGTH, resets=[(0, 21), (1, 21), (2, 21)])
    start = busy_state(mixer)
    state, y = apply(mixer, start, x, reset)
    want_state, want = apply(mixer, mixer.init_state(3), x[:, 21:], reset[:, 21:].at[:].set(False))
    assert_close(y[:, 21:], want)
    assert_close(state, want_state)
    after = (jnp.arange(LENGTH) >= 21).astype(float)
    *_, from_state, from_x = weighted(mixer, start, x, reset, after, 1.0)
    assert max(float(jnp.abs(leaf).max(initial=0)) for leaf in floats(from_state)) == 0
    assert jnp.abs(from_x[:, :21]).max() == 0
    assert jnp.abs(from_x[:, 21:]).max() > 0


def test_gradient_reaches_the_state_before_the_segment(mixer):
    x, reset = segment(LENGTH)
    start = busy_state(mixer)
    if not floats(start) or all(leaf.size == 0 for leaf in floats(start)):
        assert mixer.reach == 1  # a window of one token has nothing to remember
        return
    *_, gradient, _ = weighted(mixer, start, x, reset, jnp.ones(LENGTH), 0.0)
    reached = [leaf.size == 0 or jnp.abs(leaf).max() > 0 for leaf in floats(gradient)]
    assert all(jnp.isfinite(leaf).all() for leaf in floats(gradient))
    assert any(reached) if isinstance(mixer, IN_PART_CLASSES) else all(reached)


def test_lanes_are_independent(mixer):
    x, reset = segment(LENGTH, resets=[(0, 5), (1, 0)])
    start = busy_state(mixer)
    state, y = apply(mixer, start, x, reset)
    order = jnp.array([2, 0, 1])
    swapped = jax.tree.map(lambda a: a[order], (start, x, reset))
    assert_close(apply(mixer, *swapped), jax.tree.map(lambda a: a[order], (state, y)))
    _, other = apply(mixer, start, x.at[0].add(5.0), reset.at[0].set(True))
    np.testing.assert_allclose(other[1:], y[1:], rtol=1e-6, atol=1e-6)


def test_padding_at_the_end_changes_no_real_output(mixer):
    x, reset = segment(LENGTH)
    _, y = apply(mixer, mixer.init_state(3), x, reset)
    _, padded = apply(mixer, mixer.init_state(3), x.at[:, 31:].set(0.0), reset)
    np.testing.assert_allclose(padded[:, :31], y[:, :31], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_mixer_equals_the_token_loop_of_its_paper(name):
    mixer = mixer_of(name)
    x, reset = segment(LENGTH, resets=RESETS)
    params = nnx.to_pure_dict(nnx.state(mixer, nnx.Param))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    oracle = ORACLES[CONFIGS[name].kind]
    want = oracle(params, CONFIGS[name], np.asarray(x, np.float64), np.asarray(reset))
    _, y = apply(mixer, mixer.init_state(3), x, reset)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_speed_settings_do_not_change_the_mathematics(name):
    config = CONFIGS[name]
    fields = {f.name for f in dataclasses.fields(config)}
    others = [dict(impl="reference")] if "impl" in fields else []
    others += [dict(chunk=5)] if "chunk" in fields and name in KINDS else []
    others += [dict(unroll=1)] if "unroll" in fields else []
    if not others:
        assert config.kind in ONE_FORM, "list a mixer that needs no chunked form there"
        return
    mixer = mixer_of(name)
    x, reset = segment(LENGTH, resets=RESETS)
    start, ones = busy_state(mixer), jnp.ones(LENGTH)
    *want, _, gradient = weighted(mixer, start, x, reset, ones, 1.0)
    definition, params = nnx.split(mixer)
    for change in others:
        twin = MIXERS[config.kind][1](
            dataclasses.replace(config, **change), WIDTH, rngs=nnx.Rngs(0)
        )
        twin = nnx.merge(nnx.split(twin)[0], params)
        *got, _, twin_gradient = weighted(twin, start, x, reset, ones, 1.0)
        assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert_close(twin_gradient, gradient, rtol=2e-3, atol=2e-4 * jnp.abs(gradient).max())


@pytest.mark.parametrize("name", MIXERS)
def test_long_segments_with_extreme_inputs_stay_finite(name):
    mixer = mixer_of(name)
    x = jax.random.normal(jax.random.key(3), (1, 4096, WIDTH))
    reset = jnp.zeros((1, 4096), bool)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(mixer, x):
        state, y = mixer(mixer.init_state(1), x, reset)
        return (y**2).mean(), (state, y)

    for scale in (1e-3, 100.0):
        for leaf in jax.tree.leaves(run(mixer, scale * x)):
            assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_inputs_stay_near_float32(name):
    mixer = mixer_of(name)
    x, reset = segment(LENGTH, resets=RESETS)
    x = x.astype(jnp.bfloat16)
    state, y = apply(mixer, mixer.init_state(3), x, reset)
    want_state, want = apply(mixer, mixer.init_state(3), x.astype(jnp.float32), reset)
    assert y.dtype == jnp.bfloat16
    assert all(
        a.dtype == b.dtype for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want_state))
    )
    # bfloat16 keeps 8 bits: 0.4% a rounding, some ten roundings deep. Over all outputs: where what
    # a head reads cancels, the norm behind it makes much of the rounding of that one token.
    error = jnp.linalg.norm(y.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 0.04


@pytest.mark.parametrize("kind", MIXERS)
def test_memory_report_states_the_bytes_that_the_state_has(kind):
    config, mixer = MIXERS[kind]
    mixer = mixer(config(), WIDTH, rngs=nnx.Rngs(0))
    state = mixer.init_state(2)
    report = mixer.memory_report(64, state)
    assert report.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // 2
    assert report.flops_per_token > 0
    assert report.telemetry
