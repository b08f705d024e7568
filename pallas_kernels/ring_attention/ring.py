"""Keys and values go round the ring; every device reads them with its own queries.

The forward pass merges what was read from each block by log-sum-exp. The backward pass sends the
blocks round once more, with their gradients: nothing is kept but this device's own shard.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.rule import Rule
from pallas_kernels.attention.sinks import add_sinks, sink_gradients
from pallas_kernels.attention.tile import merge
from pallas_kernels.products import accumulation_dtype
from pallas_kernels.ring_attention.block import (
    Cotangent,
    Keys,
    Queries,
    Read,
    attend,
    attend_backward,
    nothing_read,
)


class Ring(NamedTuple):
    """What decides the program.

    rule: by positions given as arrays. zigzag: shards are an early and a late half. steps: blocks
    that a device reads, its own counts.
    """

    axis_name: str
    rule: Rule
    zigzag: bool
    steps: int


class Shard(NamedTuple):
    """Queries and keys of this device, in one piece or two; `cache`: keys in front of all."""

    queries: tuple[Queries, ...]
    keys: tuple[Keys, ...]
    slopes_GR: jax.Array | None
    sinks_GR: jax.Array | None
    cache: Keys | None


class Pair(NamedTuple):
    """One block of work: indices of a piece of queries and a piece of keys, and the mask."""

    query: int
    key: int
    rule: Rule


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(plan: Ring, shard: Shard) -> tuple[jax.Array, ...]:
    """o_BGRTV of each piece of queries."""
    return forward(plan, shard)[0]


def _rotate(tree: Any, axis_name: str) -> Any:
    size = lax.axis_size(axis_name)
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name, pairs), tree)


def _all(plan: Ring) -> Rule:
    return plan.rule._replace(causal=False, window=None)


def _own_pairs(plan: Ring) -> list[Pair]:
    """Work on the device's own keys."""
    if not plan.zigzag:
        return [Pair(0, 0, plan.rule)]
    return [Pair(0, 0, plan.rule), Pair(1, 0, _all(plan)), Pair(1, 1, plan.rule)]


def _where(condition: jax.Array, left: Any, right: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), left, right)


def _visit(plan: Ring, step: jax.Array) -> jax.Array:
    """Whether the keys at hand come from an earlier device than this one."""
    return lax.axis_index(plan.axis_name) >= step


def _merge(left: Read, right: Read) -> Read:
    return Read(*merge(left, right))


def _together(shard: Shard) -> Shard:
    """The shard as it is, in one piece to the compiler.

    What depends on places alone would otherwise be taken out of a loop over layers: the masks of
    all blocks at once, which are as large as the scores that are never held.
    """
    return lax.optimization_barrier(shard)


def forward(plan: Ring, shard: Shard):
    shard = _together(shard)
    queries, slopes = shard.queries, shard.slopes_GR
    value_size = shard.keys[0].v_BGJV.shape[-1]
    held = [nothing_read(piece, value_size) for piece in queries]
    for query, key, rule in _own_pairs(plan):
        held[query] = _merge(held[query], attend(rule, slopes, queries[query], shard.keys[key]))
    if shard.cache is not None:
        rule = plan.rule._replace(causal=False)
        for index, piece in enumerate(queries):
            held[index] = _merge(held[index], attend(rule, slopes, piece, shard.cache))

    def one_step(carry, step):
        keys, reads = carry
        keys = _rotate(keys, plan.axis_name)
        return (keys, _read_block(plan, shard, keys, reads, step)), None

    carry: Any = (shard.keys, tuple(held))
    (_, reads), _ = lax.scan(one_step, carry, jnp.arange(1, plan.steps))
    reads = tuple(Read(*add_sinks(read.o_BGRTV, read.lse_BGRT1, shard.sinks_GR)) for read in reads)
    outputs = tuple(read.o_BGRTV for read in reads)
    kinds = [piece.q_BGRTK.dtype for piece in queries]
    outputs = tuple(o.astype(kind) for o, kind in zip(outputs, kinds))
    return outputs, (shard, outputs, tuple(read.lse_BGRT1 for read in reads))


def _read_block(plan: Ring, shard: Shard, keys, reads, step):
    queries, slopes = shard.queries, shard.slopes_GR
    if not plan.zigzag:
        return (_merge(reads[0], attend(plan.rule, slopes, queries[0], keys[0])),)
    # Late queries see early keys of every device. Of the rest, one quarter is seen in full: early
    # keys of an earlier device by the early queries, or late keys of a later one by the late.
    rule = _all(plan)
    early, late = reads
    late = _merge(late, attend(rule, slopes, queries[1], keys[0]))
    earlier = _visit(plan, step)
    read = attend(rule, slopes, _where(earlier, *queries), _where(earlier, *keys))
    return (
        _where(earlier, _merge(early, read), early),
        _where(earlier, late, _merge(late, read)),
    )


