"""linear_attention and delta_rule against token loops, and the laws of a recurrence.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scans
from kernels import assert_near
from oracles import delta_rule as delta_oracle
from oracles import linear_attention as linear_oracle
from scans import assert_chunks_equal_the_token_loop, resets

from pallas_kernels import delta_rule, linear_attention

BATCH, TOKENS, HEADS, KEY, VALUE = 3, 37, 2, 5, 3
OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule}
DECAYS = ["none", "head", "channel"]


def draw(op, decay, tokens=TOKENS, batch=BATCH, heads=HEADS, dtype=np.float64):
    """Arguments by name; the strengths of delta_rule are in (0, 2) and its keys of unit norm."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    args = {
        "q": normal((batch, tokens, heads, KEY)),
        "k": normal((batch, tokens, heads, KEY)),
        "v": normal((batch, tokens, heads, VALUE)),
        "initial_state": normal((batch, heads, KEY, VALUE)),
    }
    if decay != "none":
        channels = (KEY,) if decay == "channel" else ()
        args["log_decay"] = -np.exp(2 * normal((batch, tokens, heads, *channels)))
    if op == "delta_rule":
        args["beta"] = 2 / (1 + np.exp(-normal((batch, tokens, heads))))
        args["k"] /= np.linalg.norm(args["k"], axis=-1, keepdims=True)
    return {name: array.astype(dtype) for name, array in args.items()}


def call(op, args, reset=None, **settings):
    return OPS[op](**args, reset=None if reset is None else jnp.asarray(reset), **settings)


def outputs_and_gradients(op, args, reset=None, **settings):
    return scans.outputs_and_gradients(OPS[op], args, reset, **settings)


def oracle(op, args, reset):
    decay, state = args.get("log_decay"), args["initial_state"]
    scale = KEY**-0.5
    if op == "delta_rule":
        beta = args["beta"]
        return delta_oracle.delta_rule(
            args["q"], args["k"], args["v"], beta, decay, state, reset, scale
        )
    return linear_oracle.linear_attention(
        args["q"], args["k"], args["v"], decay, state, reset, scale
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packed, chunk", [(True, 16), (False, 7)])
def test_chunks_equal_the_token_loop_and_its_gradients(op, decay, packed, chunk):
    args, reset = draw(op, decay), resets() if packed else None
    assert_chunks_equal_the_token_loop(OPS[op], args, reset, oracle(op, args, reset), chunk)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunk", [1, 64])
def test_chunk_does_not_change_the_mathematics(op, chunk):
    args, reset = draw(op, "channel"), resets()
    with jax.enable_x64(True):
        out = call(op, {n: jnp.asarray(a) for n, a in args.items()}, reset, chunk=chunk)
    assert_near(out, oracle(op, args, reset), 1e-9)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_crosses_a_reset_not_even_rounding(op, decay):
    args, reset = draw(op, decay, dtype=np.float32), resets([(0, 9), (1, 9), (2, 9)])
    if decay != "none":
        args["log_decay"][:, 2] = -1e4  # a difference of sums across the reset would overflow

    @jax.jit
    def gradients(args):
        def after(args):
            o, state = call(op, args, reset, chunk=16)
            return jnp.sum(o[:, 9:] ** 2) + jnp.sum(state**2)

        return jax.grad(after)(args)

    got = gradients({name: jnp.asarray(array) for name, array in args.items()})
    assert jnp.abs(got.pop("initial_state")).max() == 0
    for gradient in got.values():
        assert jnp.abs(gradient[:, :9]).max() == 0
        assert jnp.isfinite(gradient).all()
        assert jnp.abs(gradient[:, 9:]).max() > 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("split", [1, 16, 30])
def test_any_split_equals_whole(op, split):
    args, reset = draw(op, "head"), resets()
    with jax.enable_x64(True):
        args = {name: jnp.asarray(array) for name, array in args.items()}
        state = args.pop("initial_state")
        parts = []
        for piece in (slice(0, split), slice(split, None)):
            part = {name: array[:, piece] for name, array in args.items()}
            o, state = call(op, part | {"initial_state": state}, reset[:, piece], chunk=16)
            parts.append(o)
        whole = {name: np.asarray(array) for name, array in args.items()}
    whole["initial_state"] = draw(op, "head")["initial_state"]
    assert_near((np.concatenate(parts, 1), state), oracle(op, whole, reset), 1e-9)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_4096_tokens_with_decays_near_0_and_1_agree_with_the_definition(op, decay):
    args = draw(op, decay, tokens=4096, batch=1, heads=4, dtype=np.float32)
    levels = np.array([-1e4, -30.0, -1e-6, 0.0], np.float32)
    rng = np.random.default_rng(2)
    args["log_decay"][:, :, :3] = levels[:3].reshape(1, 1, 3, *[1] * (decay == "channel"))
    args["log_decay"][:, :, 3] = rng.choice(levels, args["log_decay"][:, :, 3].shape)
    out, gradients = outputs_and_gradients(op, args)
    with jax.enable_x64(True):
        wide = {name: array.astype(np.float64) for name, array in args.items()}
        want, want_gradients = outputs_and_gradients(op, wide, impl="reference")
    # float32 sums of 4,096 terms: some 60 units in the last place of the largest.
    assert_near(out, want, 1e-5)
    for name in args:
        assert jnp.isfinite(gradients[name]).all()
        assert_near(gradients[name], want_gradients[name], 1e-4)


@pytest.mark.parametrize("op", OPS)
def test_a_decay_of_minus_infinity_forgets_everything(op):
    args = draw(op, "head", dtype=np.float32)
    args["log_decay"][:, 9] = -np.inf
    out = call(op, {name: jnp.asarray(array) for name, array in args.items()}, chunk=16)
    assert_near(out, oracle(op, args, None), 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_stays_near_float32_with_a_float32_state(op):
    args = draw(op, "head", dtype=np.float32)
    half = {name: jnp.asarray(array) for name, array in args.items()}
    half |= {name: half[name].astype(jnp.bfloat16) for name in "qkv"}
    (o, state), gradients = outputs_and_gradients(op, half)
    assert o.dtype == gradients["q"].dtype == jnp.bfloat16
    assert state.dtype == gradients["log_decay"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few roundings deep
    assert_near((o.astype(jnp.float32), state), oracle(op, args, None), 0.02)
