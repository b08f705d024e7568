"""taylor_attention against every pair of tokens, and the laws of a recurrence.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import taylor_attention as oracle

from pallas_kernels import dispatch, taylor_attention

BATCH, BEFORE, TOKENS, HEADS, KEY, VALUE = 3, 9, 37, 2, 5, 3
# Inside a chunk of 16, at its border, twice in a row, at the first and at the last token.
RESETS = [(0, 5), (0, 16), (0, 17), (1, 0), (1, 32), (1, 36)]
SCALE = 0.7


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(dtype=np.float64):
    """q, k, v of tokens already in the memory and then of a segment, and the resets of both."""
    rng = np.random.default_rng(0)
    tokens = BEFORE + TOKENS
    q, k = rng.standard_normal((2, BATCH, tokens, HEADS, KEY)).astype(dtype)
    v = rng.standard_normal((BATCH, tokens, HEADS, VALUE)).astype(dtype)
    reset = np.zeros((BATCH, tokens), bool)
    for lane, token in RESETS:
        reset[lane, BEFORE + token] = True
    return q, k, v, reset


def segment():
    """The segment of `draw`, with the memory of what came before."""
    q, k, v, reset = draw()
    args = {name: a[:, BEFORE:] for name, a in zip(("q", "k", "v", "reset"), (q, k, v, reset))}
    args["initial_state"] = oracle.memory(k[:, :BEFORE], v[:, :BEFORE])
    return {name: jnp.asarray(array) for name, array in args.items()}


def assert_near(got, want, part=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * np.abs(b).max())


@pytest.mark.parametrize("impl, chunk", [("reference", 1), ("xla", 16), ("xla", 7), ("xla", 128)])
def test_outputs_and_memory_equal_those_of_all_pairs(impl, chunk):
    o, state = taylor_attention(**segment(), scale=SCALE, chunk=chunk, impl=impl)
    q, k, v, reset = draw()
    assert_near(o, oracle.taylor_attention(q, k, v, reset, SCALE)[:, BEFORE:])
    for lane, start in enumerate([BEFORE + 17, BEFORE + 36, 0]):
        here = slice(lane, lane + 1)
        assert_near(state[here], oracle.memory(k[here, start:], v[here, start:]))


def test_gradients_of_chunks_equal_those_of_the_token_loop():
    args = segment()
    reset = args.pop("reset")

    def gradients(chunk, impl):
        def loss(args):
            o, state = taylor_attention(**args, reset=reset, chunk=chunk, impl=impl)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.grad(loss))(args)

    got, want = gradients(16, "xla"), gradients(16, "reference")
    for name in args:
        assert np.abs(want[name]).max() > 1e-3
        assert_near(got[name], want[name])


@pytest.mark.parametrize("split", [1, 16, 30])
def test_any_split_equals_whole(split):
    args = segment()
    whole = taylor_attention(**args)
    state, parts = args.pop("initial_state"), []
    for piece in (slice(0, split), slice(split, None)):
        part = {name: array[:, piece] for name, array in args.items()}
        o, state = taylor_attention(**part, initial_state=state, chunk=16)
        parts.append(o)
    assert_near((jnp.concatenate(parts, 1), state), whole)


def test_long_segments_of_large_scores_stay_finite():
    rng = np.random.default_rng(1)
    q, k, v = (100 * rng.standard_normal((3, 1, 4096, 2, 4))).astype(np.float32)

    def loss(args):
        o, state = taylor_attention(*args)
        return jnp.mean(o**2), (o, state)

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))((q, k, v))
    for leaf in jax.tree.leaves((out, gradients)):
        assert leaf.dtype == np.float32
        assert jnp.isfinite(leaf).all()
    assert jnp.abs(out[0]).max() <= 1.01 * np.abs(v).max()  # a mean with weights above 0


def test_bfloat16_stays_near_float64_with_a_float32_state():
    q, k, v, reset = draw()
    half = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    o, state = taylor_attention(*half, reset=jnp.asarray(reset), scale=SCALE, chunk=16)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few roundings deep
    rounded = [np.asarray(a, np.float64) for a in half]
    want = oracle.taylor_attention(*rounded, reset, SCALE)
    assert_near(o.astype(jnp.float32), want, 0.03)


def test_a_state_of_another_shape_is_refused_in_one_line():
    args = segment()
    args["initial_state"] = args["initial_state"][:, :, :-1]
    with pytest.raises(ValueError, match=r"initial_state has shape .* must be \(3, 2, 21, 4\)"):
        taylor_attention(**args)
    assert dispatch.resolve("taylor_attention") == "xla"
