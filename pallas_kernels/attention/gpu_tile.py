"""What the attention kernels for a Hopper GPU share: a tile of scores, and who copies.

Scores are kept in units of log 2, s log2 e, so that their exponentials are one instruction.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.gpu_blocks import COMPUTING, Plan
from pallas_kernels.attention.tile import HIDDEN
from pallas_kernels.warpgroup_gpu import Warpgroup

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Registers a thread of a warpgroup that computes and of the one that copies: 64 K for all three.
MANY, FEW = 232, 40
LEAST_FACTOR = 1e-6  # HIDDEN times it is still below LOWEST


class Side(NamedTuple):
    """Numbers of the queries, or of the keys, of a tile; None where the rule needs none.

    Positions are read, not counted: places in a tile, made once, would stay in 32 registers.
    """

    position: jax.Array | None
    segment: jax.Array | None


class Scores(NamedTuple):
    """Of a tile, HIDDEN where not seen; what they are times log2 e over, if not 1: their largest is
    found without multiplying each; the derivative of the cap; query minus key position."""

    scores: jax.Array
    factor: float
    steepness: jax.Array | None
    distance: jax.Array | None


def along(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number of each row, along it."""
    return lax.broadcast_in_dim(x, shape, (0,))


def across(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number of each column, along it."""
    return lax.broadcast_in_dim(x, shape, (1,))


def scores_of(
    plan: Plan,
    products: jax.Array,
    queries: Side,
    keys: Side,
    slope: jax.Array | None,
    *,
    masked: bool,
    by_key: bool = False,
) -> Scores:
    """From q . k, a row a query (`by_key`: a row a key)."""
    rule, shape = plan.rule, products.shape
    query, key = (across, along) if by_key else (along, across)
    factor, steepness = rule.scale * LOG2_E, None
    if rule.logit_cap is None and slope is None and factor > LEAST_FACTOR:
        scores = products
    elif rule.logit_cap is None:
        scores, factor = products * factor, 1.0
    else:
        factor = 1.0
        part = jnp.tanh(products * (rule.scale / rule.logit_cap))
        scores, steepness = part * (rule.logit_cap * LOG2_E), 1.0 - part * part
    masked_by_place = masked and (rule.causal or rule.window is not None)
    distance = None
    if masked_by_place or slope is not None:
        assert queries.position is not None and keys.position is not None
        distance = query(queries.position, shape) - key(keys.position, shape)
    if slope is not None and distance is not None:
        scores = scores - distance.astype(jnp.float32) * (slope * LOG2_E)
    seen = []
    if masked_by_place and distance is not None:
        seen += [distance >= 0] if rule.causal else []
        seen += [distance < rule.window] if rule.window is not None else []
    if masked and queries.segment is not None and keys.segment is not None:
        seen.append(query(queries.segment, shape) == key(keys.segment, shape))
    for mask in seen:
        scores = jnp.where(mask, scores, HIDDEN)
    return Scores(scores, factor, steepness, distance)


class Stream(NamedTuple):
    """Tiles that are loaded ahead of those who compute: of each stage, when they have come, when
    all have left them, and how step `load(step, slot)` is loaded."""

    loaded: Any
    consumed: Any
    load: Callable[[jax.Array, jax.Array], None]


def feed(group: Warpgroup, steps: jax.Array, stages: int, *streams: Stream) -> None:
    """The warpgroup that copies: it loads a step as soon as the others have left its slot."""
    group.gpu.set_max_registers(FEW, action="decrease")

    def left(stream, step):
        group.gpu.barrier_wait(stream.consumed.at[lax.rem(step, jnp.int32(stages))])

    def one(step, nothing):
        for stream in streams:
            group.pl.when(step >= stages)(partial(left, stream, step))
            stream.load(step, lax.rem(step, jnp.int32(stages)))
        return nothing

    def drain(step, nothing):
        for stream in streams:
            left(stream, step)
        return nothing

    lax.fori_loop(0, steps, one, None)
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, None)


def settings_of(group: Warpgroup) -> dict[str, Any]:
    """Of a kernel of three warpgroups."""
    return group.settings | {"num_threads": COMPUTING + 1, "thread_name": "warpgroup"}


def own_barriers(group: Warpgroup, copies: int) -> Any:
    """Of each warpgroup that computes: its own tiles have come, in so many copies."""
    return group.gpu.Barrier(num_arrivals=copies, num_barriers=COMPUTING)


def stream_barriers(group: Warpgroup, copies: int, stages: int) -> tuple[Any, Any]:
    """Of each stage: loaded, in so many copies; and consumed, by all that compute."""
    barrier = group.gpu.Barrier
    return (
        barrier(num_arrivals=copies, num_barriers=stages),
        barrier(num_arrivals=COMPUTING, num_barriers=stages),
    )
