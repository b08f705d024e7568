"""A sequence sharded over devices gives what one device gives: outputs, last state, gradients.

Float64 throughout: rounding is near 1e-14, any real error larger than 1e-9. One device runs the
token loop (`reference`), so the comparison does not depend on chunks either.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import context_parallel, dispatch

DEVICES = 4
BATCH, TOKENS, HEADS, KEY, VALUE = 4, 24, 2, 4, 3  # 6 tokens a device
# In the middle of shards, at their borders, twice in one, and whole shards without any.
RESETS = [(0, 2), (0, 6), (0, 9), (0, 10), (1, 0), (1, 18), (2, 23)]
SHARDED = P(None, "context")


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices()[:DEVICES]
    return jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,), devices=devices)


def resets():
    reset = np.zeros((BATCH, TOKENS), bool)
    for lane, token in RESETS:
        reset[lane, token] = True
    return jnp.asarray(reset)


def recurrence(op, decay):
    normal = np.random.default_rng(0).standard_normal
    args = {
        "q": normal((BATCH, TOKENS, HEADS, KEY)),
        "k": normal((BATCH, TOKENS, HEADS, KEY)),
        "v": normal((BATCH, TOKENS, HEADS, VALUE)),
    }
    if op == "delta_rule":
        args["beta"] = 2 / (1 + np.exp(-normal((BATCH, TOKENS, HEADS))))
        args["k"] /= np.linalg.norm(args["k"], axis=-1, keepdims=True)
    if decay != "none":
        channels = (KEY,) if decay == "channel" else ()
        args["log_decay"] = -np.exp(normal((BATCH, TOKENS, HEADS, *channels)) - 1)
    args = {name: jnp.asarray(x) for name, x in args.items()}
    return args, jnp.asarray(normal((BATCH, HEADS, KEY, VALUE)))


def scan_arguments():
    normal = np.random.default_rng(0).standard_normal
    args = {
        "x": normal((BATCH, TOKENS, KEY)),
        "dt": np.exp(normal((BATCH, TOKENS, KEY)) - 1),
        "A": -np.exp(normal((KEY, VALUE))),
        "B": normal((BATCH, TOKENS, VALUE)),
        "C": normal((BATCH, TOKENS, VALUE)),
        "D": normal((KEY,)),
    }
    args = {name: jnp.asarray(x) for name, x in args.items()}
    return args, jnp.asarray(normal((BATCH, KEY, VALUE)))


def with_gradients(call, args, state, reset):
    @jax.jit
    def run(args, state):
        out, pull = jax.vjp(lambda args, state: call(args, state, reset), args, state)
        rng = np.random.default_rng(1)
        cotangent = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), out)
        return out, pull(cotangent)

    return run(args, state)


def sharded(mesh, specs, call, check_vma=True):
    def run(args, state, reset):
        rows = None if reset is None else SHARDED
        return jax.shard_map(
            lambda args, state, reset: call(args, state, reset),
            mesh=mesh,
            in_specs=(specs, P(), rows),
            out_specs=(SHARDED, P()),
            check_vma=check_vma,
        )(args, state, reset)

    return run


def assert_same(got, want, part=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=part * max(np.abs(b).max(), 1e-6))


CASES = [
    ("linear_attention", "none", True),
    ("linear_attention", "head", False),
    ("linear_attention", "channel", True),
    ("delta_rule", "none", False),
    ("delta_rule", "head", True),
]


@pytest.mark.parametrize("op, decay, packed", CASES)
def test_a_sharded_matrix_memory_is_the_whole_one(op, decay, packed, mesh):
    args, state = recurrence(op, decay)
    reset = resets() if packed else None
    split = partial(getattr(context_parallel, op), axis_name="context", chunk=4)
    call = sharded(
        mesh,
        dict.fromkeys(args, SHARDED),
        lambda args, state, reset: split(**args, initial_state=state, reset=reset),
    )
    whole = partial(getattr(pk, op), impl="reference")
    want = with_gradients(
        lambda args, state, reset: whole(**args, initial_state=state, reset=reset),
        args, state, reset,
    )  # fmt: skip
    assert_same(with_gradients(call, args, state, reset), want)


def test_the_kernel_for_tpu_runs_on_shards_in_the_interpreter(mesh):
    args, state = recurrence("linear_attention", "head")
    split = partial(context_parallel.linear_attention, axis_name="context", chunk=16, impl="tpu")
    call = sharded(
        mesh,
        dict.fromkeys(args, SHARDED),
        lambda args, state, reset: split(**args, initial_state=state, reset=reset),
        check_vma=False,  # the interpreter does not know which arrays differ between devices
    )
    want = pk.linear_attention(**args, initial_state=state, reset=resets(), impl="reference")
    with jax.enable_x64(False), dispatch.target("tpu", interpreter=True):
        narrow = {name: x.astype(jnp.float32) for name, x in args.items()}
        got = jax.jit(call)(narrow, state.astype(jnp.float32), resets())
    assert_same(got, want, part=1e-5)


def test_auto_takes_no_kernel_in_a_program_that_must_be_partitioned(mesh, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert dispatch.resolve("linear_attention") == "xla"
    assert dispatch.resolve("linear_attention", "tpu") == "tpu"
    inside = []

    def local(x):
        inside.append(dispatch.resolve("linear_attention"))
        return x

    jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P())(jnp.ones(1))
    assert inside == ["tpu"]


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_sharded_selective_scan_is_the_whole_one(check_vma, mesh):
    args, state = scan_arguments()
    specs = {name: P() if name in "AD" else SHARDED for name in args}
    call = sharded(
        mesh,
        specs,
        lambda args, state, reset: context_parallel.selective_scan(
            **args, initial_state=state, reset=reset, axis_name="context", chunk=4
        ),
        check_vma,
    )
    want = with_gradients(
        lambda args, state, reset: pk.selective_scan(
            **args, initial_state=state, reset=reset, impl="reference"
        ),
        args, state, resets(),
    )  # fmt: skip
    assert_same(with_gradients(call, args, state, resets()), want)


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_what_devices_exchange_does_not_grow_with_the_sequence(op, mesh):
    def exchanged(tokens):
        args, state = recurrence(op, "head")
        args = {name: jnp.repeat(x, tokens // TOKENS, axis=1) for name, x in args.items()}
        split = partial(getattr(context_parallel, op), axis_name="context", chunk=4)
        call = sharded(
            mesh,
            dict.fromkeys(args, SHARDED),
            lambda args, state, reset: split(**args, initial_state=state),
        )
        program = jax.jit(lambda a, s: with_gradients(call, a, s, None)).lower(args, state)
        return [
            line.rsplit("->")[-1].strip()
            for line in program.as_text().splitlines()
            if any(f"stablehlo.{name}" in line for name in ("all_gather", "collective_permute"))
        ]

    assert exchanged(TOKENS) == exchanged(2 * TOKENS) != []


def gru(consts, reset, state, xs):
    """A memory that is not linear in its state, with a counter in it."""

    def token(carry, inputs):
        h, count = carry
        x, fresh = inputs
        h = jnp.where(fresh[:, None], consts["start"], h)
        gate = jax.nn.sigmoid(x + h @ consts["gate"])
        h = gate * h + (1 - gate) * jnp.tanh(x + (h * gate) @ consts["new"])
        return (h, count + 1), h

    inputs = (jnp.swapaxes(xs, 0, 1), jnp.swapaxes(reset, 0, 1))
    state, y = jax.lax.scan(token, state, inputs)
    return state, jnp.swapaxes(y, 0, 1)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_memory_that_is_not_linear_takes_turns(parts, mesh):
    normal = np.random.default_rng(0).standard_normal
    consts = {name: jnp.asarray(normal((KEY, KEY))) for name in ("gate", "new")}
    consts["start"] = jnp.asarray(normal((KEY,)))
    xs, h = (jnp.asarray(normal(s)) for s in ((BATCH, TOKENS, KEY), (BATCH, KEY)))
    count = jnp.arange(BATCH)

    def turns(args, h, reset):
        (h, seen), y = context_parallel.in_turn(
            gru, args[0], reset, (h, count), args[1], axis_name="context", parts=parts
        )
        return y, (h, seen)

    def whole(args, h, reset):
        (h, _), y = gru(args[0], reset, (h, count), args[1])
        return y, h

    call = sharded(mesh, (P(), SHARDED), turns)
    seen = jax.jit(lambda: call((consts, xs), h, resets())[1][1])()
    np.testing.assert_array_equal(seen, count + TOKENS)

    def floating(*args):
        y, (h, _) = call(*args)
        return y, h

    got = with_gradients(floating, (consts, xs), h, resets())
    assert_same(got, with_gradients(whole, (consts, xs), h, resets()))


def test_the_lanes_must_divide_into_parts(mesh):
    def turns(args, state, reset):
        state, y = context_parallel.in_turn(
            gru, {}, reset, (state, state), args, axis_name="context", parts=3
        )
        return y, state

    with pytest.raises(ValueError, match="in_turn: parts=3 must divide the 4 lanes"):
        sharded(mesh, SHARDED, turns)(jnp.ones((BATCH, TOKENS, KEY)), jnp.ones(BATCH), resets())


def convolve(tail, x, reset):
    """y_t = sum of w_j x_{t - j} over the tokens of t's document; a loop."""
    weight = [1.0, -0.5, 0.25, 2.0]
    padded = np.concatenate([tail, x], axis=1)
    y = np.zeros(x.shape)
    for b, t in np.ndindex(*x.shape[:2]):
        for lag in range(4):
            if lag and reset[b, t - lag + 1 : t + 1].any() if t - lag + 1 >= 0 else False:
                break
            if lag > t and reset[b, : t + 1].any():
                break
            y[b, t] += weight[lag] * padded[b, 3 + t - lag]
    return y


