"""Scans, Taylor attention and the mLSTM as TPU kernels: in Pallas's interpreter, and lowered.

The definition runs in float64; the interpreter multiplies float32 in full, so values are held to
float32 rounding: 1e-5 of the largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import (
    assert_near,
    assert_nothing_crosses_a_reset,
    defined,
    float32,
    interpreted,
    lowered,
)

from pallas_kernels import diagonal_scan, dispatch, mlstm, selective_scan, taylor_attention
from pallas_kernels.mlstm import MLSTMMemory
from pallas_kernels.taylor_attention import feature_count

BATCH, TOKENS, HEADS, KEY, VALUE = 2, 37, 2, 4, 3
OPS = {"diagonal_scan": diagonal_scan, "taylor_attention": taylor_attention}


def resets(tokens=TOKENS):
    reset = np.zeros((BATCH, tokens), bool)
    for lane, token in [(0, 5), (0, 16), (0, 17), (1, 0), (1, 32), (1, 36)]:
        reset[lane, token] = True
    return jnp.asarray(reset)


def draw(op, tokens=TOKENS, size=KEY, channels=6):
    normal = np.random.default_rng(0).standard_normal
    if op == "diagonal_scan":
        args = {name: normal((BATCH, tokens, channels)) for name in ("x", "log_decay")}
        args["log_decay"] = -np.exp(2 * args["log_decay"])
        args["initial_state"] = normal((BATCH, channels))
    else:
        args = {name: normal((BATCH, tokens, HEADS, size)) for name in "qk"}
        args["v"] = normal((BATCH, tokens, HEADS, VALUE))
        # A state that keys have written, so that sums of weights are what they can be.
        keys, values = normal((BATCH, HEADS, 3, size)), normal((BATCH, HEADS, 3, VALUE))
        args["initial_state"] = taylor_state(keys, values)
    return float32(args)


def taylor_state(k, v):
    """Sums over keys of the features 1, x, x_i x_j (i < j) and x_i^2 / sqrt(2), in order."""
    i, j = np.triu_indices(k.shape[-1])
    pairs = k[..., i] * k[..., j] * np.where(i == j, 0.5**0.5, 1)
    ones = np.ones_like(k[..., :1])
    features = np.concatenate([ones, k, pairs], -1)
    assert features.shape[-1] == feature_count(k.shape[-1])
    return np.swapaxes(features, -1, -2) @ np.concatenate([v, np.ones_like(v[..., :1])], -1)


def calling(op, impl, reset=None, chunk=16):
    return lambda args: OPS[op](**args, reset=reset, chunk=chunk, impl=impl)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("packed", [False, True])
def test_interpreted_chunks_equal_the_token_loop_and_its_gradients(op, packed):
    args, reset = draw(op), resets() if packed else None
    got = interpreted(calling(op, "tpu", reset), args)
    want = defined(calling(op, "reference", reset), args)
    assert_near(got[0], want[0], 1e-5)
    assert_near(got[1], want[1], 1e-5, least=1e-3)


@pytest.mark.parametrize("channels", [256, 384])
def test_interpreted_rows_of_channels_are_put_back_in_order(channels):
    args = draw("diagonal_scan", tokens=18, channels=channels)
    got = interpreted(calling("diagonal_scan", "tpu", resets(37)[:, :18]), args)
    want = defined(calling("diagonal_scan", "reference", resets(37)[:, :18]), args)
    assert_near(got, want, 1e-5)


def test_interpreted_extreme_decays_agree_with_the_definition():
    args, rng = draw("diagonal_scan"), np.random.default_rng(2)
    levels = np.array([-np.inf, -1e4, -30.0, -1e-6, 0.0], np.float32)
    args["log_decay"] = jnp.asarray(rng.choice(levels, args["log_decay"].shape))
    got = interpreted(calling("diagonal_scan", "tpu"), args)
    want = defined(calling("diagonal_scan", "reference"), args)
    assert_near(got, want, 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_interpreted_nothing_crosses_a_reset_not_even_rounding(op):
    assert_nothing_crosses_a_reset(
        lambda args, reset: calling(op, "tpu", reset)(args), draw(op), BATCH, TOKENS
    )


@pytest.mark.parametrize("op", OPS)
def test_interpreted_bfloat16_stays_near_float32_with_a_float32_state(op):
    args = draw(op)
    half = {n: x.astype(jnp.bfloat16) if n in ("x", *"qkv") else x for n, x in args.items()}
    (o, state), _ = interpreted(calling(op, "tpu"), half)
    want = defined(calling(op, "reference"), half)[0]
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few roundings deep
    assert_near((o, state), want, 0.02)


def wide(op):
    return draw(op, tokens=128, size=16, channels=1024)


@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_lower_for_tpu(op):
    def step(args, reset):
        return jax.grad(lambda args: jnp.sum(calling(op, "auto", reset, 64)(args)[0] ** 2))(args)

    text = lowered(step, wide(op), resets(128))
    for kernel in ("chunk_scan_forward", "chunk_scan_backward"):
        assert text.count(f'kernel_name = "{kernel}"') == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl, kernels", [("auto", 1), ("tpu", 1), ("xla", 0), ("reference", 0)])
def test_the_named_implementation_is_in_the_program_for_tpu(op, impl, kernels):
    assert lowered(calling(op, impl), wide(op)).count("tpu_custom_call") == kernels


@pytest.mark.parametrize("op", OPS)
def test_a_call_that_does_not_suit_the_kernel_is_refused_by_name_and_left_to_xla(op):
    args = draw(op)
    with dispatch.target("tpu"), pytest.raises(ValueError, match="chunk=24 must be a power of"):
        calling(op, "tpu", chunk=24)(args)
    assert "tpu_custom_call" not in lowered(calling(op, "auto", chunk=24), args)


def test_what_is_too_large_for_the_kernel_is_refused():
    with dispatch.target("tpu"):
        with pytest.raises(ValueError, match="chunk=128 must be at most 64, because its tokens"):
            calling("diagonal_scan", "tpu", chunk=128)(draw("diagonal_scan"))
        with pytest.raises(ValueError, match="its state needs 24 MiB of VMEM a head"):
            calling("taylor_attention", "tpu")(draw("taylor_attention", tokens=2, size=64))


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
    return float32(args)


def test_interpreted_selective_scan_equals_the_token_loop_and_its_gradients():
    def call(impl):
        return lambda args: selective_scan(**args, reset=resets(), impl=impl, chunk=16)

    args = scan_arguments()
    assert_near(interpreted(call("tpu"), args), defined(call("reference"), args), 1e-5)


@pytest.mark.parametrize("impl, kernels", [("auto", 1), ("tpu", 1), ("xla", 0)])
def test_the_named_selective_scan_is_in_the_program_for_tpu(impl, kernels):
    args = scan_arguments(tokens=64, channels=256, states=16)
    text = lowered(lambda args: selective_scan(**args, impl=impl), args)
    assert text.count("tpu_custom_call") == kernels


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
    return float32(args)


def test_interpreted_mlstm_equals_the_token_loop_and_its_gradients():
    def call(impl):
        return lambda args: mlstm(**args, reset=resets(), impl=impl, chunk=16)

    args = mlstm_arguments()
    assert_near(interpreted(call("tpu"), args), defined(call("reference"), args), 1e-5)


def test_the_mlstm_for_tpu_is_a_kernel():
    text = lowered(lambda args: mlstm(**args), mlstm_arguments())
    assert text.count('kernel_name = "chunk_scan_forward"') == 1
