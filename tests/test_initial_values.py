"""Initial values that papers or their released code fix, of wide mixers, so that draws are many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memjax.mixers import (
    GLA,
    MLSTM,
    RGLRU,
    TTTMLP,
    Attention,
    GatedDeltaNet,
    Mamba,
    Mamba2,
    TTTLinear,
)
from memjax.stack import make_mixer

WIDTH = 256


def made(config):
    return make_mixer(config, WIDTH, rngs=nnx.Rngs(0))


def assert_fills(values, low, high, part=0.1):
    """Between low and high, and near both: within `part` of the range."""
    gap = part * (high - low)
    assert low <= values.min() < low + gap and high - gap < values.max() <= high


@pytest.mark.parametrize("config", [Mamba(), Mamba2(head_size=2), GatedDeltaNet(heads=64)])
def test_steps_start_log_uniform_between_a_thousandth_and_a_tenth(config):
    """arXiv:2312.00752, Sec. 3.6, which the other two papers take over."""
    step = np.log10(jax.nn.softplus(made(config).step_bias[...]))
    np.testing.assert_allclose(step.mean(), -2, atol=0.2)
    assert_fills(step, -3 - 1e-5, -1 + 1e-5)


def test_mamba_starts_with_rates_1_to_n_in_every_channel_and_a_skip_of_1():
    mixer = made(Mamba(states=16))
    rates_EN = np.exp(mixer.log_rate[...]).reshape(-1, 16)
    np.testing.assert_allclose(rates_EN, np.tile(np.arange(1.0, 17), (2 * WIDTH, 1)), rtol=1e-5)
    np.testing.assert_array_equal(mixer.skip[...], 1)
    assert_fills(mixer.step[...], -(mixer.rank**-0.5), mixer.rank**-0.5)  # W_dt


def test_mamba2_starts_with_rates_between_1_and_16_and_a_skip_of_1():
    mixer = made(Mamba2(head_size=2))
    assert_fills(np.exp(mixer.log_rate[...]), 1 - 1e-5, 16 + 1e-4)
    np.testing.assert_array_equal(mixer.skip[...], 1)


def test_rg_lru_starts_with_decays_between_0_9_and_0_999_where_its_gate_is_open():
    """arXiv:2402.19427, Sec. 2.4: a^c, which is the decay at a recurrence gate of 1."""
    decay = np.exp(-8 * jax.nn.softplus(made(RGLRU(width=512)).rate[...]))
    assert_fills(decay, 0.9 - 1e-6, 0.999 + 1e-6)
    np.testing.assert_allclose(decay.mean(), 0.9495, atol=0.005)


def test_gla_starts_near_a_decay_of_half_to_the_sixteenth():
    """arXiv:2312.06635, Sec. 4.4: sigmoid(0)^(1/16) = 0.958."""
    mixer = made(GLA())
    x_BTD = jax.random.normal(jax.random.key(0), (1, 64, WIDTH))
    score = mixer.decay(mixer.decay_into(x_BTD))
    np.testing.assert_allclose(np.exp(jax.nn.log_sigmoid(score) / 16), 0.5 ** (1 / 16), atol=5e-3)


def test_mlstm_starts_as_its_released_code():
    """sqrt(2 / (5 d_model)) for the block-diagonal maps as well; gates by their biases alone."""
    mixer, small = made(MLSTM(heads=4)), (2 / (5 * WIDTH)) ** 0.5
    for part in (mixer.up, mixer.query, mixer.key, mixer.value):
        np.testing.assert_allclose(np.std(part.weight[...]), small, rtol=0.03)
    np.testing.assert_array_equal(mixer.gate_weight[...], 0)
    np.testing.assert_allclose(mixer.gate_bias[...][4:], np.linspace(3, 6, 4), rtol=1e-6)
    assert 0 < np.abs(mixer.gate_bias[...][:4]).max() < 0.5  # N(0, 0.1)
    np.testing.assert_array_equal(mixer.skip[...], 1)


@pytest.mark.parametrize("config, base", [(TTTLinear(heads=4), 1.0), (TTTMLP(heads=4), 0.1)])
def test_ttt_starts_with_half_its_base_rate_over_the_head_size(config, base):
    """arXiv:2407.04620, Sec. 2.7: base_rate sigmoid(0) / K, and 1 / i for the i-th of a block."""
    mixer = made(config)
    x_BTD = jnp.zeros((1, 32, WIDTH))
    _, inputs = mixer.backbone.inputs(mixer.init_state(1), x_BTD, jnp.zeros((1, 32), bool))
    np.testing.assert_allclose(inputs.rate_BTH, base / 2 / (WIDTH // 4), rtol=1e-6)
    np.testing.assert_allclose(inputs.place_rate_C, 1 / np.arange(1, 17), rtol=1e-6)
    for weight in mixer.initial_memory():
        if np.any(weight):
            np.testing.assert_allclose(np.std(weight), 0.02, rtol=0.03)


def test_sinks_of_attention_start_near_0_as_in_the_released_code_of_gpt_oss():
    sinks_H = made(Attention(heads=128, sinks=True)).sinks[...]
    np.testing.assert_allclose([sinks_H.mean(), sinks_H.std()], [0, 0.02], atol=0.006)
