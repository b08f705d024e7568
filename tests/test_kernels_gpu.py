"""Kernels for Hopper GPUs without one: run in Pallas's interpreter, and lowered for CUDA.

Operands of products are bfloat16: 8 bits, 0.4% a rounding, a few roundings deep.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, compat, delta_rule, dispatch, linear_attention
from pallas_kernels.attention import maintained

OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule}
TOKENS, HEADS, SIZE = 130, 2, 64
RESETS = [5, 64, 65, 100]


def draw(op, size=SIZE, tokens=TOKENS):
    normal = np.random.default_rng(0).standard_normal
    args = {name: normal((1, tokens, HEADS, size)) for name in "qkv"}
    args["k"] /= np.linalg.norm(args["k"], axis=-1, keepdims=True)
    args = {name: jnp.asarray(x, jnp.bfloat16) for name, x in args.items()}
    args["initial_state"] = jnp.asarray(normal((1, HEADS, size, size)), jnp.float32)
    gates = -np.exp(2 * normal((1, tokens, HEADS)) - 2)
    gates[0, 20] = -1e4  # forgets everything, and must not blur the tokens around it
    args["log_decay"] = jnp.asarray(gates, jnp.float32)
    if op == "delta_rule":
        strength = 2 / (1 + np.exp(-normal((1, tokens, HEADS))))
        args["beta"] = jnp.asarray(strength, jnp.float32)
    return args


def assert_near(got, want, part):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=part * np.abs(b).max())


@pytest.mark.parametrize("op", OPS)
def test_interpreted_chunks_equal_the_token_loop_without_a_race(op):
    args = draw(op)
    reset = jnp.zeros((1, TOKENS), bool).at[0, jnp.asarray(RESETS)].set(True)
    with dispatch.target("gpu", interpreter=compat.gpu_interpreter(detect_races=True)):
        got = OPS[op](**args, reset=reset, impl="gpu", chunk=64)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    assert_near(got, OPS[op](**args, reset=reset, impl="reference"), 0.02)


def test_interpreted_values_of_128_columns_are_two_blocks():
    args = draw("linear_attention", size=128, tokens=64)
    with dispatch.target("gpu", interpreter=compat.gpu_interpreter()):
        got = linear_attention(**args, impl="gpu")
    assert_near(got, linear_attention(**args, impl="reference"), 0.02)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_the_chunked_form(op):
    args = draw(op, tokens=64)

    def loss(args, impl):
        o, state = OPS[op](**args, impl=impl, chunk=64)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state**2)

    with dispatch.target("gpu", interpreter=compat.gpu_interpreter()):
        got = jax.grad(loss)(args, "gpu")
    want = jax.grad(loss)(args, "reference")
    for name in args:
        assert_near(got[name], want[name], 0.03)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl, kernels", [("gpu", 1), ("auto", 0), ("xla", 0)])
def test_the_named_implementation_is_in_the_program_for_cuda(op, impl, kernels):
    args = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in draw(op, size=128).items()}
    with dispatch.target("gpu"):
        traced = jax.jit(lambda args: OPS[op](**args, impl=impl, chunk=64)).trace(args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == kernels


REFUSED = {
    "K=32 must be one of": {name: jnp.ones((1, 64, 1, 32), jnp.bfloat16) for name in "qkv"},
    "V=32 must be a multiple of 64": {"v": jnp.ones((1, 64, 1, 32), jnp.bfloat16)},
    "q has dtype float32; it must be bfloat16": {"q": jnp.ones((1, 64, 1, 64))},
    "log_decay must be None or one a head": {"log_decay": -jnp.ones((1, 64, 1, 64))},
    "chunk=32 must be 64": {"chunk": 32},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_call_that_does_not_suit_the_kernel_is_refused_by_name(message):
    args = {name: jnp.ones((1, 64, 1, 64), jnp.bfloat16) for name in "qkv"}
    with dispatch.target("gpu"), pytest.raises(ValueError, match=f"cannot run.*{message}"):
        linear_attention(**(args | REFUSED[message]), impl="gpu")


@pytest.mark.parametrize("window", [None, 7])
def test_cudnn_is_asked_for_the_same_attention(window, monkeypatch):
    """cuDNN is not here: what is asked of it is answered by plain JAX."""
    ask = jax.nn.dot_product_attention

    def answer(*args, implementation, **settings):
        assert implementation == "cudnn"
        return ask(*args, implementation="xla", **settings)

    monkeypatch.setattr(maintained.jax.nn, "dot_product_attention", answer)
    normal = np.random.default_rng(0).standard_normal
    q, k, v = (jnp.asarray(normal((2, 20, heads, 8)), jnp.bfloat16) for heads in (4, 2, 2))
    with dispatch.target("gpu"):
        got = attention(q, k, v, window=window, impl="cudnn")
    assert_near(got, attention(q, k, v, window=window, impl="reference"), 0.02)


def test_cudnn_refuses_what_it_would_get_wrong():
    q = jnp.ones((1, 16, 2, 8), jnp.bfloat16)
    with dispatch.target("gpu"):
        with pytest.raises(ValueError, match="T=16 must be J=20"):
            attention(q, jnp.ones((1, 20, 2, 8), q.dtype), jnp.ones((1, 20, 2, 8), q.dtype),
                      impl="cudnn")  # fmt: skip
        with pytest.raises(ValueError, match="no `segment_ids`"):
            attention(q, q, q, segment_ids=jnp.ones((1, 16), jnp.int32), impl="cudnn")
