"""Kernels for TPU without one: run in Pallas's interpreter, and lowered for the platform.

The interpreter multiplies float32 in full, so values are held to float32 rounding: sums of some 100
terms, 1e-5 of the largest value. It does not simulate how a TPU rounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta_rule as delta_oracle
from oracles import linear_attention as linear_oracle

from pallas_kernels import (
    attention,
    compat,
    delta_rule,
    dispatch,
    linear_attention,
    mlstm,
    selective_scan,
)
from pallas_kernels.attention import tpu_layout
from pallas_kernels.mlstm import MLSTMMemory

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


def assert_near(got, want, part):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a = np.asarray(a, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(), 1e-6))


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
def test_interpreted_nothing_crosses_a_reset_not_even_rounding(op, interpreted):
    args = draw(op, "head")
    args["log_decay"] = args["log_decay"].at[:, 2].set(-1e4)
    reset = jnp.zeros((BATCH, TOKENS), bool).at[:, 9].set(True)

    def after(args):
        o, state = OPS[op](**args, reset=reset, impl="tpu", chunk=16)
        return jnp.sum(o[:, 9:] ** 2) + jnp.sum(state**2)

    got = jax.jit(jax.grad(after))(args)
    assert jnp.abs(got.pop("initial_state")).max() == 0
    for gradient in got.values():
        assert jnp.abs(gradient[:, :9]).max() == 0
        assert jnp.abs(gradient[:, 9:]).max() > 0


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


def lowered(function, *args):
    with jax.sharding.use_abstract_mesh(compat.abstract_tpu()), dispatch.target("tpu"):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


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


# Selective scan ----------------------------------------------------------------------------------


def scan_arguments(tokens=TOKENS, channels=6, states=4):
    normal = np.random.default_rng(0).standard_normal
    args = {
        "x": normal((BATCH, tokens, channels)),
        "dt": np.exp(normal((BATCH, tokens, channels)) - 1),
        "A": -np.exp(normal((channels, states))),
        "B": normal((BATCH, tokens, states)),
        "C": normal((BATCH, tokens, states)),
        "D": normal((channels,)),
        "initial_state": normal((BATCH, channels, states)),
    }
    return {name: jnp.asarray(x, jnp.float32) for name, x in args.items()}


def scan_with_gradients(args, reset, impl):
    @jax.jit
    def run(args):
        def call(args):
            return selective_scan(**args, reset=reset, impl=impl, chunk=16)

        out, pull = jax.vjp(call, args)
        rng = np.random.default_rng(1)
        cotangent = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in out]
        return out, pull(tuple(cotangent))[0]

    return run(args)


def test_interpreted_selective_scan_equals_the_token_loop_and_its_gradients(interpreted):
    args = scan_arguments()
    got = scan_with_gradients(args, resets(), "tpu")
    with dispatch.target("cpu"), jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in args.items()}
        want = scan_with_gradients(wide, resets(), "reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("impl, kernels", [("auto", 1), ("tpu", 1), ("xla", 0)])
def test_the_named_selective_scan_is_in_the_program_for_tpu(impl, kernels):
    args = scan_arguments(tokens=64, channels=256, states=16)
    args = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in args.items()}
    text = lowered(lambda args: selective_scan(**args, impl=impl), args)
    assert text.count("tpu_custom_call") == kernels


# mLSTM -------------------------------------------------------------------------------------------


def mlstm_arguments():
    normal = np.random.default_rng(0).standard_normal
    args = {name: normal((BATCH, TOKENS, HEADS, KEY)) for name in "qk"}
    args["v"] = normal((BATCH, TOKENS, HEADS, VALUE))
    args["log_input"] = 3 * normal((BATCH, TOKENS, HEADS))
    args["log_forget"] = -np.exp(normal((BATCH, TOKENS, HEADS)) - 1)
    args["initial_state"] = MLSTMMemory(
        normal((BATCH, HEADS, KEY, VALUE)),
        normal((BATCH, HEADS, KEY)),
        np.abs(normal((BATCH, HEADS))),
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), args)


def mlstm_with_gradients(args, reset, impl):
    @jax.jit
    def run(args):
        out, pull = jax.vjp(lambda a: mlstm(**a, reset=reset, impl=impl, chunk=16), args)
        rng = np.random.default_rng(1)
        return out, pull(jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), out))[0]

    return run(args)


def test_interpreted_mlstm_equals_the_token_loop_and_its_gradients(interpreted):
    args = mlstm_arguments()
    got = mlstm_with_gradients(args, resets(), "tpu")
    with dispatch.target("cpu"), jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), args)
        want = mlstm_with_gradients(wide, resets(), "reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, b, 1e-5)


def test_the_mlstm_for_tpu_is_a_kernel():
    shapes_of = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mlstm_arguments())
    text = lowered(lambda args: mlstm(**args), shapes_of)
    assert text.count('kernel_name = "chunk_scan_forward"') == 1


# Attention ---------------------------------------------------------------------------------------

KEYS_BEFORE = 21


def attention_arguments(cached):
    normal = np.random.default_rng(0).standard_normal
    keys = TOKENS + (KEYS_BEFORE if cached else 0)
    args = {
        "q": normal((BATCH, TOKENS, 4, KEY)),
        "k": normal((BATCH, keys, 2, KEY)),
        "v": normal((BATCH, keys, 2, VALUE)),
        "bias": np.array([0.1, 0.2, 0.3, 0.4]),
    }
    return {name: jnp.asarray(x, jnp.float32) for name, x in args.items()}


def attention_documents():
    rng = np.random.default_rng(3)
    own = np.sort(rng.integers(0, 3, (BATCH, TOKENS)), axis=1)
    cache = np.full((BATCH, KEYS_BEFORE), -1)
    cache[0, -5:] = 0
    return jnp.asarray(own), jnp.asarray(np.concatenate([cache, own], 1))


def attention_positions():
    rng = np.random.default_rng(4)
    shape = (BATCH, TOKENS + KEYS_BEFORE)
    return tuple(jnp.asarray(rng.integers(0, 50, s)) for s in ((BATCH, TOKENS), shape))


def attention_with_gradients(args, impl, **rule):
    @jax.jit
    def run(args):
        o, pull = jax.vjp(lambda args: attention(**args, impl=impl, **rule), args)
        return o, pull(jnp.asarray(np.random.default_rng(1).standard_normal(o.shape), o.dtype))[0]

    return run(args)


ATTENTION = {
    "causal": (False, {}),
    "window-cache": (True, {"window": 9}),
    "documents-cache": (True, {"segment_ids": attention_documents()}),
    "both-directions": (False, {"causal": False}),
    "positions": (True, {"positions": attention_positions(), "window": 9}),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_interpreted_attention_equals_the_definition_and_its_gradients(
    case, interpreted, monkeypatch
):
    monkeypatch.setattr(tpu_layout, "ROW", 16)
    monkeypatch.setattr(tpu_layout, "KEYS", 32)
    cached, rule = ATTENTION[case]
    args = attention_arguments(cached)
    got = attention_with_gradients(args, "tpu", **rule)
    with dispatch.target("cpu"), jax.enable_x64(True):
        wide = {name: x.astype(jnp.float64) for name, x in args.items()}
        want = attention_with_gradients(wide, "reference", **rule)
    assert_near(got[0], want[0], 1e-5)
    for name in args:
        assert_near(got[1][name], want[1][name], 1e-5)


def test_interpreted_attention_in_bfloat16_stays_near_float32(interpreted):
    args = attention_arguments(False)
    half = {name: x.astype(jnp.bfloat16) for name, x in args.items()}
    o, gradients = attention_with_gradients(half, "tpu")
    assert o.dtype == gradients["k"].dtype == jnp.bfloat16
    with dispatch.target("cpu"):
        exact = {name: x.astype(jnp.float32) for name, x in half.items()}
        want = attention_with_gradients(exact, "reference")
    assert_near(o, want[0], 0.02)
    for name in args:
        assert_near(gradients[name].astype(jnp.float32), want[1][name], 0.03)


def test_interpreted_splash_attention_is_the_same_attention(interpreted):
    normal = np.random.default_rng(0).standard_normal
    tokens, keys = 128, 256
    sizes = {"q": (1, tokens, 2, 128), "k": (1, keys, 1, 128), "v": (1, keys, 1, 128)}
    args = {name: jnp.asarray(normal(size), jnp.float32) for name, size in sizes.items()}
    own = np.sort(np.random.default_rng(3).integers(0, 3, (1, tokens)), axis=1)
    cache = np.where(np.arange(keys - tokens) < 100, -1, 0)[None]
    ids = (jnp.asarray(own), jnp.asarray(np.concatenate([cache, own], axis=1)))
    got = attention_with_gradients(args, "splash", window=70, segment_ids=ids)
    with dispatch.target("cpu"):
        want = attention_with_gradients(args, "reference", window=70, segment_ids=ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize("impl, kernels", [("auto", 3), ("tpu", 3), ("splash", 3), ("xla", 0)])
def test_the_named_attention_is_in_the_program_for_tpu(impl, kernels):
    sizes = {"q": (1, 256, 4, 128), "k": (1, 256, 2, 128), "v": (1, 256, 2, 128)}
    args = {name: jax.ShapeDtypeStruct(size, jnp.bfloat16) for name, size in sizes.items()}

    def step(args):
        return jax.grad(
            lambda args: jnp.sum(attention(**args, impl=impl).astype(jnp.float32) ** 2)
        )(args)

    text = lowered(step, args)
    assert text.count("tpu_custom_call") == kernels
    assert ("attention_key_gradients" in text) == (impl in ("auto", "tpu"))


REFUSED = {
    "'splash' cannot run this call: it has no `bias`": ({}, {"impl": "splash"}),
    "'splash' cannot run this call: T=37 must be a multiple": ({"bias": None}, {"impl": "splash"}),
    "'cudnn' is not available on tpu": ({}, {"impl": "cudnn"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_attention_that_a_kernel_cannot_do_is_refused(message):
    change, settings = REFUSED[message]
    with dispatch.target("tpu"), pytest.raises(ValueError, match=message):
        attention(**(attention_arguments(False) | change), **settings)