def backward(plan: Ring, residuals, d_outputs):
    shard, outputs, lse = residuals
    shard = _together(shard)
    queries, slopes = shard.queries, shard.slopes_GR
    dtype = accumulation_dtype(queries[0].q_BGRTK)
    cotangents = tuple(
        Cotangent(lse, jnp.sum(d_o.astype(dtype) * o.astype(dtype), -1, keepdims=True), d_o)
        for lse, o, d_o in zip(lse, outputs, d_outputs)
    )

    def zeros(tree):
        tree = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), tree)
        return compat.vary_like(tree, queries[0].q_BGRTK)

    d_queries = list(zeros([piece.q_BGRTK for piece in queries]))
    d_keys = list(zeros([piece[:2] for piece in shard.keys]))
    d_slopes = zeros(slopes)
    d_sinks: Any = None
    if shard.sinks_GR is not None:
        of_pieces = (sink_gradients(shard.sinks_GR, c.lse_BGRT1, c.dot_BGRT1) for c in cotangents)
        d_sinks = sum(of_pieces)
    for query, key, rule in _own_pairs(plan):
        part = attend_backward(rule, slopes, queries[query], shard.keys[key], cotangents[query])
        d_queries[query] += part.q_BGRCK
        d_keys[key] = _add(d_keys[key], (part.k_BGJK, part.v_BGJV))
        d_slopes = _add(d_slopes, part.slopes_GR)
    d_cache = None
    if shard.cache is not None:
        d_cache = zeros(shard.cache[:2])
        rule = plan.rule._replace(causal=False)
        for index, piece in enumerate(queries):
            part = attend_backward(rule, slopes, piece, shard.cache, cotangents[index])
            d_queries[index] += part.q_BGRCK
            d_cache = _add(d_cache, (part.k_BGJK, part.v_BGJV))
            d_slopes = _add(d_slopes, part.slopes_GR)

    def one_step(carry, step):
        keys, d_keys, d_queries, d_slopes = carry
        keys, d_keys = _rotate((keys, d_keys), plan.axis_name)
        more = _pull_block(plan, shard, keys, cotangents, step)
        d_keys, d_queries, d_slopes = _add((d_keys, d_queries, d_slopes), more)
        return (keys, d_keys, d_queries, d_slopes), None

    carry: Any = (shard.keys, tuple(d_keys), tuple(d_queries), d_slopes)
    (_, d_keys, d_queries, d_slopes), _ = lax.scan(one_step, carry, jnp.arange(1, plan.steps))
    d_keys = _send_home(plan, d_keys)
    return (_cotangent(shard, d_queries, d_keys, d_slopes, d_sinks, d_cache),)


def _pull_block(plan: Ring, shard: Shard, keys, cotangents, step):
    """Gradients of the keys at hand, of the queries and of the slopes."""
    queries, slopes = shard.queries, shard.slopes_GR
    if not plan.zigzag:
        part = attend_backward(plan.rule, slopes, queries[0], keys[0], cotangents[0])
        return ((part.k_BGJK, part.v_BGJV),), (part.q_BGRCK,), part.slopes_GR
    rule = _all(plan)
    cross = attend_backward(rule, slopes, queries[1], keys[0], cotangents[1])
    earlier = _visit(plan, step)
    chosen = (_where(earlier, *queries), _where(earlier, *keys), _where(earlier, *cotangents))
    rest = attend_backward(rule, slopes, *chosen)
    cross_keys, rest_keys = ((part.k_BGJK, part.v_BGJV) for part in (cross, rest))

    def only(condition, tree):
        return jax.tree.map(lambda x: jnp.where(condition, x, 0), tree)

    d_keys = (_add(cross_keys, only(earlier, rest_keys)), only(~earlier, rest_keys))
    d_queries = (only(earlier, rest.q_BGRCK), cross.q_BGRCK + only(~earlier, rest.q_BGRCK))
    return d_keys, d_queries, _add(cross.slopes_GR, rest.slopes_GR)


def _add(left: Any, right: Any) -> Any:
    return jax.tree.map(jnp.add, left, right)


def _send_home(plan: Ring, tree: Any) -> Any:
    """From the device that read the block last to the one that it belongs to."""
    size = lax.axis_size(plan.axis_name)
    pairs = [(i, (i - plan.steps + 1) % size) for i in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, plan.axis_name, pairs), tree)


def _cotangent(shard: Shard, d_queries, d_keys, d_slopes, d_sinks, d_cache) -> Shard:
    def keys(held: Keys, d: tuple[jax.Array, jax.Array]) -> Any:
        return Keys(d[0].astype(held.k_BGJK.dtype), d[1].astype(held.v_BGJV.dtype), None)  # type: ignore[arg-type]

    return Shard(
        tuple(
            Queries(d.astype(piece.q_BGRTK.dtype), None)  # type: ignore[arg-type]
            for d, piece in zip(d_queries, shard.queries)
        ),
        tuple(keys(piece, d) for piece, d in zip(shard.keys, d_keys)),
        d_slopes,
        d_sinks,
        None if shard.cache is None else keys(shard.cache, d_cache),
    )


ring.defvjp(forward, backward)
