"""Kernels for Hopper GPUs without one: run in Pallas's interpreter, and lowered for CUDA.

Operands of products are bfloat16: 8 bits, 0.4% a rounding, a few roundings deep.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, compat, delta_rule, dispatch, linear_attention, mlstm
from pallas_kernels.attention import maintained
from pallas_kernels.chunk_gates_gpu import decay_gradient
from pallas_kernels.linear_attention import gpu as linear_attention_gpu
from pallas_kernels.mlstm import MLSTMMemory

OPS = {
    "linear_attention": linear_attention,
    "channels": linear_attention,  # with a decay of each channel
    "delta_rule": delta_rule,
}
TOKENS, HEADS, SIZE = 130, 2, 64
RESETS = [5, 64, 65, 90]


def draw(op, size=SIZE, tokens=TOKENS, heads=HEADS):
    normal = np.random.default_rng(0).standard_normal
    args = {name: normal((1, tokens, heads, size)) for name in "qkv"}
    args["k"] /= np.linalg.norm(args["k"], axis=-1, keepdims=True)
    args = {name: jnp.asarray(x, jnp.bfloat16) for name, x in args.items()}
    args["initial_state"] = jnp.asarray(normal((1, heads, size, size)), jnp.float32)
    channels = (size,) if op == "channels" else ()
    gates = -np.exp(2 * normal((1, tokens, heads, *channels)) - 2)
    gates[0, 20] = -1e4  # forgets everything, and must not blur the tokens around it
    if op == "channels":
        gates[0, 40:, 0, ::2], gates[0, 70:73] = -np.inf, 0.0
    args["log_decay"] = jnp.asarray(gates, jnp.float32)
    if op == "delta_rule":
        strength = 2 / (1 + np.exp(-normal((1, tokens, heads))))
        args["beta"] = jnp.asarray(strength, jnp.float32)
    return args


def assert_near(got, want, part):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=part * np.abs(b).max())


def outputs_and_gradients(op, args, reset, impl):
    """Of random cotangents: o and the last state, and every gradient."""
    normal = np.random.default_rng(1).standard_normal

    @jax.jit
    def run(args):
        call = mlstm if op == "mlstm" else OPS[op]
        out, pull = jax.vjp(lambda args: call(**args, reset=reset, impl=impl), args)
        return out, pull(jax.tree.map(lambda x: jnp.asarray(normal(x.shape), x.dtype), out))[0]

    return run(args)


def compare(op, args, reset=None, *, races=False):
    """Interpreted, against the definition: outputs, and the gradient of each argument, whose error
    may be 1% of its largest value."""
    with dispatch.target("gpu", interpreter=compat.gpu_interpreter(detect_races=races)):
        got, got_gradients = outputs_and_gradients(op, args, reset, "gpu")
    want, want_gradients = outputs_and_gradients(op, args, reset, "reference")
    assert got[0].dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got[1]))
    assert_near(got, want, 0.01)
    for name, arg in args.items():
        for gradient, x in zip(*map(jax.tree.leaves, (got_gradients[name], arg)), strict=True):
            assert gradient.dtype == x.dtype and gradient.shape == x.shape
        assert_near(got_gradients[name], want_gradients[name], 0.01)


@pytest.mark.parametrize("op", OPS)
def test_interpreted_chunks_equal_the_token_loop_without_a_race(op, monkeypatch):
    """Three chunks; linear attention in two segments, one of two chunks and one of one.

    With decays of channels, two chunks of one head: every block of threads is compiled anew.
    """
    monkeypatch.setattr(linear_attention_gpu, "LEAST_CHUNKS", 2)
    args = draw(op, tokens=100, heads=1) if op == "channels" else draw(op)
    reset = jnp.zeros(args["q"].shape[:2], bool).at[0, jnp.asarray(RESETS)].set(True)
    compare(op, args, reset, races=True)


def test_heads_that_share_keys_in_parts():
    normal = np.random.default_rng(0).standard_normal
    sizes = {"q": (1, 192), "k": (1, 192), "v": (2, 192)}
    args = {n: jnp.asarray(normal((1, 40, *size)) / 8, jnp.bfloat16) for n, size in sizes.items()}
    args["log_decay"] = jnp.asarray(-np.exp(normal((1, 40, 2)) - 2), jnp.float32)
    args["initial_state"] = jnp.asarray(normal((1, 2, 192, 192)), jnp.float32)
    compare("linear_attention", args)


@pytest.mark.parametrize("capability, chosen", [("9.0", "gpu"), ("8.0", "xla"), ("10.0", "xla")])
def test_only_a_hopper_card_runs_the_kernels(capability, chosen, monkeypatch):
    card = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    unfit = {"gpu": partial(linear_attention_gpu.unfit, q, q, q, None, scale=None)}
    assert dispatch.resolve("linear_attention", "auto", unfit) == chosen


@pytest.mark.parametrize("size, message", [(320, "K=320 is more than 256"), (64, "one a head")])
def test_what_the_delta_rules_kernel_has_not_is_refused_by_name(size, message):
    args = {name: jnp.ones((1, 64, 1, size), jnp.bfloat16) for name in "qkv"}
    channels = (size,) if size == 64 else ()
    args |= {"beta": jnp.ones((1, 64, 1)), "log_decay": -jnp.ones((1, 64, 1, *channels))}
    with dispatch.target("gpu"), pytest.raises(ValueError, match=message):
        delta_rule(**args, impl="gpu")


def test_wide_keys_of_the_delta_rule():
    """Tiles of K = 256 leave room for 64 values: two parts here."""
    args = draw("delta_rule", size=256, tokens=70, heads=1)
    args |= {name: args[name][..., :128] for name in ("v", "initial_state")}
    compare("delta_rule", args)


@pytest.mark.parametrize("op", OPS)
def test_sizes_between_tiles(op):
    """Keys of 72 and values of 65 channels: a head, and the column that makes a normaliser."""
    args = draw(op, size=72, tokens=40, heads=1)
    args |= {name: args[name][..., :65] for name in ("v", "initial_state")}
    compare(op, args)


def test_interpreted_mlstm_equals_the_token_loop_and_its_gradients():
    """Two chunks. Keys are long, so that divisors are small differences of large terms."""
    args = draw("linear_attention", tokens=100)
    normal = np.random.default_rng(2).standard_normal
    args["k"] = jnp.asarray(normal(args["k"].shape), jnp.bfloat16)
    args["log_forget"] = args.pop("log_decay")
    args["log_input"] = jnp.asarray(3 * normal((1, 100, HEADS)), jnp.float32)
    args["initial_state"] = MLSTMMemory(
        args["initial_state"],
        jnp.asarray(normal((1, HEADS, SIZE)), jnp.float32),
        jnp.asarray(np.abs(normal((1, HEADS))), jnp.float32),
    )
    reset = jnp.zeros((1, 100), bool).at[0, jnp.asarray(RESETS)].set(True)
    compare("mlstm", args, reset)


@pytest.mark.parametrize("op", ["channels", "delta_rule"])
def test_three_parts_of_values(op):
    args = draw(op, tokens=40)
    args["v"] = jnp.concatenate([args["v"], -2 * args["v"], args["v"][:, ::-1]], -1)
    state = args["initial_state"]
    args["initial_state"] = jnp.concatenate([state, state[..., ::-1], -state], -1)
    with dispatch.target("gpu", interpreter=compat.gpu_interpreter()):
        got = OPS[op](**args, impl="gpu")
    assert_near(got, OPS[op](**args, impl="reference"), 0.01)


def test_the_decays_gradient_sums_only_what_no_end_separates():
    """Against sums one by one: ends are resets and decays so strong that nothing crosses them."""
    normal = np.random.default_rng(0).standard_normal
    tokens, segments = 300, 2  # of three chunks and two
    terms, ahead = normal((1, tokens, 2)), normal((1, 2, segments))
    log_decay = np.full((1, tokens, 2), -0.1)
    log_decay[0, [70, 250], 1] = -50.0
    reset = np.zeros((1, tokens), bool)
    reset[0, [3, 64, 65, 130]] = True
    want = np.zeros_like(terms)
    for head in range(2):
        for last in range(tokens - 1, -1, -1):
            behind = ahead[0, head, last // 192] if last in (191, tokens - 1) else total
            total = behind + terms[0, last, head]
            if reset[0, last] or log_decay[0, last, head] < -30:
                total = 0.0
            want[0, last, head] = total
    got = decay_gradient(*(jnp.asarray(x, jnp.float32) for x in (terms, log_decay)),
                         jnp.asarray(reset), jnp.asarray(ahead, jnp.float32))  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-4)


# Forward, and with the gradients.
KERNELS = {"linear_attention": (1, 4), "channels": (3, 8), "delta_rule": (3, 9)}


def call_of(op, impl, args):
    return OPS[op](**args, impl=impl)


def gradients_of(op, impl):
    def gradients(args):
        out, pull = jax.vjp(partial(call_of, op, impl), args)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    return gradients


def kernels_in(call, args):
    with dispatch.target("gpu"):
        text = str(jax.make_jaxpr(call)(args))
    return text.count("mpmd_map[") + text.count("core_map[")


def shapes(args):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in args.items()}


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_lower_for_cuda(op):
    args = shapes(draw(op, size=128))
    with dispatch.target("gpu"):
        traced = jax.jit(gradients_of(op, "gpu")).trace(args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == KERNELS[op][1]


@pytest.mark.parametrize("op", OPS)
def test_the_named_implementation_is_in_the_program(op):
    args = shapes(draw(op, size=128))
    for impl, (forward, both) in (("gpu", KERNELS[op]), ("auto", KERNELS[op]), ("xla", (0, 0))):
        assert kernels_in(partial(call_of, op, impl), args) == forward
        assert kernels_in(gradients_of(op, impl), args) == both


def test_few_lanes_are_cut_in_segments():
    args = {n: jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.bfloat16) for n in "qkv"}
    assert kernels_in(lambda args: linear_attention(**args), args) == 2


REFUSED = {
    "K=16 is less than 32": {n: jnp.ones((1, 64, 1, 16), jnp.bfloat16) for n in "qkv"},
    "V=31 is less than 32": {"v": jnp.ones((1, 64, 1, 31), jnp.bfloat16)},
    "q has dtype float32; it must be bfloat16": {"q": jnp.ones((1, 64, 1, 64))},
    "K=192 is more than 128": {n: jnp.ones((1, 64, 1, 192), jnp.bfloat16) for n in "qk"}
    | {"log_decay": -jnp.ones((1, 64, 1, 192))},
    "scale=0 has no cotangent": {"scale": 0.0},
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
