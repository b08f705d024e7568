"""Ring attention gives what attention on one device gives: outputs and every gradient.

Float64 throughout: rounding is near 1e-14, any real error larger than 1e-9. One device runs the
definition (one masked softmax), which knows nothing of blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention, compat, dispatch
from pallas_kernels.ring_attention import Cache, block, ring_attention

BATCH, TOKENS, HEADS, GROUPS, KEY, VALUE, EARLIER = 2, 24, 4, 2, 5, 3, 7
SHARDED = P(None, "context")


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def make_mesh(size):
    devices = jax.devices()[:size]
    return jax.make_mesh((size,), ("context",), axis_types=(AxisType.Auto,), devices=devices)


def draw(tokens=TOKENS):
    normal = np.random.default_rng(0).standard_normal
    args = {
        "q": normal((BATCH, tokens, HEADS, KEY)),
        "k": normal((BATCH, tokens, GROUPS, KEY)),
        "v": normal((BATCH, tokens, GROUPS, VALUE)),
        "bias": np.array([0.1, 0.2, 0.3, 0.4]),
        "sinks": np.array([0.5, -1.0, 2.0, 0.0]),
        "early_k": normal((BATCH, EARLIER, GROUPS, KEY)),
        "early_v": normal((BATCH, EARLIER, GROUPS, VALUE)),
    }
    return {name: jnp.asarray(x) for name, x in args.items()}


def documents():
    """Ids that grow along the sequence, with a cache of which the last slots are used."""
    rng = np.random.default_rng(3)
    own = np.sort(rng.integers(0, 4, (BATCH, TOKENS)), axis=1)
    cache = np.array([[-1] * (EARLIER - 3) + [0] * 3, [-1] * EARLIER])
    return jnp.asarray(own), jnp.asarray(cache)


def on_a_ring(mesh, cached, ids, check_vma=True, sinks=False, **rule):
    specs = {name: SHARDED if name in "qkv" else P() for name in draw()}
    own, early = ids

    def local(args, own):
        cache = Cache(args["early_k"], args["early_v"], early) if cached else None
        qkv, by_head = (args[name] for name in "qkv"), rule | {"bias": args["bias"]}
        if sinks:
            by_head["sinks"] = args["sinks"]
        return ring_attention(*qkv, axis_name="context", segment_ids=own, cache=cache, **by_head)

    def call(args):
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, None if own is None else SHARDED),
            out_specs=SHARDED,
            check_vma=check_vma,
        )(args, own)

    return call


def on_one_device(cached, ids, sinks=False, **rule):
    def call(args):
        k, v, own = args["k"], args["v"], ids[0]
        if cached:
            k = jnp.concatenate([args["early_k"], k], axis=1)
            v = jnp.concatenate([args["early_v"], v], axis=1)
        pair = None
        if own is not None:
            pair = (own, jnp.concatenate([ids[1], own], axis=1) if cached else own)
        by_head = rule | {"bias": args["bias"], "sinks": args["sinks"] if sinks else None}
        return attention(args["q"], k, v, segment_ids=pair, impl="reference", **by_head)

    return call


def with_gradients(call, args):
    @jax.jit
    def run(args):
        o, pull = jax.vjp(call, args)
        cotangent = np.random.default_rng(1).standard_normal(o.shape)
        return o, pull(jnp.asarray(cotangent, o.dtype))[0]

    return run(args)


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(np.abs(b).max(), 1e-6))


CASES = {
    "causal": (4, False, False, {}),
    "causal-documents-cache": (4, True, True, {}),
    "causal-three-devices": (3, True, False, {}),
    "both-directions-documents": (4, False, True, {"causal": False}),
    "window-of-neighbours-cache": (4, True, False, {"window": 5}),
    "window-of-a-shard-documents-cache": (4, True, True, {"window": 7}),
    "window-longer-than-the-cache-documents": (3, True, True, {"window": 9}),
    "window-of-itself": (4, True, True, {"window": 1}),
    "window-of-two-shards-documents": (4, True, True, {"window": 9}),
    "one-device": (1, True, True, {}),
    "causal-cap-sinks-documents-cache": (4, True, True, {"logit_cap": 0.7, "sinks": True}),
    "window-cap-sinks": (4, False, False, {"logit_cap": 0.7, "sinks": True, "window": 5}),
    "one-device-cap-sinks": (1, False, False, {"logit_cap": 0.7, "sinks": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_ring_is_attention_on_one_device_and_its_gradients(case, monkeypatch):
    size, cached, packed, rule = CASES[case]
    monkeypatch.setattr(block, "LARGEST_BLOCK", 2)
    ids = documents() if packed else (None, None)
    args = draw()
    got = with_gradients(on_a_ring(make_mesh(size), cached, ids, **rule), args)
    assert_same(got, with_gradients(on_one_device(cached, ids, **rule), args))


def test_the_check_of_shard_map_may_be_off():
    args, ids = draw(), documents()
    got = with_gradients(on_a_ring(make_mesh(4), True, ids, check_vma=False), args)
    assert_same(got, with_gradients(on_one_device(True, ids), args))


def rotations(call, args):
    """Lengths of the loops that send something."""

    def within(jaxpr):
        for equation in jaxpr.eqns:
            inner = list(jax.core.jaxprs_in_params(equation.params))
            if equation.primitive.name == "scan" and "ppermute" in str(inner[0]):
                yield equation.params["length"]
            else:
                for sub in inner:
                    yield from within(sub)

    return list(within(jax.make_jaxpr(call)(args).jaxpr))


@pytest.mark.parametrize("window, loops", [(1, []), (4, []), (5, [2]), (100, [7])])
def test_a_window_ends_the_ring_where_it_does_not_reach(window, loops):
    """Eight devices with 3 tokens each: a window of 4 reaches into the shard before."""
    call = on_a_ring(make_mesh(8), False, (None, None), window=window)
    assert rotations(call, draw()) == loops


def test_a_neighbour_sends_the_keys_that_a_window_reaches_and_no_more():
    """Shards of 6 tokens, a window of 4: 3 keys, 3 values and 3 ids to the right."""
    call = on_a_ring(make_mesh(4), False, (None, None), window=4)
    (program,) = jax.core.jaxprs_in_params(jax.make_jaxpr(call)(draw()).jaxpr.eqns[0].params)
    sent = [one.invars[0].aval.shape for one in program.eqns if one.primitive.name == "ppermute"]
    assert sorted(sent) == sorted([(BATCH, 3), (BATCH, 3, GROUPS, KEY), (BATCH, 3, GROUPS, VALUE)])


def test_memory_of_a_device_does_not_grow_with_the_ring():
    """No array of a device is larger on 8 devices than on 2 with shards of the same size."""

    def largest(size):
        mesh, args = make_mesh(size), draw(tokens=32 * size)

        def loss(args):
            return jnp.sum(on_a_ring(mesh, False, (None, None))(args) ** 2)

        program = jax.jit(jax.grad(loss)).lower(args).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert largest(8) <= 1.1 * largest(2)


def test_causal_work_is_the_same_on_every_device():
    """The program has no branch, and of a ring of 4 devices all rotate 3 times."""
    call = on_a_ring(make_mesh(4), False, (None, None))
    text = str(jax.make_jaxpr(call)(draw()))
    assert "cond[" not in text
    assert rotations(call, draw()) == [3]


def test_an_odd_shard_is_refused():
    args = draw(tokens=20)
    with pytest.raises(ValueError, match="ring_attention: a shard has T=5 tokens.*must be even"):
        on_a_ring(make_mesh(4), False, (None, None))(args)


def test_ids_of_a_cache_need_ids_of_the_segment():
    args, (_, early) = draw(), documents()
    with pytest.raises(ValueError, match="cache.segment_BJ is given; segment_ids must be given"):
        on_a_ring(make_mesh(4), True, (None, early))(args)


def test_unknown_implementations_are_refused():
    call = on_a_ring(make_mesh(4), False, (None, None), impl="gpu")
    with pytest.raises(ValueError, match="ring_attention: impl='gpu' is not available"):
        call(draw())


def rdma(args, **rule):
    """On 4 devices; the kernel takes a mesh of one axis."""
    mesh = make_mesh(4)
    local = partial(ring_attention, axis_name="context", impl="rdma", **rule)
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(SHARDED,) * 3, out_specs=SHARDED, check_vma=False
    )
    return sharded(*(args[name].astype(jnp.float32) for name in "qkv"))


@pytest.mark.parametrize("copies", ["on_wait", "eager"])
def test_simulated_remote_copies_give_the_same_attention_without_a_race(copies):
    """Copies as late as they are waited for, and as early as they are started."""
    interpreter = compat.tpu_interpreter(detect_races=True, dma_execution_mode=copies)
    args = {n: x.astype(jnp.float32) for n, x in draw(tokens=16).items() if n in "qkv"}
    try:
        with jax.enable_x64(False), dispatch.target("tpu", interpreter=interpreter):
            got, gradients = jax.block_until_ready(with_gradients(rdma, args))
        assert not compat.tpu_races_found()
    finally:
        compat.reset_tpu_interpreter()
    want = with_gradients(lambda args: attention(**args, impl="reference"), args)
    for a, b in zip(jax.tree.leaves((got, gradients)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_remote_copies_are_refused_where_the_kernel_cannot_do_the_call():
    args = draw()
    with dispatch.target("tpu"), pytest.raises(ValueError, match="'rdma' cannot run.*no `segment"):
        rdma(args, bias=args["bias"])
    for more in ({"sinks": args["sinks"]}, {"logit_cap": 5.0}):
        with dispatch.target("tpu"), pytest.raises(ValueError, match="'rdma' cannot.*and `sinks`"):
            rdma(args, **more)
    with pytest.raises(ValueError, match="'rdma' is not available on cpu"):
        rdma(args)
