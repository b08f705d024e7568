"""The language model: the laws of a mixer hold for it, and speed settings change nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import apply, model_of
from flax import nnx

from memjax.config import ConfigError
from memjax.layers import GeGLU
from memjax.mixers import LSTM, MIXERS, Attention
from memjax.mixers.lstm import LSTMMixer
from memjax.model import LANE_AXIS, LanguageModel, Model, logical_axes, merge, split
from memjax.positions import NoPE

LENGTH = 29


def tokens(length=LENGTH, batch=3, seed=0):
    tokens_BT = jax.random.randint(jax.random.key(seed), (batch, length), 0, 31)
    reset_BT = jnp.zeros((batch, length), bool).at[0, 4].set(True).at[2, 0].set(True)
    return tokens_BT, reset_BT


def assert_close(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def lm():
    return model_of()


def test_any_split_of_a_text_equals_the_whole(lm):
    x, reset = tokens()
    want_state, want = apply(lm, lm.init_state(3), x, reset)
    state, parts, at = lm.init_state(3), [], 0
    for length in (10, 1, 1, 7, 10):
        piece = slice(at, at + length)
        state, logits = apply(lm, state, x[:, piece], reset[:, piece])
        parts.append(logits)
        at += length
    assert_close(jnp.concatenate(parts, 1), want)
    assert_close(state, want_state)


def test_later_tokens_and_other_lanes_and_documents_change_nothing(lm):
    x, reset = tokens()
    state = lm.init_state(3)
    _, want = apply(lm, state, x, reset)
    _, later = apply(lm, state, x.at[:, 20:].set(0), reset)
    assert_close(later[:, :20], want[:, :20], 1e-6)
    _, lanes = apply(lm, state, x.at[0].set(0), reset)
    assert_close(lanes[1:], want[1:], 1e-6)
    _, document = apply(lm, state, x.at[0, :4].set(0), reset)
    assert_close(document[0, 4:], want[0, 4:], 1e-6)
    assert jnp.abs(document[0, :4] - want[0, :4]).max() > 1e-4


def test_lanes_of_the_state_are_on_the_lane_axis(lm):
    x, reset = tokens()
    state, _ = apply(lm, lm.init_state(3), x, reset)
    order = jnp.array([2, 0, 1])
    swapped, _ = apply(lm, lm.init_state(3), x[order], reset[order])
    assert_close(swapped, jax.tree.map(lambda a: jnp.take(a, order, LANE_AXIS), state))


@pytest.mark.parametrize(
    "change",
    [dict(layers="unroll"), dict(remat="dots"), dict(remat="full"), dict(remat="offload")],
)
def test_layers_and_remat_change_only_speed(lm, change):
    x, reset = tokens()
    definition, params = split(lm)
    twin_definition, twin_params = split(model_of(**change))
    assert jax.tree.structure(params) == jax.tree.structure(twin_params)

    def run(definition, params):
        state, logits = merge(definition, params)(lm.init_state(3), x, reset)
        return (logits**2).mean(), state

    both = jax.jit(jax.value_and_grad(run, 1, has_aux=True), static_argnums=0)
    (loss, state), gradient = both(definition, params)
    (got, twin), other = both(twin_definition, params)
    assert_close((got, twin), (loss, state), 1e-5)
    assert_close(other, gradient, 1e-5)


def loss_of(lm, x, reset):
    return (lm(lm.init_state(3), x, reset)[1] ** 2).mean()


def test_remat_recomputes_and_so_saves_less():
    x, reset = tokens(64)

    def saved(remat):
        """Bytes that the forward pass leaves for the backward pass."""
        pull = jax.eval_shape(lambda lm: jax.vjp(loss_of, lm, x, reset)[1], model_of(remat=remat))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    assert saved("full") < 0.5 * saved("dots") < 0.5 * saved("none")


def test_offload_keeps_the_inputs_of_the_layers_in_the_memory_of_the_host():
    x, reset = tokens(64)

    def placed(remat):
        gradient = jax.jit(lambda lm: jax.grad(loss_of)(lm, x, reset))
        lowered = gradient.trace(model_of(remat=remat)).lower(lowering_platforms=("tpu",))
        return lowered.as_text().count("pinned_host")

    assert placed("offload") > 0 == placed("full")


def test_bfloat16_logits_are_float32_and_near():
    x, reset = tokens()
    _, want = apply(model_of(), model_of().init_state(3), x, reset)
    _, got = apply(model_of(dtype="bfloat16"), model_of().init_state(3), x, reset)
    assert got.dtype == jnp.float32
    assert jnp.abs(got - want).max() < 0.05 * jnp.abs(want).max()


def test_dropout_needs_a_key_and_drops_the_stated_share():
    lm = model_of(dropout=0.5)
    x, reset = tokens()
    state = lm.init_state(3)
    _, plain = lm(state, x, reset)
    assert_close(plain, model_of()(state, x, reset)[1])
    _, one = lm(state, x, reset, dropout_key=jax.random.key(1))
    _, same = lm(state, x, reset, dropout_key=jax.random.key(1))
    _, other = lm(state, x, reset, dropout_key=jax.random.key(2))
    assert_close(one, same)
    assert jnp.abs(one - plain).max() > 1e-3 and jnp.abs(one - other).max() > 1e-3


def test_a_cap_bounds_the_logits_and_leaves_small_ones():
    x, reset = tokens()
    lm, capped = model_of(), model_of(logit_cap=2.0)
    _, plain = lm(lm.init_state(3), x, reset)
    assert_close(capped(capped.init_state(3), x, reset)[1], 2 * np.tanh(np.asarray(plain) / 2))


def test_untied_output_is_a_matrix_of_its_own():
    lm = model_of(tied=False)
    x, reset = tokens()
    _, logits = lm(lm.init_state(3), x, reset)
    lm.output[...] = 2 * lm.output[...]
    _, doubled = lm(lm.init_state(3), x, reset)
    np.testing.assert_allclose(doubled, 2 * logits, rtol=1e-5)


def test_a_program_has_one_body_whatever_the_depth():
    def lines(repeat):
        lm = LanguageModel(
            Model(d_model=16, pattern=("lstm",), repeat=repeat), 31, rngs=nnx.Rngs(0)
        )
        x, reset = tokens()
        return len(jax.jit(lm).lower(lm.init_state(3), x, reset).as_text().splitlines())

    assert lines(12) == lines(3)


def test_every_parameter_has_logical_axes_that_fit_its_shape(lm):
    config = Model(
        d_model=16, pattern=("attention", "gated_deltanet"), repeat=2, tail=("lstm",), mlp=GeGLU()
    )
    params = split(LanguageModel(config, 31, rngs=nnx.Rngs(0)))[1]
    axes = logical_axes(config, 31)
    ranks = jax.tree.map(len, axes, is_leaf=lambda a: isinstance(a, tuple))
    assert ranks == jax.tree.map(lambda a: a.ndim, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(pattern=()), "pattern=() must name at least one mixer"),
        (dict(pattern=("atention",)), "pattern[0]='atention' names no mixer; choose from"),
        (dict(pattern=("lstm",), mixers={"a": LSTM()}), "mixers.a is not in pattern"),
        (dict(d_model=10, pattern=("attention",)), "mixers.attention.heads=4 must divide"),
        (dict(dropout=1.0), "dropout=1.0 must be in [0, 1)"),
        (dict(repeat=0), "repeat=0 must be at least 1"),
        (dict(tail=("atention",)), "tail[0]='atention' names no mixer; choose from"),
        (dict(logit_cap=0.0), "logit_cap=0.0 must be greater than 0"),
    ],
)
def test_impossible_model_is_refused_with_the_field_and_the_rule(fields, message):
    with pytest.raises(ConfigError) as error:
        Model(**fields)
    assert message in str(error.value)


def test_position_of_the_model_replaces_that_of_its_mixers():
    config = Model(pattern=("attention",), mixers={"attention": Attention()}, position=NoPE())
    assert config.mixer("attention").position == NoPE()


class CoupledConfig(LSTM):
    kind = "coupled"


class Coupled(LSTMMixer):
    """Its out-projection is multiplied by its depth, counted from 1; auxiliary loss of 2."""

    @staticmethod
    def couple(params):
        weight = params["out"]["weight"]
        depth = 1.0 + jnp.arange(weight.shape[0])[:, None, None]
        return {**params, "out": {"weight": depth * weight}}

    def auxiliary_loss(self, state, x_BTD, reset_BT):
        return jnp.float32(2.0)


def test_layers_learn_their_depth_in_the_order_of_the_model(monkeypatch):
    def model(coupled):
        layers = dict(pattern=("lstm", "coupled", "coupled"), repeat=2, tail=("coupled", "lstm"))
        mixers = {"lstm": LSTM(), "coupled": coupled}
        config = Model(d_model=16, mixers=mixers, mlp=None, **layers)
        return LanguageModel(config, 31, rngs=nnx.Rngs(0))

    definition, params = split(model(LSTM()))
    for (repeat, block), factor in {(0, 1): 1, (0, 2): 2, (1, 1): 3, (1, 2): 4}.items():
        out = params["stack"]["patterns"]["blocks"][f"{block}_coupled"]["mixer"]["out"]
        out["weight"] = out["weight"].at[repeat].multiply(factor)
    out = params["stack"]["tail"]["blocks"]["0_coupled"]["mixer"]["out"]
    out["weight"] = 5 * out["weight"]
    want, (x, reset) = merge(definition, params), tokens(7)
    expected = want(want.init_state(3), x, reset)[1]

    monkeypatch.setitem(MIXERS, "coupled", (CoupledConfig, Coupled))
    lm = model(CoupledConfig())
    before = jax.tree.map(jnp.copy, split(lm)[1])
    got = lm.read(lm.init_state(3), x, reset)
    assert_close(lm.logits(got.hidden_BTD), expected)
    assert float(got.auxiliary) == 2.0
    assert_close(split(lm)[1], before, 0)
