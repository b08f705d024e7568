"""Softmax attention over a sequence that is split over a mesh axis."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, dispatch, validate
from pallas_kernels.attention.rule import Places, Rule
from pallas_kernels.products import accumulation_dtype
from pallas_kernels.ring_attention import neighbour
from pallas_kernels.ring_attention.balance import from_zigzag, to_zigzag
from pallas_kernels.ring_attention.block import Keys, Queries
from pallas_kernels.ring_attention.rdma import ring_rdma, unfit
from pallas_kernels.ring_attention.ring import Ring, Shard, ring

OP = "ring_attention"
IMPLEMENTATIONS = {"xla": ring, "rdma": ring_rdma}

__all__ = ["Cache", "ring_attention"]


class Cache(NamedTuple):
    """Keys in front of the whole sequence, the same on all devices; ids None: all are used."""

    k_BJGK: Float[Array, "B J G K"]
    v_BJGV: Float[Array, "B J G V"]
    segment_BJ: Int[Array, "B J"] | None = None


def ring_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    axis_name: str,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    bias: Float[Array, "H"] | None = None,
    scale: float | None = None,
    logit_cap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    cache: Cache | None = None,
    impl: str = "auto",
) -> Float[Array, "B T H V"]:
    """`pallas_kernels.attention` over a sequence sharded over `axis_name`, in jax.shard_map.

    Device i holds tokens i T to (i + 1) T - 1 of q, k, v and o. Heads, `window`, `bias`, `scale`,
    `logit_cap` and `sinks` are as in `attention`. `segment_ids`: of this shard's tokens, numbered
    over the whole sequence (`context_parallel.document_numbers`); tokens see their own id, and
    never a negative one.
    `cache`: keys that lie in front of token 0, the last right before it.
    Memory a device does not grow with the number of devices: keys and values go round the ring, in
    the backward pass with their gradients. Without a window causal work is balanced: each device
    works on an early and a late half shard, which are exchanged on entry and on return; with one,
    the ring ends where no window reaches, and if it reaches no further than into the shard before,
    its last window - 1 keys are all that is sent, and it is `attention`, by its implementations.
    Differentiable once, in q, k, v, bias, sinks and the cache.
    Errors: as `attention`; ValueError for an odd T where work is balanced, and for an
    implementation that is not available.
    Source: arXiv:2310.01889; balance arXiv:2311.09431 (striped), here by halves.
    """
    _check(q, k, v, segment_ids, bias, sinks, window, cache)
    validate.check_positive(OP, logit_cap=logit_cap)
    size, tokens = lax.axis_size(axis_name), q.shape[1]
    if window is not None and neighbour.reaches(causal, window, tokens) and impl != "rdma":
        settings: dict[str, Any] = {"axis_name": axis_name, "window": window, "impl": impl}
        settings |= {"scale": scale, "logit_cap": logit_cap}
        return neighbour.attend(q, k, v, segment_ids, bias, sinks, cache, **settings)
    zigzag = causal and window is None and size > 1
    if zigzag and tokens % 2:
        raise ValueError(
            f"{OP}: a shard has T={tokens} tokens; causal work is balanced by half shards, so T "
            "must be even"
        )
    given = (segment_ids, bias, cache, logit_cap, sinks)
    rdma_unfit = partial(unfit, q, k, v, *given, causal=causal, window=window)
    chosen = dispatch.resolve(OP, impl, {"rdma": rdma_unfit})
    steps = size
    if causal and window is not None:
        steps = min(size, 1 + -(-(window - 1) // tokens))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan = Ring(axis_name, Rule(causal, window, float(scale), None, logit_cap), zigzag, steps)
    with jax.named_scope(f"{OP}_{chosen}"):
        shard = _shard(plan, q, k, v, segment_ids, bias, sinks, cache)
        outputs = [_join(o) for o in IMPLEMENTATIONS[chosen](plan, shard)]
        o_BTHV = from_zigzag(outputs[0], outputs[1], axis_name) if zigzag else outputs[0]
    return o_BTHV.astype(q.dtype)


def _check(q, k, v, segment_ids, bias, sinks, window, cache) -> None:
    k_cache, v_cache, cache_ids = (None, None, None) if cache is None else cache
    validate.check_axes(
        OP,
        q=(q, "BTHK"),
        k=(k, "BTGK"),
        v=(v, "BTGV"),
        segment_ids=(segment_ids, "BT"),
        bias=(bias, "H"),
        sinks=(sinks, "H"),
        cache_k=(k_cache, "BJGK"),
        cache_v=(v_cache, "BJGV"),
        cache_segment_ids=(cache_ids, "BJ"),
    )
    validate.check_floating(
        OP, q=q, k=k, v=v, bias=bias, sinks=sinks, cache_k=k_cache, cache_v=v_cache
    )
    validate.check_integer(OP, segment_ids=segment_ids, cache_segment_ids=cache_ids)
    validate.check_tokens(OP, q.shape[1])
    validate.check_at_least_one(OP, window=window)
    if cache_ids is not None and segment_ids is None:
        raise ValueError(f"{OP}: cache.segment_BJ is given; segment_ids must be given too")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{OP}: q has H={q.shape[2]} heads; they must be a multiple of the G={k.shape[2]} of k"
        )


def _shard(plan: Ring, q, k, v, segment_ids, bias, sinks, cache) -> Shard:
    tokens, groups = q.shape[1], k.shape[2]
    kind = jnp.result_type(q, k, v)
    arrays = (q.astype(kind), k.astype(kind), v.astype(kind), segment_ids)
    me, size = lax.axis_index(plan.axis_name), lax.axis_size(plan.axis_name)
    pieces, starts = [arrays], [me * tokens]
    if plan.zigzag:
        pieces = list(to_zigzag(arrays, plan.axis_name))
        starts = [me * (tokens // 2), (2 * size - 1 - me) * (tokens // 2)]
    queries, keys = [], []
    for (q, k, v, ids), start in zip(pieces, starts):
        position_1T = (start + jnp.arange(q.shape[1], dtype=jnp.int32))[None]
        places = Places(position_1T, ids)
        queries.append(Queries(_split(q, groups), places))
        keys.append(Keys(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), places))
    slopes, sinks = (
        None if x is None else x.astype(accumulation_dtype(q)).reshape(groups, -1)
        for x in (bias, sinks)
    )
    front = None
    if cache is not None:
        front = _front(cache, kind, segment_ids)
    slopes, sinks, front = compat.vary_like((slopes, sinks, front), q)
    return Shard(tuple(queries), tuple(keys), slopes, sinks, front)


def _front(cache: Cache, kind, segment_ids) -> Keys:
    count = cache.k_BJGK.shape[1]
    ids = cache.segment_BJ
    if ids is None and segment_ids is not None:
        ids = jnp.zeros(cache.k_BJGK.shape[:2], segment_ids.dtype)
    places = Places(jnp.arange(-count, 0, dtype=jnp.int32)[None], ids)
    k, v = (jnp.swapaxes(x.astype(kind), 1, 2) for x in cache[:2])
    return Keys(k, v, places)


def _split(q_BTHK: jax.Array, groups: int) -> jax.Array:
    batch, tokens, heads, size = q_BTHK.shape
    q_BTGRK = q_BTHK.reshape(batch, tokens, groups, heads // groups, size)
    return jnp.transpose(q_BTGRK, (0, 2, 3, 1, 4))


def _join(o_BGRTV: jax.Array) -> jax.Array:
    batch, _, _, tokens, size = o_BGRTV.shape
    return jnp.transpose(o_BGRTV, (0, 3, 1, 2, 4)).reshape(batch, tokens, -1, size)
