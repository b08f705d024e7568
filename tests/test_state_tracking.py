"""What a memory can keep in principle, with weights set by hand: nothing is trained.

A delta rule whose write strength reaches 2 reflects its memory at a key: memory = 2 v - memory, so
every 1 flips it between 0 and 2 v, and it holds the parity of all bits (arXiv:2411.12537). With
strengths below 1 the memory only moves towards v.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.mixers import DeltaNet, GatedDeltaNet
from memjax.stack import make_mixer
from pallas_kernels import delta_rule, linear_attention

BITS = 1000


def counter(config):
    """A mixer with one head that writes 1 at a bit of 1 as strongly as it can, and not at a 0."""
    mixer = make_mixer(config, 2, rngs=nnx.Rngs(0))
    for stream in (mixer.query, mixer.key, mixer.value):
        stream.project.weight[...] = jnp.ones_like(stream.project.weight[...])
    mixer.beta.weight[...] = jnp.array([[-40.0, 40.0]])
    if isinstance(config, GatedDeltaNet):
        mixer.log_rate[...] = jnp.full_like(mixer.log_rate[...], -100.0)
    return mixer


@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet])
@pytest.mark.parametrize("negative", [True, False])
def test_parity_of_1000_bits_is_kept_by_eigenvalues_of_minus_1_alone(kind, negative):
    config = kind(
        heads=1, key_size=1, value_size=1, conv=None, negative_eigenvalues=negative, chunk=64
    )
    bits = np.random.default_rng(0).integers(0, 2, BITS)
    x_BTD = jax.nn.one_hot(jnp.asarray(bits)[None], 2)

    @jax.jit
    def held(mixer, x_BTD):
        def token(state, x_BD):
            state, _ = mixer(state, x_BD[:, None], jnp.zeros((1, 1), bool))
            return state, state.memory_BHKV[0, 0, 0, 0]

        return jax.lax.scan(token, mixer.init_state(1), jnp.moveaxis(x_BTD, 1, 0))

    mixer = counter(config)
    state, memory_T = held(mixer, x_BTD)
    parity = np.cumsum(bits) % 2
    high = np.asarray(memory_T) > np.asarray(memory_T).max() / 2
    assert np.mean(high == parity) == 1 if negative else 0.4 < np.mean(high == parity) < 0.6
    whole, _ = mixer(mixer.init_state(1), x_BTD, jnp.zeros((1, BITS), bool))
    np.testing.assert_allclose(whole.memory_BHKV, state.memory_BHKV, atol=1e-4)


def test_a_key_written_twice_holds_the_last_value_in_a_delta_rule_and_their_sum_without_one():
    k = jnp.eye(4)[jnp.array([0, 1, 0])][None, :, None]
    v = jax.random.normal(jax.random.key(0), (1, 3, 1, 5))
    _, corrected = delta_rule(k, k, v, jnp.ones((1, 3, 1)))
    _, added = linear_attention(k, k, v)
    np.testing.assert_allclose(corrected[0, 0, :2], v[0, 2:0:-1, 0], rtol=1e-6)
    np.testing.assert_allclose(
        added[0, 0, :2], jnp.stack([v[0, 0, 0] + v[0, 2, 0], v[0, 1, 0]]), rtol=1e-6
    )


def test_a_linear_memory_of_4_channels_recalls_8_pairs_though_no_8_keys_are_orthogonal_in_it():
    """q . k is largest for the key asked: with values side by side, its value has the largest sum.

    So 4 by 16 is no limit for 8 pairs, where each value has a channel of its own.
    """
    rng = np.random.default_rng(0)
    keys_PK = rng.standard_normal((100, 8, 4))
    keys_PK /= np.linalg.norm(keys_PK, axis=-1, keepdims=True)
    values_P8 = rng.permuted(np.tile(np.arange(16), (100, 1)), axis=1)[:, :8]
    k_BTHK = jnp.asarray(keys_PK, jnp.float32)[:, :, None]
    v_BTHV = jax.nn.one_hot(jnp.asarray(values_P8), 16)[:, :, None]
    _, memory_BHKV = linear_attention(k_BTHK, k_BTHK, v_BTHV)
    asked_BTHV, kept_BHKV = linear_attention(
        k_BTHK[:, ::-1], jnp.zeros_like(k_BTHK), jnp.zeros_like(v_BTHV), None, memory_BHKV
    )
    np.testing.assert_array_equal(kept_BHKV, memory_BHKV)
    np.testing.assert_array_equal(jnp.argmax(asked_BTHV[:, ::-1, 0], -1), values_P8)
