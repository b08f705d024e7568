"""Memories that learn at test time as TPU kernels: in Pallas's interpreter, and lowered.

The definition runs in float64, the kernels in float32 (multiplied in full by the interpreter):
rounding near 1e-6, which steps of a memory on its own answers amplify to 1e-5 and gradients through
them to some 1e-4. Any real error is larger than these.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import assert_near, defined, float32, interpreted, lowered

from pallas_kernels import dispatch, neural_memory, ttt_linear, ttt_mlp
from pallas_kernels.aot_cases import RULES, TITANS
from pallas_kernels.ttt import LinearMemory, MLPMemory, Norm

BATCH, TOKENS, HEADS, SIZE, HIDDEN, BLOCK = 2, 37, 2, 5, 6, 16
RESETS = [(0, 5), (0, 20), (0, 21), (1, 0), (1, 32)]
FIRST = 21  # tokens of the first of two calls; the second gets its state, in the middle of a block
TTT = {"ttt_linear": ttt_linear, "ttt_mlp": ttt_mlp}


def resets(tokens=TOKENS, batch=BATCH):
    reset = np.zeros((batch, tokens), bool)
    for lane, token in RESETS:
        if lane < batch and token < tokens:
            reset[lane, token] = True
    return jnp.asarray(reset)


def ttt_arguments(op, tokens=TOKENS, batch=BATCH, size=SIZE, hidden=HIDDEN, block=BLOCK):
    normal = np.random.default_rng(0).standard_normal
    if op == "ttt_linear":
        memory = LinearMemory(normal((HEADS, size, size)), normal((HEADS, size)))
    else:
        memory = MLPMemory(
            normal((HEADS, size, hidden)),
            normal((HEADS, hidden)),
            normal((HEADS, hidden, size)),
            normal((HEADS, size)),
        )
    return float32(
        {
            "tokens": {name: normal((batch, tokens, HEADS, size)) for name in "qkv"}
            | {"rate": 0.2 * np.abs(normal((batch, tokens, HEADS))) / size},
            "shared": {
                "place_rate": (np.abs(normal(block)) + 0.1) / 4,
                "memory": memory,
                "norm": Norm(1 + 0.3 * normal((HEADS, size)), normal((HEADS, size))),
            },
            "reset": resets(tokens, batch),
        }
    )


def memory_arguments(rule, tokens=TOKENS, batch=BATCH, size=SIZE):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    streams = {name: normal((batch, tokens, HEADS, size)) for name in "qkv"}
    streams["k"] /= np.linalg.norm(streams["k"], axis=-1, keepdims=True)
    streams["rate"] = 0.2 * rng.random((batch, tokens, HEADS))
    streams["log_keep"] = -np.exp(2 * normal((batch, tokens, HEADS)) - 3)
    if rule["learner"].momentum:
        streams["log_momentum"] = -np.exp(2 * normal((batch, tokens, HEADS)) - 1)
    if rule["bias"].needs_threshold:
        streams["threshold"] = 0.5 + rng.random((batch, tokens, HEADS))
    structure = rule["structure"]
    weights = tuple(
        normal((HEADS, *shape)) / np.sqrt(shape[0]) for shape in structure.shapes(size, size)
    )
    names = structure.constants(size)
    constants = {n: x + 0.3 * normal((HEADS, size)) for n, x in names.items()}
    shared = {"weights": weights, "constants": constants}
    return float32({"tokens": streams, "shared": shared, "reset": resets(tokens, batch)})


def calling(op, impl, **settings):
    def call(args, **more):
        return op(**args["tokens"], **args["shared"], reset=args["reset"], impl=impl,
                  **settings, **more)  # fmt: skip

    return call


def in_two(call):
    """Two calls, the second from the state of the first: both outputs, and the last state."""

    def both(args):
        def cut(piece):
            tokens, reset = jax.tree.map(lambda x: x[:, piece], (args["tokens"], args["reset"]))
            return args | {"tokens": tokens, "reset": reset}

        early, state = call(cut(slice(FIRST)))
        late, state = call(cut(slice(FIRST, None)), state=state)
        return early, late, state

    return both


@pytest.mark.parametrize("op", TTT)
def test_interpreted_ttt_equals_the_token_loop_and_its_gradients(op):
    args = ttt_arguments(op)
    got = interpreted(in_two(calling(TTT[op], "tpu")), args)
    want = defined(in_two(calling(TTT[op], "reference")), args)
    assert_near(got[0], want[0], 2e-5)
    assert_near(got[1], want[1], 2e-4, least=1e-3)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RULES if name != "titans"]


@pytest.mark.parametrize("name", ["titans", *SLOW])
def test_interpreted_memories_equal_the_token_loop_and_their_gradients(name):
    rule = RULES[name]
    args, settings = memory_arguments(rule), rule | {"update_every": BLOCK}
    got = interpreted(in_two(calling(neural_memory, "tpu", **settings)), args)
    want = defined(in_two(calling(neural_memory, "reference", **settings)), args)
    assert_near(got[0], want[0], 2e-5)
    assert_near(got[1], want[1], 2e-4, least=1e-5)


def test_interpreted_extreme_gates_agree_with_the_definition():
    settings = TITANS | {"update_every": BLOCK}
    args, rng = memory_arguments(TITANS), np.random.default_rng(2)
    for name in ("log_keep", "log_momentum"):
        levels = np.array([-1e4, -30.0, -1e-6, 0.0], np.float32)
        args["tokens"][name] = jnp.asarray(rng.choice(levels, args["tokens"][name].shape))
    got = interpreted(calling(neural_memory, "tpu", **settings), args)
    want = defined(calling(neural_memory, "reference", **settings), args)
    assert_near(got[0], want[0], 2e-5)
    assert_near(got[1], want[1], 2e-4)


def test_interpreted_nothing_crosses_a_reset():
    reset = jnp.zeros((BATCH, TOKENS), bool).at[:, 9].set(True)
    args = memory_arguments(TITANS) | {"reset": reset}
    call = calling(neural_memory, "tpu", **TITANS, update_every=BLOCK)

    def after(tokens):
        o, state = call(args | {"tokens": tokens})
        return jnp.sum(o[:, 9:] ** 2) + sum(jnp.sum(w**2) for w in state.weights)

    with dispatch.target("tpu", interpreter=True):
        got = jax.jit(jax.grad(after))(args["tokens"])
    for gradient in got.values():
        assert jnp.abs(gradient[:, :9]).max() == 0
        assert jnp.abs(gradient[:, 9:]).max() > 0


def test_interpreted_bfloat16_is_computed_in_float32():
    args = memory_arguments(TITANS)
    half = {n: x.astype(jnp.bfloat16 if n in "qkv" else x.dtype) for n, x in args["tokens"].items()}
    half = args | {"tokens": half}
    settings = TITANS | {"update_every": BLOCK}
    (o, state), _ = interpreted(calling(neural_memory, "tpu", **settings), half)
    want, want_state = defined(calling(neural_memory, "reference", **settings), half)[0]
    assert o.dtype == jnp.bfloat16
    assert_near(o, want, 2**-8)  # one rounding of the output
    assert_near(state, want_state, 2e-5)


def wide_arguments(op):
    if op in TTT:
        return ttt_arguments(op, tokens=48, batch=1, size=64, hidden=128)
    return memory_arguments(TITANS, tokens=48, batch=1, size=64)


CALLS = {name: (op, {}) for name, op in TTT.items()}
CALLS["neural_memory"] = (neural_memory, TITANS | {"update_every": BLOCK})


@pytest.mark.parametrize("op", CALLS)
def test_forward_and_backward_lower_for_tpu(op):
    call = calling(CALLS[op][0], "auto", **CALLS[op][1])

    def step(args):
        def loss(tokens, shared):
            o, _ = call(args | {"tokens": tokens, "shared": shared})
            return jnp.sum(o**2)

        return jax.grad(loss, (0, 1))(args["tokens"], args["shared"])

    text = lowered(step, wide_arguments(op))
    for kernel in ("chunk_scan_forward", "chunk_scan_backward"):
        assert f'kernel_name = "{kernel}"' in text


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("impl, kernels", [("auto", 1), ("tpu", 1), ("xla", 0)])
def test_the_named_implementation_is_in_the_program_for_tpu(op, impl, kernels):
    text = lowered(calling(CALLS[op][0], impl, **CALLS[op][1]), wide_arguments(op))
    assert text.count("tpu_custom_call") == kernels


def test_calls_that_do_not_suit_the_kernel_are_refused_by_name_and_left_to_xla():
    args = memory_arguments(TITANS)
    short, message = TITANS | {"update_every": 7}, "update_every=7 must be a multiple of 16"
    with dispatch.target("tpu"), pytest.raises(ValueError, match=message):
        calling(neural_memory, "tpu", **short)(args)
    with dispatch.target("tpu"), pytest.raises(ValueError, match="update_every=4 must be a multi"):
        calling(ttt_linear, "tpu")(ttt_arguments("ttt_linear", block=4))
    assert "tpu_custom_call" not in lowered(calling(neural_memory, "auto", **short), args)
    large = memory_arguments(TITANS, tokens=2, batch=1, size=256)
    with dispatch.target("tpu"), pytest.raises(ValueError, match="needs 24 MiB of VMEM a head"):
        calling(neural_memory, "tpu", **TITANS)(large)
