"""The op mlstm against a token loop without stabiliser, and the laws of its level.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import mlstm as oracle

from pallas_kernels import MLSTMMemory, mlstm

BATCH, TOKENS, HEADS, KEY, VALUE = 3, 37, 2, 5, 3
SCALE = KEY**-0.5
RESETS = [(0, 5), (0, 16), (0, 17), (1, 0), (1, 32), (1, 36)]


def draw(tokens=TOKENS, batch=BATCH, heads=HEADS, dtype=np.float64, input_size=3.0):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    args = {name: normal((batch, tokens, heads, size)) for name, size in zip("qkv", (5, 5, 3))}
    args["log_input"] = input_size * normal((batch, tokens, heads))
    args["log_forget"] = -np.exp(2 * normal((batch, tokens, heads)))
    args = {name: array.astype(dtype) for name, array in args.items()}
    shapes = (batch, heads, KEY, VALUE), (batch, heads, KEY), (batch, heads)
    return args, MLSTMMemory(*(normal(shape).astype(dtype) for shape in shapes))


def resets(pairs=RESETS, tokens=TOKENS, batch=BATCH):
    reset = np.zeros((batch, tokens), bool)
    for lane, token in pairs:
        reset[lane, token] = True
    return jnp.asarray(reset)


def held(state):
    """What a state stands for, whatever its level."""
    memory, normaliser, level = state
    return jnp.exp(level)[..., None, None] * memory, jnp.exp(level)[..., None] * normaliser


def assert_near(got, want, part=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(), 1e-6))


def outputs_and_gradients(args, state, reset, **settings):
    """h and what the last state holds, and every gradient under cotangents on them."""

    @jax.jit
    def run(args, state):
        def call(args, state):
            h, after = mlstm(**args, initial_state=state, reset=reset, **settings)
            return h, *held(after)

        out, pull = jax.vjp(call, args, state)
        rng = np.random.default_rng(1)
        return out, pull(tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in out))

    return run(*jax.tree.map(jnp.asarray, (args, state)))


@pytest.mark.parametrize("packed, chunk", [(True, 16), (False, 7), (True, 64)])
def test_chunks_equal_the_loop_without_stabiliser(packed, chunk):
    args, state = draw()
    reset = resets() if packed else None
    with jax.enable_x64(True):
        out, gradients = outputs_and_gradients(args, state, reset, chunk=chunk, impl="xla")
        defined, want = outputs_and_gradients(args, state, reset, impl="reference")
    truth = oracle.mlstm(**args, state=state, reset=reset, scale=SCALE)
    assert_near(defined, truth)
    assert_near(out, truth)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want))
    assert_near(gradients, want)


def test_gradient_is_the_slope_of_the_loop_without_stabiliser():
    args, state = draw(tokens=11, batch=1)
    reset = resets([(0, 4)], 11, 1)
    rng = np.random.default_rng(3)
    cotangents = [rng.standard_normal(x.shape) for x in (args["v"], *state[:2])]

    def loss(args, state):
        out = oracle.mlstm(**args, state=state, reset=reset, scale=SCALE)
        return sum((a * b).sum() for a, b in zip(out, cotangents))

    with jax.enable_x64(True):

        def fast(args, state):
            h, after = mlstm(**args, initial_state=state, reset=reset, chunk=4)
            return sum((a * b).sum() for a, b in zip((h, *held(after)), cotangents))

        gradients = jax.grad(fast, (0, 1))(*jax.tree.map(jnp.asarray, (args, state)))
    leaves, tree = jax.tree.flatten((args, state))
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = rng.standard_normal(leaves[i].shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]
            ends.append(loss(*jax.tree.unflatten(tree, moved)))
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(
            (np.asarray(gradient) * direction).sum(), slope, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("shift", [-30.0, 12.5])
def test_result_does_not_depend_on_where_the_level_starts(impl, shift):
    args, (memory, normaliser, level) = draw()
    moved = MLSTMMemory(np.exp(-shift) * memory, np.exp(-shift) * normaliser, level + shift)
    with jax.enable_x64(True):
        results = [
            outputs_and_gradients(args, state, None, chunk=16, impl=impl)
            for state in (MLSTMMemory(memory, normaliser, level), moved)
        ]
    results = jax.tree.map(np.asarray, results)
    (want, (want_args, want_state)), (out, (got_args, got_state)) = results
    assert_near(out, want)
    assert_near(got_args, want_args)
    assert_near(got_state.level_BH, want_state.level_BH)
    assert_near(np.exp(-shift) * got_state.memory_BHKV, want_state.memory_BHKV)


def test_nothing_crosses_a_reset_not_even_rounding():
    args, state = draw(dtype=np.float32)
    args["log_forget"][:, 2] = -1e4
    args["log_input"][:, 3] = 80.0
    reset = resets([(0, 9), (1, 9), (2, 9)])

    @jax.jit
    def gradients(args, state):
        def after(args, state):
            h, after = mlstm(**args, initial_state=state, reset=reset, chunk=16)
            return jnp.sum(h[:, 9:] ** 2) + sum(jnp.sum(x**2) for x in after)

        return jax.grad(after, (0, 1))(args, state)

    from_args, from_state = gradients(*jax.tree.map(jnp.asarray, (args, state)))
    assert all(jnp.abs(leaf).max() == 0 for leaf in from_state)
    for gradient in from_args.values():
        assert jnp.abs(gradient[:, :9]).max() == 0
        assert jnp.isfinite(gradient).all()
        assert jnp.abs(gradient[:, 9:]).max() > 0


@pytest.mark.parametrize("split", [1, 16, 30])
def test_any_split_equals_whole(split):
    args, state = draw()
    reset = resets()
    want = oracle.mlstm(**args, state=state, reset=reset, scale=SCALE)
    with jax.enable_x64(True):
        parts, carried = [], jax.tree.map(jnp.asarray, state)
        for piece in (slice(0, split), slice(split, None)):
            part = {name: jnp.asarray(array[:, piece]) for name, array in args.items()}
            h, carried = mlstm(**part, initial_state=carried, reset=reset[:, piece], chunk=16)
            parts.append(h)
        assert_near((np.concatenate(parts, 1), *held(carried)), want)


def test_4096_tokens_with_extreme_gates_agree_with_the_definition():
    args, state = draw(tokens=4096, batch=1, heads=3, dtype=np.float32)
    rng = np.random.default_rng(2)
    forgets = np.array([-1e4, -30.0, -1e-6, 0.0], np.float32)
    inputs = np.array([-1e4, -30.0, 0.0, 300.0], np.float32)
    args["log_forget"][:, :, 0] = -1e-6  # nothing is forgotten, and the level climbs to 300
    args["log_forget"][:, :, 1] = rng.choice(forgets, (1, 4096))
    args["log_input"][:, :, :2] = rng.choice(inputs, (1, 4096, 2))

    def outcome(args, state, **settings):
        def call(args, state):
            return mlstm(**args, initial_state=state, **settings)

        out, pull = jax.vjp(jax.jit(call), *jax.tree.map(jnp.asarray, (args, state)))
        return out, pull(jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), out))

    out, gradients = outcome(args, state)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (args, state))
        want, want_gradients = outcome(*wide, impl="reference")
    for leaf in jax.tree.leaves((out, gradients)):
        assert jnp.isfinite(leaf).all()
    # A quotient: where the normaliser is near its least, float32 leaves some 1e-4 of the largest.
    assert_near(out, want, 1e-3)


def test_bfloat16_stays_near_float32_with_a_float32_state():
    args, state = draw(dtype=np.float32, input_size=1.0)
    half = {name: jnp.asarray(array) for name, array in args.items()}
    half |= {name: half[name].astype(jnp.bfloat16) for name in "qkv"}
    (h, *_), (gradients, _) = outputs_and_gradients(half, state, resets())
    want, *_ = oracle.mlstm(**args, state=state, reset=resets(), scale=SCALE)
    assert h.dtype == gradients["q"].dtype == jnp.bfloat16
    assert gradients["log_input"].dtype == jnp.float32
    # bfloat16 keeps 8 bits; the quotient with a small divisor loses some of them
    assert_near(h.astype(jnp.float32), want, 0.05)


def test_a_growing_log_forget_is_refused():
    args, _ = draw(tokens=3)
    args["log_forget"][0, 0, 0] = 0.1
    with pytest.raises(ValueError, match="log_forget has a value of 0.1; it must be at most 0"):
        mlstm(**jax.tree.map(jnp.asarray, args))
