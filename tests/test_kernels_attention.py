"""attention against a loop over queries; its two blockwise paths; its memory.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from oracles import attention as oracles

from pallas_kernels import attention
from pallas_kernels.attention import rows

BATCH, TOKENS, HEADS, GROUPS, KEY, VALUE = 2, 37, 4, 2, 5, 3
EARLIER = 21


def draw(keys, dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((BATCH, TOKENS, HEADS, KEY)).astype(dtype),
        "k": rng.standard_normal((BATCH, keys, GROUPS, KEY)).astype(dtype),
        "v": rng.standard_normal((BATCH, keys, GROUPS, VALUE)).astype(dtype),
        "bias": np.array([0.1, 0.2, 0.3, 0.4], dtype),
    }


def documents(keys, filled):
    """Ids that grow along the segment, behind a cache of which the last `filled` slots are used."""
    rng = np.random.default_rng(3)
    own = np.sort(rng.integers(0, 3, (BATCH, TOKENS)), axis=1)
    cache = np.full((BATCH, keys - TOKENS), -1)
    if filled:
        cache[0, -filled:] = 0
    return own, np.concatenate([cache, own], 1)


def scattered(keys):
    rng = np.random.default_rng(4)
    return rng.integers(0, 50, (BATCH, TOKENS)), rng.integers(0, 50, (BATCH, keys))


def run(args, weight=None, **settings):
    """o, and every gradient."""
    args = {name: jnp.asarray(array) for name, array in args.items()}

    @jax.jit
    def both(args):
        o, pull = jax.vjp(lambda args: attention(**args, **settings), args)
        rng = np.random.default_rng(1)
        return o, pull(jnp.asarray(rng.standard_normal(o.shape), o.dtype))[0]

    return both(args)


def oracle(args, causal=True, window=None, positions=None, segment_ids=None):
    tokens, keys = args["q"].shape[1], args["k"].shape[1]
    if positions is None:
        own = np.arange(keys - tokens, keys)
        positions = (np.tile(own, (BATCH, 1)), np.tile(np.arange(keys), (BATCH, 1)))
    return oracles.attention(
        args["q"], args["k"], args["v"], args["bias"], KEY**-0.5, causal, window, positions,
        segment_ids,
    )  # fmt: skip


def assert_near(got, want, part):
    np.testing.assert_allclose(got, want, rtol=0, atol=part * np.abs(want).max())


@pytest.fixture(params=["unrolled", "loop"])
def path(request, monkeypatch):
    """Blocks small enough that a short segment has several, on each of the two paths."""
    monkeypatch.setattr(rows, "ROW", 16)
    if request.param == "loop":
        monkeypatch.setattr(rows, "UNROLLED_ROWS", 0)
        monkeypatch.setattr(rows, "LOOP_ROW", 8)
        monkeypatch.setattr(rows, "LOOP_KEYS", 16)
    return request.param


WHOLE, CACHED = TOKENS, TOKENS + EARLIER
CASES = {
    "causal": (WHOLE, {}),
    "causal-cache": (CACHED, {}),
    "window-below-block": (CACHED, {"window": 5}),
    "window-above-block": (WHOLE, {"window": 20}),
    "both-directions": (WHOLE, {"causal": False}),
    "documents-cache-part-full": (CACHED, {"segment_ids": documents(CACHED, 5)}),
    "documents-cache-empty": (CACHED, {"segment_ids": documents(CACHED, 0), "window": 9}),
    "positions": (CACHED, {"positions": scattered(CACHED), "window": 9}),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_the_loop_over_queries_and_its_gradients(case, path):
    keys, rule = CASES[case]
    args = draw(keys)
    with jax.enable_x64(True):
        settings = {
            name: tuple(jnp.asarray(x) for x in value) if isinstance(value, tuple) else value
            for name, value in rule.items()
        }
        o, gradients = run(args, impl="xla", **settings)
        defined, want = run(args, impl="reference", **settings)
    assert_near(o, oracle(args, **rule), 1e-9)
    assert_near(defined, oracle(args, **rule), 1e-9)
    for name in args:
        assert np.abs(want[name]).max() > 1e-3
        assert_near(gradients[name], want[name], 1e-9)


def test_few_rows_are_unrolled_and_many_are_a_loop(path):
    args = draw(WHOLE, np.float32)
    program = str(jax.make_jaxpr(lambda args: attention(**args))(args))
    assert ("while" in program) == (path == "loop")


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_a_query_that_sees_no_key_gives_zero_and_finite_gradients(impl, path):
    args = draw(WHOLE, np.float32)
    own = np.zeros((BATCH, TOKENS), np.int32)
    own[0, 10:20] = -1
    own[1] = 7
    segment_ids = (jnp.asarray(own), jnp.zeros((BATCH, TOKENS), jnp.int32))
    o, gradients = run(args, impl=impl, segment_ids=segment_ids)
    assert jnp.abs(o[0, 10:20]).max() == 0
    assert jnp.abs(o[1]).max() == 0
    assert jnp.abs(o[0, 20:]).min() > 0
    assert all(bool(jnp.isfinite(g).all()) for g in gradients.values())
    assert jnp.abs(gradients["q"][1]).max() == 0


def test_one_query_with_a_cache_equals_the_last_of_the_whole():
    args = draw(WHOLE)
    with jax.enable_x64(True):
        o = attention(**{n: jnp.asarray(a[:, -1:] if n == "q" else a) for n, a in args.items()})
    assert_near(o[:, 0], oracle(args)[:, -1], 1e-9)


def largest_array(jaxpr):
    """The size of the largest array that a program computes, its loops and branches included."""
    sizes = [out.aval.size for eqn in jaxpr.eqns for out in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(value, ClosedJaxpr):
                value = value.jaxpr
            if isinstance(value, Jaxpr):
                sizes.append(largest_array(value))
    return max(sizes, default=0)


@pytest.mark.parametrize("tokens, unrolled", [(1024, True), (4096, False)])
def test_no_array_of_all_queries_by_all_keys_forward_or_backward(tokens, unrolled):
    shape = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)

    def sizes(impl):
        def loss(q, k, v):
            return attention(q, k, v, impl=impl).sum()

        return largest_array(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape).jaxpr)

    row = rows.ROW * tokens if unrolled else rows.LOOP_ROW * rows.LOOP_KEYS
    assert sizes("xla") <= max(row, 8 * tokens)
    assert sizes("reference") >= tokens * tokens  # the walk does find such arrays


def test_bfloat16_stays_near_float32():
    args = draw(CACHED, np.float32)
    half = {
        n: jnp.asarray(a).astype(jnp.bfloat16 if n in "qkv" else a.dtype) for n, a in args.items()
    }
    o, gradients = run(half)
    assert o.dtype == gradients["k"].dtype == jnp.bfloat16
    assert gradients["bias"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few roundings deep
    assert_near(o.astype(jnp.float32), oracle(args), 0.02)
