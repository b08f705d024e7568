"""Titans beyond the laws: bad settings, and the point where its memory is the delta rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config import FieldError
from memjax.mixers import TitansMAC
from memjax.mixers.deep_memory import DeepMemory
from memjax.mixers.persistent import Prefix, attend_window
from pallas_kernels import delta_rule, neural_memory
from pallas_kernels.neural_memory import GradientDescent, LinearMap, Momentum


def draw(tokens=9):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, tokens, 3, 4)) for key in keys[:3])
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    rate = jax.random.uniform(keys[3], (2, tokens, 3))
    return q, k, v, rate, jax.random.normal(keys[4], (3, 4, 4))


def test_a_linear_memory_that_steps_at_every_token_is_the_delta_rule():
    q, k, v, rate, start = draw()
    o, state = neural_memory(
        *(q, k, v, rate),
        weights=(start,),
        update_every=1,
        structure=LinearMap(),
        learner=GradientDescent(),
    )
    lanes = jnp.broadcast_to(start, (2, *start.shape))
    want, last = delta_rule(q, k, v, rate, initial_state=lanes, scale=1.0)
    np.testing.assert_allclose(o, want, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(state.weights[0], last, rtol=1e-5, atol=1e-5)


def test_streams_that_a_learner_needs_or_has_no_use_for_are_named():
    q, k, v, rate, start = draw()
    call = dict(weights=(start,), structure=LinearMap())
    with pytest.raises(ValueError, match="Momentum.* needs log_momentum"):
        neural_memory(q, k, v, rate, learner=Momentum(), **call)
    with pytest.raises(ValueError, match="GradientDescent.* has no use for log_momentum"):
        neural_memory(q, k, v, rate, None, -rate, learner=GradientDescent(), **call)
    with pytest.raises(ValueError, match="weights have shapes"):
        neural_memory(q, k, v, rate, learner=GradientDescent(), weights=(start,))


def test_a_segment_holds_whole_blocks():
    with pytest.raises(FieldError, match="segment=100 must be a multiple of .*=32; try 96"):
        TitansMAC(segment=100)
    with pytest.raises(FieldError, match="memory.heads=3 must divide d_model=16"):
        TitansMAC(memory=DeepMemory(heads=3)).check_width(16)


def test_a_window_without_persistent_tokens_has_finite_gradients_where_its_last_block_is_short():
    window, tokens = 4, 6
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, tokens, 2, 4)) for key in keys)
    before = ((0, 0), (window - 1, 0), (0, 0), (0, 0))
    id_BT = jnp.zeros((1, tokens), jnp.int32)
    id_BJ = jnp.pad(id_BT, before[:2], constant_values=-1)
    none = jnp.zeros((2, 0, 4))

    def attended(q, k, v):
        there = (jnp.pad(k, before), jnp.pad(v, before), id_BJ)
        return attend_window((q, q, id_BT), there, Prefix(none, none), window=window)

    def plain(q, k, v):
        gap = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        scores = jnp.einsum("bthk,bjhk->bhtj", q, k) / 2
        scores = jnp.where((gap >= 0) & (gap < window), scores, -jnp.inf)
        o = jnp.einsum("bhtj,bjhk->bthk", jax.nn.softmax(scores, -1), v)
        return o.reshape(1, tokens, -1)

    cotangent = jax.random.normal(jax.random.key(1), (1, tokens, 8))
    ours, theirs = (jax.vjp(f, q, k, v) for f in (attended, plain))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for mine, want in zip(ours[1](cotangent), theirs[1](cotangent)):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-6)
