"""Linear memories that are special cases of one another give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.config import FieldError
from memjax.mixers import Based, DeltaNet, GatedDeltaNet, RetNet
from memjax.mixers.based import BasedMixer
from memjax.mixers.deltanet import DeltaNetMixer
from memjax.mixers.gated_deltanet import GatedDeltaNetMixer
from memjax.mixers.linear_transformer import features
from memjax.mixers.retnet import RetNetMixer
from memjax.positions import ALiBi, NoPE
from pallas_kernels import attention, delta_rule, linear_attention

WIDTH, HEADS = 16, 2
CLOSE = dict(rtol=1e-5, atol=1e-5)


def inputs(length=41, batch=2):
    x_BTD = jax.random.normal(jax.random.key(2), (batch, length, WIDTH))
    reset_BT = jnp.zeros((batch, length), bool).at[0, 13].set(True)
    return x_BTD, reset_BT


def heads(x_BTF):
    return x_BTF.reshape(*x_BTF.shape[:2], HEADS, -1)


def test_delta_rule_without_decay_equals_the_gated_one_with_decay_of_1():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 41, HEADS, 5))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.random.uniform(jax.random.key(1), (2, 41, HEADS))
    plain = delta_rule(q, k, v, beta)
    for zeros in (jnp.zeros((2, 41, HEADS)), jnp.zeros((2, 41, HEADS, 5))):
        for got, want in zip(delta_rule(q, k, v, beta, zeros), plain, strict=True):
            np.testing.assert_allclose(got, want, **CLOSE)


def test_deltanet_is_gated_deltanet_that_never_forgets():
    size = WIDTH // HEADS
    mixer = DeltaNetMixer(DeltaNet(heads=HEADS), WIDTH, rngs=nnx.Rngs(0))
    config = GatedDeltaNet(heads=HEADS, key_size=size, value_size=size)
    twin = GatedDeltaNetMixer(config, WIDTH, rngs=nnx.Rngs(1))
    for name in ("query", "key", "value"):
        stream, other = getattr(mixer, name), getattr(twin, name)
        stream.project.weight[...] = 20 * stream.project.weight[...]
        nnx.update(other, nnx.state(stream))
    twin.beta.weight[...] = mixer.beta.weight[...]
    twin.log_rate[...] = jnp.full((HEADS,), -100.0)
    x, reset = inputs()
    state, _ = mixer(mixer.init_state(2), x, reset)
    want, _ = twin(twin.init_state(2), x, reset)
    assert np.abs(state.memory_BHKV).max() > 0.1
    for got, other in zip(state, want, strict=True):
        np.testing.assert_allclose(got, other, **CLOSE)


def test_retnet_is_linear_attention_with_constant_decays():
    mixer = RetNetMixer(RetNet(heads=HEADS, position=NoPE()), WIDTH, rngs=nnx.Rngs(0))
    x, reset = inputs()
    state, y = mixer(mixer.init_state(2), x, reset)
    decay_H = jnp.log(jnp.array([1 - 1 / 32, 1 - 1 / 64]))
    q, k, v = (heads(project(x)) for project in (mixer.query, mixer.key, mixer.value))
    decay_BTH = jnp.broadcast_to(decay_H, (2, 41, HEADS))
    o, memory = linear_attention(q, k, v, decay_BTH, reset=reset)
    np.testing.assert_allclose(state.memory_BHKV, memory, **CLOSE)
    np.testing.assert_allclose(y, mixer.readout(o, x), **CLOSE)


def test_rotary_retention_depends_on_distances_alone():
    mixer = RetNetMixer(RetNet(heads=HEADS), WIDTH, rngs=nnx.Rngs(0))
    x, _ = inputs()
    reset = jnp.zeros(x.shape[:2], bool)
    far = mixer.init_state(2)._replace(position_B=jnp.array([1000, 54321], jnp.int32))
    state, y = mixer(mixer.init_state(2), x, reset)
    moved, want = mixer(far, x, reset)
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-3 * np.abs(y).max())
    assert np.abs(moved.memory_BHKV - state.memory_BHKV).max() > 1e-4  # but the keys turned
    np.testing.assert_array_equal(moved.position_B, [1041, 54362])


def test_retnet_refuses_positions_that_lower_logits():
    with pytest.raises(FieldError, match=r"position=.* lowers logits"):
        RetNet(position=ALiBi())


def test_based_is_near_softmax_attention_where_scores_are_small():
    """exp(s) = 1 + s + s^2 / 2 to a part in 1000 for |s| < 0.2: less than 1 + s is off by 2%."""
    mixer = BasedMixer(Based(heads=HEADS, key_size=4), WIDTH, rngs=nnx.Rngs(0))
    mixer.query.weight[...] *= 3.0
    x, reset = inputs()
    _, y = mixer(mixer.init_state(2), x, reset)
    q, k, v = (heads(project(x)) for project in (mixer.query, mixer.key, mixer.value))
    document = jnp.cumsum(reset, 1)
    want = mixer.out(attention(q, k, v, segment_ids=(document, document)).reshape(x.shape))
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_features_of_very_negative_inputs_keep_their_precision():
    got = features(jnp.array([-20.0, -1e4, 0.0, 3.0]))
    np.testing.assert_allclose(got, [np.exp(-20.0), 0.0, 1.0, 4.0], rtol=1e-6)
    gradient = jax.grad(lambda x: features(x).sum())(jnp.array([-2.0, 0.0, 5.0, -1e4]))
    np.testing.assert_allclose(gradient, [np.exp(-2.0), 1.0, 1.0, 0.0], rtol=1e-6)
