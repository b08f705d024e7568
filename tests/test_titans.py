"""Titans beyond the laws: bad settings, and the point where its memory is the delta rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config import FieldError
from memjax.mixers import TitansMAC
from memjax.mixers.deep_memory import DeepMemory
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
