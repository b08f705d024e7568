"""Attention for a TPU without one: run in Pallas's interpreter, and lowered for the platform.

The interpreter multiplies float32 in full, so values are held to float32 rounding: sums of some 100
terms, 1e-5 of the largest value. It does not simulate how a TPU rounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import assert_near, lowered

from pallas_kernels import attention, dispatch
from pallas_kernels.attention import tpu_layout

BATCH, TOKENS, KEY, VALUE = 2, 37, 5, 3
KEYS_BEFORE = 21


@pytest.fixture
def interpreted():
    with dispatch.target("tpu", interpreter=True):
        yield


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
