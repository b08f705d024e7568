"""Matrix memories on a TPU without one: in Pallas's interpreter, and lowered for the platform.

The interpreter multiplies float32 in full, so values are held to float32 rounding: sums of some 100
terms, 1e-5 of the largest value. It does not simulate how a TPU rounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import assert_near, assert_nothing_crosses_a_reset, lowered
from oracles import delta_rule as delta_oracle
from oracles import linear_attention as linear_oracle

from pallas_kernels import compat, delta_rule, dispatch, linear_attention

BATCH, TOKENS, HEADS, KEY, VALUE = 2, 37, 2, 5, 3
RESETS = [(0, 5), (0, 16), (0, 17), (1, 0), (1, 32), (1, 36)]
OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule}
DECAYS = ["none", "head", "channel"]


@pytest.fixture
def interpreted():
    with dispatch.target("tpu", interpreter=True):
        yield


def draw(op, decay, tokens=TOKENS, key=KEY, value=VALUE, batch=BATCH):
    normal = np.random.default_rng(0).standard_normal
    args = {
        "q": normal((batch, tokens, HEADS, key)),
        "k": normal((batch, tokens, HEADS, key)),
        "v": normal((batch, tokens, HEADS, value)),
        "initial_state": normal((batch, HEADS, key, value)),
    }
    if decay != "none":
        channels = (key,) if decay == "channel" else ()
        args["log_decay"] = -np.exp(2 * normal((batch, tokens, HEADS, *channels)))
    if op == "delta_rule":
        args["beta"] = 2 / (1 + np.exp(-normal((batch, tokens, HEADS))))
        args["k"] /= np.linalg.norm(args["k"], axis=-1, keepdims=True)
    return {name: jnp.asarray(x, jnp.float32) for name, x in args.items()}


def resets(tokens=TOKENS):
    reset = np.zeros((BATCH, tokens), bool)
    for lane, token in RESETS:
        reset[lane, token] = True
    return jnp.asarray(reset)


def oracle(op, args, reset):
    wide = {name: np.asarray(x.astype(jnp.float32), np.float64) for name, x in args.items()}
    qkv, rest = [wide[name] for name in "qkv"], (wide["initial_state"], reset, KEY**-0.5)
    if op == "delta_rule":
        return delta_oracle.delta_rule(*qkv, wide["beta"], wide.get("log_decay"), *rest)
    return linear_oracle.linear_attention(*qkv, wide.get("log_decay"), *rest)


def with_gradients(op, args, reset, impl, chunk=16):
    """o, the last state, and every gradient under cotangents on both."""

    @jax.jit
    def run(args):
        out, pull = jax.vjp(lambda a: OPS[op](**a, reset=reset, impl=impl, chunk=chunk), args)
        rng = np.random.default_rng(1)
        cotangent = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in out]
        return out, pull(tuple(cotangent))[0]

    return run(args)


def definition(op, args, reset):
    """The same in float64 from the token loop."""
    with dispatch.target("cpu"), jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in args.items()}
        return with_gradients(op, wide, reset, "reference")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_interpreted_chunks_equal_the_token_loop_and_its_gradients(op, decay, interpreted):
    args, reset = draw(op, decay), resets()
    chunk = 32 if decay == "channel" else 16  # blocks of pairs have 16 tokens
    out, gradients = with_gradients(op, args, reset, "tpu", chunk)
    assert_near(out, oracle(op, args, reset), 1e-5)
    want = definition(op, args, reset)[1]
    assert gradients.keys() == args.keys()
    for name in args:
        assert np.abs(want[name]).max() > 1e-3
        assert_near(gradients[name], want[name], 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_interpreted_extreme_gates_agree_with_the_definition(op, interpreted):
    args = draw(op, "channel", tokens=32)
    levels = np.array([-1e4, -30.0, -1e-6, 0.0], np.float32)
    rng = np.random.default_rng(2)
    args["log_decay"] = jnp.asarray(rng.choice(levels, args["log_decay"].shape))
    out, gradients = with_gradients(op, args, None, "tpu", 32)
    want, want_gradients = definition(op, args, None)
    assert_near(out, want, 1e-5)
    for name in args:
        assert_near(gradients[name], want_gradients[name], 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_interpreted_nothing_crosses_a_reset_not_even_rounding(op):
    args = draw(op, "head")
    args["log_decay"] = args["log_decay"].at[:, 2].set(-1e4)

    def call(args, reset):
        return OPS[op](**args, reset=reset, impl="tpu", chunk=16)

    assert_nothing_crosses_a_reset(call, args, BATCH, TOKENS)


@pytest.mark.parametrize("op", OPS)
def test_interpreted_bfloat16_stays_near_float32_with_a_float32_state(op, interpreted):
    args = draw(op, "head")
    half = args | {name: args[name].astype(jnp.bfloat16) for name in "qkv"}
    (o, state), gradients = with_gradients(op, half, None, "tpu")
    assert o.dtype == gradients["q"].dtype == jnp.bfloat16
    assert state.dtype == gradients["log_decay"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few roundings deep
    assert_near((o, state), oracle(op, half, None), 0.02)
    want = definition(op, half, None)[1]
    for name in args:
        assert_near(gradients[name].astype(jnp.float32), want[name], 0.03)


def test_the_simulated_memory_of_a_tpu_finds_no_race():
    args = draw("linear_attention", "head")
    with dispatch.target("tpu", interpreter=compat.tpu_interpreter(detect_races=True)):
        out, _ = with_gradients("linear_attention", args, None, "tpu")
    assert_near(out, oracle("linear_attention", args, None), 1e-5)
    assert not compat.tpu_races_found()


def shapes(op, decay, dtype=jnp.bfloat16):
    args = draw(op, decay, tokens=128, key=64, value=64, batch=1)
    args |= {name: args[name].astype(dtype) for name in "qkv"}
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in args.items()}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_forward_and_backward_lower_for_tpu(op, decay):
    reset = jax.ShapeDtypeStruct((1, 128), jnp.bool_)

    def step(args, reset):
        def loss(args):
            o, state = OPS[op](**args, reset=reset)
            return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)

        return jax.value_and_grad(loss)(args)

    text = lowered(step, shapes(op, decay), reset)
    for kernel in ("chunk_scan_forward", "chunk_scan_backward"):
        assert text.count(f'kernel_name = "{kernel}"') == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl, kernels", [("auto", 1), ("tpu", 1), ("xla", 0), ("reference", 0)])
def test_the_named_implementation_is_in_the_program_for_tpu(op, impl, kernels):
    text = lowered(lambda args: OPS[op](**args, impl=impl), shapes(op, "head"))
    assert text.count("tpu_custom_call") == kernels


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_plain_jax_where_the_kernel_does_not_suit(op):
    text = lowered(lambda args: OPS[op](**args, chunk=24), shapes(op, "head"))
    assert "tpu_custom_call" not in text


@pytest.mark.parametrize("op", OPS)
def test_a_call_that_does_not_suit_the_kernel_is_refused_by_name(op):
    args = draw(op, "head")
    with pytest.raises(ValueError, match=f"{op}: impl='tpu' is not available on cpu; use 'auto'"):
        OPS[op](**args, impl="tpu")
    with dispatch.target("tpu"):
        with pytest.raises(ValueError, match="cannot run this call: chunk=24 must be a power of"):
            OPS[op](**args, impl="tpu", chunk=24)
        with pytest.raises(ValueError, match="q has dtype float16, and the kernel takes float32"):
            OPS[op](**(args | {"q": args["q"].astype(jnp.float16)}), impl="tpu")


def test_programs_of_different_targets_are_not_mixed_up():
    args = draw("linear_attention", "head", tokens=16)
    run = jax.jit(lambda args: linear_attention(**args))
    plain = str(run.trace(args).jaxpr)
    with dispatch.target("tpu"):
        kernel = str(run.trace(args).jaxpr)
    assert "pallas_call" in kernel and "pallas_call" not in plain
    assert str(run.trace(args).jaxpr) == plain
