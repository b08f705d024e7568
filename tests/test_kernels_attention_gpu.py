"""Attention for a Hopper GPU without one: its table of blocks, its choice, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_virtual_devices

from pallas_kernels import attention, dispatch
from pallas_kernels.attention import gpu_blocks
from pallas_kernels.attention.rule import Places, Rule, visible


def test_interpreted_kernels_equal_the_definition_and_its_gradients():
    run_on_virtual_devices("attention_gpu")


@pytest.mark.slow
def test_interpreted_kernels_of_more_blocks_equal_the_definition():
    run_on_virtual_devices("attention_gpu", "-m", "slow")


def places(rng, kind, tokens, keys):
    """Positions and ids of queries and keys: documents behind a cache, or in any order."""
    if kind == "scattered":
        numbers = [rng.integers(0, 90, (2, n)) for n in (tokens, keys)]
        ids = [rng.integers(-1, 2, (2, n)) for n in (tokens, keys)]
    else:
        numbers = [np.arange(keys - tokens, keys)[None], np.arange(keys)[None]]
        own = np.sort(rng.integers(0, 4, (2, tokens)), 1)
        cache = np.where(np.arange(keys - tokens) < 20, -1, 0)
        ids = [own, np.concatenate([np.tile(cache, (2, 1)), own], 1)]
    if kind == "no ids":
        ids = [None, None]
    return [
        Places(jnp.asarray(n), None if x is None else jnp.asarray(x)) for n, x in zip(numbers, ids)
    ]


@pytest.mark.parametrize("kind", ["documents", "no ids", "scattered"])
@pytest.mark.parametrize("causal, window", [(True, None), (True, 50), (False, None), (False, 9)])
def test_the_table_of_blocks_leaves_nothing_out(kind, causal, window, monkeypatch):
    """Every pair that is seen is in a step; a step without a mask is seen whole."""
    monkeypatch.setattr(gpu_blocks, "OWN", 8)
    tokens, keys, rows, columns = 70, 101, 8, 4
    queries, others = places(np.random.default_rng(0), kind, tokens, keys)
    rule = Rule(causal, window, 1.0, None if kind == "scattered" else keys - tokens, None)
    q = jnp.ones((2, tokens, 1, 64), jnp.bfloat16)
    k = jnp.ones((2, keys, 1, 64), jnp.bfloat16)
    with dispatch.target("gpu"):
        _, arrays = gpu_blocks.prepare(rule, q, k, k, None, queries, others)
    seen_BTJ = visible(rule, queries, others)
    seen = np.zeros((2, arrays.q_BTF.shape[1], arrays.k_BJF.shape[1]), bool)
    seen[:, :tokens, :keys] = True if seen_BTJ is None else seen_BTJ
    blocks = seen.reshape(2, seen.shape[1] // rows, rows, -1, columns).copy()
    seen[:, tokens:] = True  # what queries behind the last see is of no account
    padded = seen.reshape(blocks.shape)
    for of_keys in (False, True):
        table = np.asarray(gpu_blocks.reach(rule, arrays, rows, columns, of_keys=of_keys))
        some, every = blocks.any((2, 4)), padded.all((2, 4))
        if of_keys:
            some, every = np.swapaxes(some, 1, 2), np.swapaxes(every, 1, 2)
        place = np.arange(some.shape[2])
        first, last, plain, end = (table[..., n, None] for n in range(4))
        walked, full = (first <= place) & (place < last), (plain <= place) & (place < end)
        assert not (some & ~walked).any()
        assert not (full & ~(every & walked)).any()
        if kind != "scattered":  # exact, but for what the ids of a cache and a segment share
            assert walked.sum() <= 1.3 * some.sum() + walked.shape[1]
            assert full.any() or window == 9


SETTINGS = {
    "segment_ids": {"segment_ids": jnp.ones((1, 128), jnp.int32)},
    "sinks": {"sinks": jnp.ones(2)},
    "logit_cap": {"logit_cap": 20.0},
    "bias": {"bias": jnp.ones(2)},
}


def program(size=64, **rule):
    args = {name: jnp.ones((1, 128, 2, size), jnp.bfloat16) for name in "qkv"}
    with dispatch.target("gpu"):
        traced = jax.jit(lambda args: attention(**args, **rule)).trace(args)
        return traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_cudnn_does_not_serve_is_ours_on_a_gpu(setting):
    assert "attention_gpu" in program(**SETTINGS[setting])


def test_sizes_of_no_kernel_are_plain_jax():
    assert "attention_xla" in program(136, **SETTINGS["sinks"])


@pytest.mark.parametrize("size", [64, 128])
def test_the_kernels_lower_for_cuda(size):
    shape = jax.ShapeDtypeStruct((1, 300, 2, size), jnp.bfloat16)
    ids = jnp.ones((1, 300), jnp.int32)

    def both(q, k, v):
        o, pull = jax.vjp(lambda *x: attention(*x, segment_ids=ids, impl="gpu"), q, k, v)
        return o, pull(o)

    with dispatch.target("gpu"):
        text = (
            jax.jit(both).trace(shape, shape, shape).lower(lowering_platforms=("cuda",)).as_text()
        )
    assert text.count("custom_call @mosaic_gpu") == 3


REFUSED = {
    "K=192 is more than 128": {n: jnp.ones((1, 64, 1, 192), jnp.bfloat16) for n in "qk"},
    "V=256 is more than 128": {"v": jnp.ones((1, 64, 1, 256), jnp.bfloat16)},
    "k has dtype float32": {"k": jnp.ones((1, 64, 1, 64))},
    "T=1 queries would leave": {"q": jnp.ones((1, 1, 1, 64), jnp.bfloat16)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_call_that_does_not_suit_the_kernel_is_refused_by_name(message):
    args = {name: jnp.ones((1, 64, 1, 64), jnp.bfloat16) for name in "qkv"}
    with dispatch.target("gpu"), pytest.raises(ValueError, match=f"cannot run.*{message}"):
        attention(**(args | REFUSED[message]), impl="gpu")
