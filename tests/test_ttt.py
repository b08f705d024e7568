"""ttt_linear and ttt_mlp against token loops, and the laws of a memory.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-13, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.ttt import ttt as oracle

from pallas_kernels import ttt_linear, ttt_mlp
from pallas_kernels.ttt import LinearMemory, MLPMemory, Norm

OPS = {"ttt_linear": ttt_linear, "ttt_mlp": ttt_mlp}
BATCH, TOKENS, HEADS, SIZE, HIDDEN, BLOCK = 3, 29, 2, 5, 7, 4
RESETS = [(0, 5), (0, 6), (1, 0), (1, 21), (2, 28)]


def draw(op, tokens=TOKENS, batch=BATCH, block=BLOCK, dtype=np.float64):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    if op == "ttt_linear":
        memory = LinearMemory(normal(HEADS, SIZE, SIZE), normal(HEADS, SIZE))
    else:
        memory = MLPMemory(
            normal(HEADS, SIZE, HIDDEN),
            normal(HEADS, HIDDEN),
            normal(HEADS, HIDDEN, SIZE),
            normal(HEADS, SIZE),
        )
    return {
        **{name: normal(batch, tokens, HEADS, SIZE) for name in "qkv"},
        "rate": np.abs(normal(batch, tokens, HEADS)) / SIZE,
        "place_rate": np.abs(normal(block)) + 0.1,
        "memory": memory,
        "norm": Norm(normal(HEADS, SIZE), normal(HEADS, SIZE)),
    }


def resets(pairs=RESETS, tokens=TOKENS, batch=BATCH):
    reset = np.zeros((batch, tokens), bool)
    for lane, token in pairs:
        reset[lane, token] = True
    return reset


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def outputs_and_gradients(op, args, reset, **settings):
    @jax.jit
    def run(args):
        def loss(args):
            o, state = OPS[op](**args, reset=jnp.asarray(reset), **settings)
            held = sum((x**2).sum() for x in jax.tree.leaves((state.carry, state.tokens)))
            return (o * jnp.cos(jnp.arange(o.size).reshape(o.shape))).sum() + held, (o, state)

        return jax.grad(loss, has_aux=True)(args)

    gradients, out = run(arrays(args))
    return out, gradients


def assert_near(got, want, part):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(initial=0), 1e-6))


@pytest.mark.parametrize("op", OPS)
def test_dual_form_equals_the_primal_token_loop_and_its_gradients(op):
    args, reset = draw(op), resets()
    with jax.enable_x64(True):
        out, gradients = outputs_and_gradients(op, args, reset, impl="xla")
        defined, want = outputs_and_gradients(op, args, reset, impl="reference")
    truth = oracle(**args, reset=reset)
    assert_near((out[0], out[1].carry), truth, 1e-9)
    assert_near((defined[0], defined[1].carry), truth, 1e-9)
    assert_near(out[1], defined[1], 1e-9)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 1e-3
        assert_near(a, b, 1e-9)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("block", [1, 16, 64])
def test_blocks_of_any_length_follow_the_paper(op, block):
    args, reset = draw(op, block=block), resets()
    with jax.enable_x64(True):
        o, state = OPS[op](**arrays(args), reset=jnp.asarray(reset), impl="xla")
    assert_near((o, state.carry), oracle(**args, reset=reset), 1e-9)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["xla", "reference"])
def test_any_split_equals_whole(op, impl):
    args, reset = draw(op), resets()
    with jax.enable_x64(True):
        shared = arrays({name: args[name] for name in ("place_rate", "memory", "norm")})
        state, parts, at = None, [], 0
        for length in (1, 1, 9, 18):
            piece = {n: jnp.asarray(args[n][:, at : at + length]) for n in ("q", "k", "v", "rate")}
            fresh = jnp.asarray(reset[:, at : at + length])
            o, state = OPS[op](**piece, **shared, state=state, reset=fresh, impl=impl)
            parts.append(o)
            at += length
        o = jnp.concatenate(parts, 1)
    assert_near((o, state.carry), oracle(**args, reset=reset), 1e-9)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_stays_near_float32_with_a_float32_state(op):
    args, reset = draw(op, dtype=np.float32), resets()
    half = arrays(args) | {name: jnp.asarray(args[name], jnp.bfloat16) for name in "qkv"}
    o, state = OPS[op](**half, reset=jnp.asarray(reset))
    assert o.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.carry, state.tokens)))
    # bfloat16 keeps 8 bits: 0.4% a rounding, amplified by the inner steps
    want, _ = oracle(**args, reset=reset)
    assert np.abs(o.astype(jnp.float32) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("op", OPS)
def test_arguments_that_disagree_are_named(op):
    args = arrays(draw(op, dtype=np.float32))
    short = Norm(args["norm"].scale_HK[:1], args["norm"].shift_HK)
    with pytest.raises(ValueError, match=f"{op}: norm_scale has shape"):
        OPS[op](**args | {"norm": short})
    with pytest.raises(ValueError, match=f"{op}: impl='tpu' is not available"):
        OPS[op](**args, impl="tpu")
