"""The lower bounds of HGRN2, which couple the layers of a model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memjax.mixers import HGRN2
from memjax.mixers.hgrn2 import HGRN2Mixer, bound_logits
from memjax.model import LanguageModel, Model


def bounds(table_LF):
    """arXiv:2311.04823, Eq. 5: the share of the rows after the first, up to the layer's own."""
    shares_LF = np.exp(table_LF) / np.exp(table_LF).sum(0)
    return np.cumsum(shares_LF, 0) - shares_LF[0]


def test_bounds_are_the_cumulative_shares_of_the_table_and_0_in_the_first_layer():
    table_LF = 3 * np.random.default_rng(0).standard_normal((5, 7))
    logits_LF = bound_logits(jnp.asarray(table_LF, jnp.float32))
    np.testing.assert_allclose(jax.nn.sigmoid(logits_LF), bounds(table_LF), rtol=2e-6, atol=1e-30)
    assert jnp.isfinite(bound_logits(jnp.zeros((1, 3)))).all()


def test_gradient_of_the_table_is_finite_and_that_of_a_sum():
    table_LF = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2)), jnp.float32)
    gradient = jax.grad(lambda t: jax.nn.sigmoid(bound_logits(t))[1:].sum())(table_LF)

    def plain(table_LF):
        shares_LF = jax.nn.softmax(table_LF, 0)
        return (jnp.cumsum(shares_LF, 0) - shares_LF[0])[1:].sum()

    np.testing.assert_allclose(gradient, jax.grad(plain)(table_LF), rtol=1e-5, atol=1e-6)


def test_layers_of_a_model_use_the_bounds_of_the_table():
    config = Model(
        d_model=16,
        pattern=("hgrn2", "hgrn2"),
        repeat=2,
        mixers={"hgrn2": HGRN2(expand=8)},
        mlp=None,
    )
    lm = LanguageModel(config, 31, rngs=nnx.Rngs(0))
    table_LF = np.random.default_rng(2).standard_normal((4, 16)).astype(np.float32)
    blocks = list(lm.stack.patterns.blocks.values())
    for i, block in enumerate(blocks):
        block.mixer.lower[...] = jnp.asarray(table_LF[i::2])
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
    reset_BT = jnp.zeros((2, 9), bool)
    _, logits_BTY = lm(lm.init_state(2), tokens_BT, reset_BT)

    bound_LF = bounds(table_LF.astype(np.float64))
    x_BTD = lm.embedding[...][tokens_BT]
    for layer in range(4):
        own = nnx.state(blocks[layer % 2], nnx.Param)
        own = jax.tree.map(lambda leaf, row=layer // 2: leaf[row], nnx.to_pure_dict(own))
        mixer = HGRN2Mixer(HGRN2(expand=8), 16, rngs=nnx.Rngs(0))
        nnx.update(mixer, nnx.State(own["mixer"]))
        bound_F = np.clip(bound_LF[layer], 1e-12, None)
        mixer.lower[...] = jnp.asarray(np.log(bound_F) - np.log1p(-bound_F), jnp.float32)
        square = jnp.mean(x_BTD**2, -1, keepdims=True)
        normed = x_BTD * jax.lax.rsqrt(square + 1e-6) * own["mixer_norm"]["weight"]
        x_BTD = x_BTD + mixer(mixer.init_state(2), normed, reset_BT)[1]
    want = lm.logits(lm.norm(x_BTD))
    np.testing.assert_allclose(logits_BTY, want, rtol=1e-4, atol=1e-5)
    blocks[1].mixer.lower[...] += jnp.asarray([[0.0], [3.0]])
    changed = lm(lm.init_state(2), tokens_BT, reset_BT)[1]
    assert jnp.abs(changed - logits_BTY).max() > 1e-4