def test_short_convolutions_exchange_their_tails(mesh):
    normal = np.random.default_rng(0).standard_normal
    x, tail = normal((BATCH, TOKENS, KEY)), normal((BATCH, 3, KEY))
    reset = resets()

    def conv(x, tail, reset):
        entering, last = context_parallel.exchange_tail(x, tail, reset, axis_name="context")
        padded = jnp.concatenate([entering, x], axis=1)
        clear = jnp.ones(reset.shape, bool)
        y = x
        for lag, weight in ((1, -0.5), (2, 0.25), (3, 2.0)):
            clear = clear & ~jnp.pad(reset, ((0, 0), (lag - 1, 0)))[:, : reset.shape[1]]
            y += weight * clear[..., None] * padded[:, 3 - lag : 3 - lag + x.shape[1]]
        return y, last

    y, last = jax.jit(sharded(mesh, SHARDED, conv))(jnp.asarray(x), jnp.asarray(tail), reset)
    assert_same(y, convolve(tail, x, np.asarray(reset)))
    want = np.array(x[:, -3:])
    want[2, :2] = 0  # a document begins with the last token of lane 2
    np.testing.assert_array_equal(last, want)


def test_documents_are_numbered_over_all_shards(mesh):
    reset = resets()
    number = partial(context_parallel.document_numbers, axis_name="context")
    got = jax.shard_map(number, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED)(reset)
    np.testing.assert_array_equal(got, np.cumsum(reset, axis=1))
