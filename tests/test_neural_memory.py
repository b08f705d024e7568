"""The memory that learns at test time against its definition and a NumPy loop from the paper.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.neural_memory import neural_memory as oracle

from pallas_kernels.neural_memory import (
    L2,
    MLP,
    GradientDescent,
    LinearMap,
    Momentum,
    NeuralMemoryState,
    WeightDecay,
    init_neural_memory,
    neural_memory,
)
from pallas_kernels.neural_memory.rule import Rule

BATCH, TOKENS, HEADS, SIZE, EVERY = 3, 19, 2, 4, 4
RESETS = [(0, 5), (0, 6), (1, 0), (1, 8), (2, 18)]
STRUCTURES = {
    "linear": LinearMap(),
    "mlp1": MLP(layers=1, residual_norm=True),
    "mlp2": MLP(layers=2, expansion=2, residual_norm=True),
    "mlp2-plain": MLP(layers=2, expansion=2, residual_norm=False),
    "mlp4": MLP(layers=4, expansion=1, residual_norm=True),
}


def draw(structure, learner, dtype=np.float64, tokens=TOKENS):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    args = {name: normal((BATCH, tokens, HEADS, SIZE)) for name in "qkv"}
    args["k"] /= np.linalg.norm(args["k"], axis=-1, keepdims=True)
    args["rate"] = 0.3 * rng.random((BATCH, tokens, HEADS))
    args["log_keep"] = -np.exp(2 * normal((BATCH, tokens, HEADS)) - 3)
    if learner.momentum:
        args["log_momentum"] = -np.exp(2 * normal((BATCH, tokens, HEADS)) - 1)
    shapes = structure.shapes(SIZE, SIZE)
    args["weights"] = tuple(normal((HEADS, *s)) / np.sqrt(s[0]) for s in shapes)
    names = structure.constants(SIZE)
    args["constants"] = {n: x + 0.3 * normal((HEADS, SIZE)) for n, x in names.items()}
    return jax.tree.map(lambda a: np.asarray(a, dtype), args)


def resets(pairs=RESETS, tokens=TOKENS):
    reset = np.zeros((BATCH, tokens), bool)
    for lane, token in pairs:
        reset[lane, token] = True
    return jnp.asarray(reset)


def busy_state(structure, learner, args, counts=(1, 3, 0)):
    """A state in the middle of its blocks, made of random numbers of the right places."""
    rng = np.random.default_rng(5)
    rule = Rule(structure, L2(), WeightDecay(), learner)
    streams = {n: jnp.asarray(args[n]) for n in args if n not in ("weights", "constants")}
    weights = tuple(map(jnp.asarray, args["weights"]))
    state = init_neural_memory(rule, weights, streams, update_every=EVERY)
    draws = draw(structure, learner, tokens=EVERY - 1)
    place = np.arange(EVERY - 1)
    used = place >= EVERY - 1 - np.array(counts)[:, None]

    def fill(x):
        return jnp.asarray(np.where(used.reshape(used.shape + (1,) * (x.ndim - 2)), x, 0))

    noise = lambda x: x + 0.2 * rng.standard_normal(x.shape)  # noqa: E731
    return NeuralMemoryState(
        jax.tree.map(noise, state.weights),
        jax.tree.map(noise, state.momenta),
        {n: fill(draws[n]).astype(x.dtype) for n, x in state.tokens.items()},
        jnp.asarray(counts, jnp.int32),
    )


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def outputs_and_gradients(args, state, reset, **settings):
    """o, the last state, and every gradient under cotangents on both."""

    @jax.jit
    def run(args, state):
        def call(args, floating):
            full = jax.tree.unflatten(tree, [*floating, *rest])
            o, after = neural_memory(
                **args, state=full, reset=reset, update_every=EVERY, **settings
            )
            return o, floats(after), after.count_B

        leaves, tree = jax.tree.flatten(state)
        floating, rest = leaves[:-1], leaves[-1:]
        o, pull, count = jax.vjp(
            lambda *a: (lambda r: (r[:2], r[2]))(call(*a)), args, floating, has_aux=True
        )
        rng = np.random.default_rng(1)
        cotangent = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), o)
        return (*o, count), pull(cotangent)

    return run(jax.tree.map(jnp.asarray, args), state)


def assert_near(got, want, part):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(initial=0), 1e-6))


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("learner", [Momentum(), GradientDescent()], ids=lambda x: x.kind)
def test_the_dual_form_equals_the_loop_of_the_paper(name, learner):
    structure = STRUCTURES[name]
    args, reset = draw(structure, learner), resets()
    with jax.enable_x64(True):
        o, state = neural_memory(
            **jax.tree.map(jnp.asarray, args),
            reset=reset,
            update_every=EVERY,
            structure=structure,
            learner=learner,
        )
    assert o.dtype == np.float64
    for b in range(BATCH):
        for h in range(HEADS):
            constants = args["constants"]
            norm = (constants["scale"][h], constants["shift"][h], 1e-6) if constants else None
            momentum = np.exp(args["log_momentum"][b, :, h]) if learner.momentum else None
            want, W, S, count = oracle(
                *(args[n][b, :, h] for n in "qkv"),
                args["rate"][b, :, h],
                np.exp(args["log_keep"][b, :, h]),
                momentum,
                [w[h] for w in args["weights"]],
                norm,
                EVERY,
                reset[b],
            )
            assert_near(o[b, :, h], want, 1e-9)
            assert_near([w[b, h] for w in state.weights], W, 1e-9)
            if learner.momentum:
                assert_near([s[b, h] for s in state.momenta], S, 1e-9)
            assert state.count_B[b] == count


@pytest.mark.parametrize(
    "name, learner",
    [("mlp2", Momentum()), ("mlp4", GradientDescent()), ("linear", Momentum())],
    ids=str,
)
def test_states_and_gradients_equal_those_of_the_definition(name, learner):
    structure = STRUCTURES[name]
    args, reset = draw(structure, learner), resets()
    settings = dict(structure=structure, learner=learner)
    with jax.enable_x64(True):
        state = busy_state(structure, learner, args)
        out, gradients = outputs_and_gradients(args, state, reset, impl="xla", **settings)
        defined, want = outputs_and_gradients(args, state, reset, impl="reference", **settings)
    assert_near(out, defined, 1e-9)
    assert_near(gradients, want, 1e-9)
    for leaf in jax.tree.leaves(want):
        assert np.abs(leaf).max() > 1e-6
