"""Optimizers against NumPy, schedules against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax.config import ConfigError
from memjax.training.config import Optimizer
from memjax.training.optim import MUON_RMS, is_decayed, make_optimizer, make_schedule

AXES = {
    "table": ("vocab", "embed"),
    "matrix": ("layers", "hidden", "embed"),
    "norm": ("layers", "embed"),
    "conv": ("layers", "conv", "hidden"),
}
SHAPES = {"table": (7, 4), "matrix": (3, 6, 4), "norm": (3, 4), "conv": (3, 2, 6)}


def draw(seed):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape) for name, shape in SHAPES.items()}


def update(config, params, gradients):
    """Parameters after one update for each of `gradients`."""
    optimizer, _ = make_optimizer(config, 100, AXES)

    def single(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    params = single(params)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(single(gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params


def clipped(gradient, limit):
    norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    return {name: g * min(1, limit / norm) for name, g in gradient.items()}


def test_adamw_equals_numpy_with_clipping_and_decay_of_matrices_alone():
    config = Optimizer(schedule="constant", warmup=0, learning_rate=0.1, clip=1.5, eps=1e-3)
    params, gradients = draw(0), [draw(1), draw(2), draw(3)]
    expected = {name: leaf.copy() for name, leaf in params.items()}
    first, second = (dict.fromkeys(SHAPES, 0.0) for _ in range(2))
    for t, raw in enumerate(gradients, 1):
        for name, g in clipped(raw, 1.5).items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            step = first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-3)
            decay = 0.1 if name in ("table", "matrix") else 0.0
            expected[name] = expected[name] - 0.1 * (step + decay * expected[name])
    got = update(config, params, gradients)
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=2e-6)  # float32 against float64


@pytest.mark.parametrize("name", ["adamw", "muon", "lion"])
def test_a_rate_of_tables_scales_their_updates_and_no_others(name):
    """Against the same optimizer with a learning rate as high for all."""
    axes, rows = {**AXES, "table": ("layers", "rows", "value")}, {**SHAPES, "table": (3, 7, 4)}
    generator = np.random.default_rng(0)
    params, *gradients = (
        {
            name: jnp.asarray(generator.normal(size=shape), jnp.float32)
            for name, shape in rows.items()
        }
        for _ in range(3)
    )

    def after(**fields):
        config = Optimizer(name=name, schedule="constant", warmup=0, clip=None, **fields)
        optimizer, _ = make_optimizer(config, 100, axes)
        state, moved = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, moved)
            moved = optax.apply_updates(moved, updates)
        return moved

    plain, fast = after(learning_rate=0.01), after(learning_rate=0.04)
    got = after(learning_rate=0.01, table_rate=4.0)
    for leaf in SHAPES:
        want = fast[leaf] if leaf == "table" else plain[leaf]
        np.testing.assert_allclose(got[leaf], want, rtol=1e-5, atol=1e-6)
    assert np.abs(fast["table"] - plain["table"]).max() > 0.01


def test_a_rate_of_tables_without_a_table_is_refused():
    with pytest.raises(ConfigError, match=r"table_rate=2.0: no parameter of the model is a large"):
        make_optimizer(Optimizer(table_rate=2.0), 100, AXES)


def test_lion_equals_numpy():
    config = Optimizer(name="lion", schedule="constant", warmup=0, learning_rate=0.1, clip=None)
    params, gradients = draw(0), [draw(1), draw(2)]
    expected = {name: leaf.copy() for name, leaf in params.items()}
    mean = dict.fromkeys(SHAPES, 0.0)
    for gradient in gradients:
        for name, g in gradient.items():
            sign = np.sign(0.9 * mean[name] + 0.1 * g)
            mean[name] = 0.95 * mean[name] + 0.05 * g
            decay = 0.1 if name in ("table", "matrix") else 0.0
            expected[name] = expected[name] - 0.1 * (sign + decay * expected[name])
    got = update(config, params, gradients)
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-6)


def test_muon_orthogonalises_each_layer_by_itself_and_leaves_the_rest_to_adamw():
    fields = {"schedule": "constant", "warmup": 0, "learning_rate": 0.1, "clip": None}
    muon, adamw = Optimizer(name="muon", **fields), Optimizer(name="adamw", **fields)
    params, gradient = draw(0), draw(1)
    louder = gradient | {"matrix": gradient["matrix"] * np.array([1, 50, 1])[:, None, None]}
    got, scaled = update(muon, params, [gradient]), update(muon, params, [louder])
    plain = update(adamw, params, [gradient])
    for name in ("table", "norm", "conv"):
        np.testing.assert_allclose(got[name], plain[name], atol=1e-6)
    np.testing.assert_allclose(got["matrix"], scaled["matrix"], atol=1e-3)
    moved = (np.asarray(got["matrix"], np.float64) - params["matrix"]) / -0.1
    moved -= 0.1 * params["matrix"]  # weight decay
    for layer, g in zip(moved, gradient["matrix"]):
        left, _, right = np.linalg.svd(g, full_matrices=False)
        turn = left.T @ (layer / (MUON_RMS * np.sqrt(6))) @ right.T
        # Newton-Schulz stops at singular values between about 0.7 and 1.2, by design.
        np.testing.assert_allclose(turn, np.eye(4), atol=0.35)


@pytest.mark.parametrize(
    ("axes", "decayed"),
    [
        (("vocab", "embed"), True),
        (("layers", "hidden", "embed"), True),
        (("layers", "embed"), False),
        (("embed",), False),
        (("layers", "conv", "hidden"), False),
        (("layers", "heads"), False),
        (("layers", "pair", "hidden"), False),
        (("layers", "pair", "hidden", "embed"), True),
    ],
)
def test_decay_looks_past_the_axes_of_stacked_layers_and_of_pairs(axes, decayed):
    assert is_decayed(axes) is decayed


def rates(config, steps=100):
    schedule = make_schedule(config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 20)])


def test_cosine_by_definition():
    got = rates(Optimizer(learning_rate=2.0, warmup=10, final=0.1))
    t = np.arange(120)
    share = np.clip((t - 10) / 90, 0, 1)
    expected = np.where(t < 10, 2 * (t + 1) / 10, 0.2 + 0.9 * (1 + np.cos(np.pi * share)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_wsd_by_definition():
    got = rates(Optimizer(learning_rate=2.0, warmup=10, schedule="wsd", decay=0.2, final=0.0))
    t = np.arange(120)
    expected = np.where(t < 10, 2 * (t + 1) / 10, 2 * np.clip((100 - t) / 20, 0, 1))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_constant_by_definition_and_schedule_steps_fix_the_length():
    np.testing.assert_allclose(rates(Optimizer(schedule="constant", warmup=1)), 1e-3, rtol=1e-6)
    fixed = Optimizer(warmup=10, schedule_steps=50)
    np.testing.assert_array_equal(rates(fixed, 100)[:100], rates(fixed, 1000)[:100])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_no_longer_than_its_warmup_is_warmup_alone(schedule):
    got = rates(Optimizer(learning_rate=2.0, warmup=100, schedule=schedule), 50)
    np.testing.assert_allclose(got[:50], 2 * np.arange(1, 51) / 100, rtol=1e-5)
