"""Position schemes: against their definitions in float64, and their one law, relative distance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.config import ConfigError, build
from memjax.mixers import Attention
from memjax.positions import ALiBi, NoPE, Rotary, apply_position

SIZE = 16


def turned(config, position):
    """Keys of ones in the first channels of each pair: cos and sin of the angles."""
    x_BTHK = jnp.concatenate([jnp.ones((1, 1, 1, SIZE // 2)), jnp.zeros((1, 1, 1, SIZE // 2))], -1)
    y = apply_position(config, x_BTHK, jnp.full((1, 1), position, jnp.int32))[0, 0, 0]
    return np.asarray(y[: SIZE // 2]), np.asarray(y[SIZE // 2 :])


def yarn(base, factor, trained, size):
    """Section 3.2 and Eq. 15 of arXiv:2309.00071, one pair at a time."""
    out = []
    for pair in range(size // 2):
        theta = base ** (-2 * pair / size)
        wavelength = 2 * math.pi / theta
        ratio = trained / wavelength
        gamma = 0.0 if ratio < 1 else 1.0 if ratio > 32 else (ratio - 1) / (32 - 1)
        out.append((1 - gamma) * theta / factor + gamma * theta)
    return np.array(out)


PLAIN = 10_000.0 ** (-2 * np.arange(SIZE // 2) / SIZE)
SCHEMES = {
    "plain": (Rotary(), PLAIN, 1.0),
    "linear": (Rotary(scaling="linear", factor=4.0), PLAIN / 4, 1.0),
    "ntk": (
        Rotary(scaling="ntk", factor=4.0),
        (10_000.0 * 4 ** (SIZE / (SIZE - 2))) ** (-2 * np.arange(SIZE // 2) / SIZE),
        1.0,
    ),
    "yarn": (
        Rotary(scaling="yarn", factor=8.0, trained=512),
        yarn(10_000.0, 8.0, 512, SIZE),
        0.1 * math.log(8.0) + 1,
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("position", [0, 1, 300, 4095, 4096, 1_000_003])
def test_angles_are_position_times_the_frequency_of_the_paper(name, position):
    config, frequency, amplitude = SCHEMES[name]
    cos, sin = turned(config, position)
    np.testing.assert_allclose(cos, amplitude * np.cos(position * frequency), atol=3e-4)
    np.testing.assert_allclose(sin, amplitude * np.sin(position * frequency), atol=3e-4)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    config = SCHEMES["yarn"][0]
    got = config.frequencies(SIZE)
    assert got[0] == PLAIN[0]
    np.testing.assert_allclose(got[-1], PLAIN[-1] / 8)
    blended = (got < PLAIN * 0.999) & (got > PLAIN / 8 * 1.001)
    assert blended.any()


def test_products_of_turned_vectors_depend_on_their_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, SIZE))
    for config, _, _ in SCHEMES.values():

        def product(i, j, config=config):
            at = lambda p: jnp.full((1, 1), p, jnp.int32)  # noqa: E731
            return jnp.sum(apply_position(config, q, at(i)) * apply_position(config, k, at(j)))

        np.testing.assert_allclose(product(7, 3), product(5007, 5003), rtol=2e-3, atol=2e-3)


def test_nope_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, SIZE))
    np.testing.assert_array_equal(apply_position(NoPE(), x, jnp.arange(3)[None]), x)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(ALiBi().slopes(8), [2.0**-h for h in range(1, 9)])
    np.testing.assert_allclose(ALiBi().slopes(16), [2.0 ** (-h / 2) for h in range(1, 17)])
    # Not a power of two: those of 8 heads, then the 1st, 3rd, 5th and 7th of 16.
    more = [2.0 ** (-h / 2) for h in (1, 3, 5, 7)]
    np.testing.assert_allclose(ALiBi().slopes(12), [2.0**-h for h in range(1, 9)] + more)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "rotary", "factor": 2.0}, 'factor=2.0 has no effect with scaling="none"'),
        ({"kind": "rotary", "factor": 0.5, "scaling": "ntk"}, "must be at least 1"),
        ({"kind": "rotery"}, "did you mean rotary?"),
    ],
)
def test_mistakes_name_the_field(fields, message):
    with pytest.raises(ConfigError, match="config.position") as error:
        build(Attention, {"position": fields})
    assert message in str(error.value)
