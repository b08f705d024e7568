"""Memories that change once a block, token by token: the definition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BlockState, join, leave
from pallas_kernels.blocks.layout import where_leading


class Tokens(NamedTuple):
    """What happens to a token.

    begin(carry) -> running: at the first token of a block.
    token(carry, running, x, place_B) -> (running, y): `carry` as it entered the block, `x` the
        token's xs (or `(xs, queries)`), `place_B` which token of its block it is, from 0.
    commit(running) -> carry: after the last token of a block.
    """

    begin: Callable[[Any], Any]
    token: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]
    commit: Callable[[Any], Any]


def scan_tokens(
    rule: Tokens,
    initial: Any,
    state: BlockState,
    xs: Any,
    reset: jax.Array | None = None,
    *,
    block: int,
    queries: Any = None,
) -> tuple[Any, BlockState]:
    """What `pallas_kernels.blocks.scan_blocks` computes, as a scan over tokens held and new.

    `rule` may close over arrays.
    """
    batch, tokens = jax.tree.leaves(xs)[0].shape[:2]
    if reset is None:
        reset = jnp.zeros((batch, tokens), bool)
    streams, marks, _ = join(state, xs, queries, reset, block=block)

    def select(condition_B, new, old):
        return jax.tree.map(
            lambda new, old: where_leading(condition_B, jnp.broadcast_to(new, old.shape), old),
            new,
            old,
        )

    def one(loop, inputs):
        carry, running, place_B = loop
        x, live_B, begins_B, fresh_B = inputs
        carry_now = select(fresh_B, initial, carry)
        running_now = select(begins_B, rule.begin(carry_now), running)
        place_now_B = jnp.where(begins_B, 0, place_B)
        running_now, y = rule.token(carry_now, running_now, x, place_now_B)
        carry_now = select(place_now_B + 1 == block, rule.commit(running_now), carry_now)
        now = (carry_now, running_now, place_now_B + 1)
        return select(live_B, now, loop), y

    inputs = streams if queries is not None else streams[0]
    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, *marks))
    start = (state.carry, rule.begin(state.carry), jnp.zeros((batch,), jnp.int32))
    (carry, _, _), y = lax.scan(one, start, by_token)
    y = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1)[:, block - 1 :], y)
    return y, leave(state, carry, streams[0], reset, block=block)
