"""Recurrences that are linear in their state: shards are read twice, gradients are formed once.

    h_out = a h_in + b,   a and b of the shard, a by element

The shard is read from zero for b, and then from the state that enters it. Backwards likewise: with
e and d the cotangents of h_in and h_out, and l what e is where d comes from outside alone,

    e = a d' + l,   d' of a shard is e of the next

the shard is read backwards for l, and then with d', which gives all gradients. To differentiate
the program of the forward pass would form them for both of its readings, and hold both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.context_parallel.tokens import same_everywhere


class Plan(NamedTuple):
    """Hashable, all of it.

    read(streams, state) -> (y, state). through(streams): a. axis_name: of the mesh.
    """

    read: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
    through: Callable[[Any], jax.Array]
    axis_name: str


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def read_twice(plan: Plan, streams: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y of this shard and the state behind it. state: in front of the first shard, on each device.

    Every device gathers n pairs of a and b, and backwards of a and l.
    """
    return plan.read(streams, _entering(plan, streams, state))


def _entering(plan: Plan, streams: Any, state: jax.Array) -> jax.Array:
    nothing = same_everywhere(jnp.zeros_like(state), state)
    written = plan.read(streams, nothing)[1]
    earlier = jnp.arange(lax.axis_size(plan.axis_name)) < lax.axis_index(plan.axis_name)
    return _pass_on(plan, earlier, plan.through(streams), written, state, reverse=False)


def _pass_on(plan: Plan, counts_P, through, added, state, *, reverse: bool) -> jax.Array:
    """state = through state + added, over the shards that count, in order or from the last."""

    def one_shard(state, shard):
        counts, through, added = shard
        return jnp.where(counts, through * state + added, state), None

    shards = (counts_P, *lax.all_gather((through, added), plan.axis_name))
    return lax.scan(one_shard, state, shards, reverse=reverse)[0]


def _forward(plan: Plan, streams: Any, state: jax.Array):
    out, pull = jax.vjp(plan.read, streams, _entering(plan, streams, state))
    return out, (pull, plan.through(streams))


def _backward(plan: Plan, residuals: Any, cotangents: tuple[jax.Array, jax.Array]):
    pull, through = residuals
    d_y, d_after = cotangents
    local = pull((d_y, d_after))[1]
    me = lax.axis_index(plan.axis_name)
    later = jnp.arange(lax.axis_size(plan.axis_name)) > me
    nothing = same_everywhere(jnp.zeros_like(local), local)
    d_next = _pass_on(plan, later, through, local, nothing, reverse=True)
    d_streams, d_entering = pull((d_y, d_after + d_next))
    return d_streams, jnp.where(me == 0, d_entering, 0)


read_twice.defvjp(_forward, _backward)
