"""A cap on logits and sinks in attention: every implementation against a loop over queries.

float64 comparisons allow 1e-9 of the largest value: rounding is near 1e-14, any real error larger.
Interpreted kernels are float32: sums of some 50 terms, 1e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import attention as oracles

from memjax.config import FieldError
from memjax.mixers import Attention
from pallas_kernels import attention, dispatch
from pallas_kernels.attention import rows, tpu_layout

BATCH, TOKENS, EARLIER, HEADS, GROUPS, KEY, VALUE = 2, 19, 9, 4, 2, 5, 3
CAP = 0.8  # logits of q . k / sqrt(K) are near 1, so that the cap bends most of them


def draw():
    normal, keys = np.random.default_rng(0).standard_normal, TOKENS + EARLIER
    return {
        "q": normal((BATCH, TOKENS, HEADS, KEY)),
        "k": normal((BATCH, keys, GROUPS, KEY)),
        "v": normal((BATCH, keys, GROUPS, VALUE)),
        "bias": np.array([0.1, 0.2, 0.3, 0.4]),
        "sinks": np.array([0.5, -1.0, 2.0, 0.0]),
    }


def documents():
    rng = np.random.default_rng(3)
    own = np.sort(rng.integers(0, 3, (BATCH, TOKENS)), axis=1)
    cache = np.full((BATCH, EARLIER), -1)
    cache[0, -5:] = 0
    return own, np.concatenate([cache, own], 1)


CASES = {
    "causal": {"logit_cap": CAP},
    "window": {"logit_cap": CAP, "window": 6},
    "documents": {"logit_cap": CAP, "segment_ids": documents()},
    "no-cap": {"segment_ids": documents(), "window": 7},
    "both-directions": {"logit_cap": CAP, "causal": False},
}


def oracle(args, logit_cap=None, causal=True, window=None, segment_ids=None):
    keys = np.tile(np.arange(TOKENS + EARLIER), (BATCH, 1))
    return oracles.attention(
        args["q"], args["k"], args["v"], args.get("bias"), KEY**-0.5, causal, window,
        (keys[:, EARLIER:], keys), segment_ids, logit_cap, args["sinks"],
    )  # fmt: skip


def run(args, impl, **rule):
    """o, and every gradient."""
    args = {name: jnp.asarray(x) for name, x in args.items()}
    if "segment_ids" in rule:
        rule["segment_ids"] = tuple(jnp.asarray(x) for x in rule["segment_ids"])

    @jax.jit
    def both(args):
        o, pull = jax.vjp(lambda args: attention(**args, impl=impl, **rule), args)
        return o, pull(jnp.asarray(np.random.default_rng(1).standard_normal(o.shape), o.dtype))[0]

    return both(args)


def assert_near(got, want, part):
    got = np.asarray(got, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=part * np.abs(want).max())


def assert_all_near(got, want, part):
    assert_near(got[0], want[0], part)
    for name, gradient in want[1].items():
        assert np.abs(gradient).max() > 1e-3
        assert_near(got[1][name], gradient, part)


BLOCKS = [
    ("causal", "unrolled"),
    ("documents", "unrolled"),
    ("window", "loop"),
    ("no-cap", "loop"),
    ("both-directions", "loop"),
]


@pytest.mark.parametrize("case, path", BLOCKS)
def test_blocks_equal_the_loop_over_queries_and_its_gradients(case, path, monkeypatch):
    monkeypatch.setattr(rows, "ROW", 8)
    if path == "loop":
        monkeypatch.setattr(rows, "UNROLLED_ROWS", 0)
        monkeypatch.setattr(rows, "LOOP_ROW", 8)
        monkeypatch.setattr(rows, "LOOP_KEYS", 8)
    args = draw()
    with jax.enable_x64(True):
        got, defined = run(args, "xla", **CASES[case]), run(args, "reference", **CASES[case])
    assert_near(defined[0], oracle(args, **CASES[case]), 1e-9)
    assert_all_near(got, defined, 1e-9)


@pytest.mark.parametrize("name", ["q", "k", "bias", "sinks"])
def test_gradients_are_slopes_of_the_loop(name):
    """In one random direction, by central differences: their error is near 1e-9."""
    args, rule = draw(), CASES["documents"]
    rng = np.random.default_rng(5)
    direction = rng.standard_normal(args[name].shape)
    with jax.enable_x64(True):
        o, gradients = run(args, "xla", **rule)
    cotangent = np.random.default_rng(1).standard_normal(o.shape)
    step = 1e-5

    def moved(by):
        return np.sum(cotangent * oracle(args | {name: args[name] + by * direction}, **rule))

    want = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(np.sum(np.asarray(gradients[name]) * direction), want, rtol=1e-6)


@pytest.mark.parametrize("case", ["window", "documents", "no-cap"])
def test_interpreted_kernels_equal_the_definition_and_its_gradients(case, monkeypatch):
    monkeypatch.setattr(tpu_layout, "ROW", 16)
    monkeypatch.setattr(tpu_layout, "KEYS", 16)
    args = draw()
    with jax.enable_x64(True):
        want = run(args, "reference", **CASES[case])
    with dispatch.target("tpu", interpreter=True):
        got = run({n: x.astype(np.float32) for n, x in args.items()}, "tpu", **CASES[case])
    assert_all_near(got, want, 1e-5)


def test_interpreted_splash_attention_has_the_same_cap_and_sinks():
    normal = np.random.default_rng(0).standard_normal
    sizes = {"q": (1, 128, 2, 128), "k": (1, 256, 1, 128), "v": (1, 256, 1, 128), "sinks": (2,)}
    args = {name: normal(size).astype(np.float32) for name, size in sizes.items()}
    want = run(args, "reference", window=70, logit_cap=CAP)
    with dispatch.target("tpu", interpreter=True):
        got = run(args, "splash", window=70, logit_cap=CAP)
    assert_all_near(got, want, 1e-5)


@pytest.mark.parametrize("impl", ["xla", "tpu"])
def test_bfloat16_stays_near_float32(impl):
    half = {
        n: jnp.asarray(x, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, x in draw().items()
    }
    want = run({n: x.astype(jnp.float32) for n, x in half.items()}, "reference", logit_cap=CAP)
    with dispatch.target("tpu" if impl == "tpu" else "cpu", interpreter=True):
        o, gradients = run(half, impl, logit_cap=CAP)
    assert o.dtype == gradients["q"].dtype == jnp.bfloat16
    assert gradients["sinks"].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4% a rounding, a few roundings deep
    assert_all_near((o, gradients), want, 0.03)


@pytest.mark.parametrize("impl", ["reference", "xla", "tpu"])
def test_a_query_that_sees_no_key_gives_zero_with_sinks_too(impl):
    args = {name: x.astype(np.float32) for name, x in draw().items()}
    own = np.zeros((BATCH, TOKENS), np.int32)
    own[1] = 7
    ids = (own, np.zeros((BATCH, TOKENS + EARLIER), np.int32))
    with dispatch.target("tpu" if impl == "tpu" else "cpu", interpreter=True):
        o, gradients = run(args, impl, segment_ids=ids, logit_cap=CAP)
    assert jnp.abs(o[1]).max() == 0
    assert jnp.abs(o[0]).min() > 0
    assert all(bool(jnp.isfinite(g).all()) for g in gradients.values())
    assert jnp.abs(gradients["q"][1]).max() == 0


def test_neither_costs_anything_where_it_is_not_used():
    args = {n: jnp.asarray(x, jnp.float32) for n, x in draw().items() if n != "sinks"}

    def program(**more):
        return str(jax.make_jaxpr(jax.grad(lambda a: attention(**a, **more).sum()))(args))

    assert program(logit_cap=None, sinks=None) == program()
    assert "tanh" not in program() and "tanh" in program(logit_cap=CAP)


REFUSED = {
    "logit_cap=0 must be a number above 0": ("cpu", {"logit_cap": 0}),
    "sinks has shape .*where H is 4": ("cpu", {"sinks": jnp.zeros(3)}),
    "'cudnn' cannot run this call: it has no `logit_cap`": (
        "gpu",
        {"logit_cap": CAP, "impl": "cudnn"},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(message, unchecked):
    platform, settings = REFUSED[message]
    args = {n: jnp.asarray(x, jnp.float32) for n, x in draw().items()} | settings
    with dispatch.target(platform), pytest.raises(ValueError, match=message):
        attention(**args)


def test_a_cap_that_is_no_cap_is_refused_by_the_config():
    with pytest.raises(FieldError, match="logit_cap.*must be greater than 0, or none"):
        Attention(logit_cap=0.0)
