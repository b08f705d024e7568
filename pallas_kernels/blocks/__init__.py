"""Memories that change once a block of `block` tokens, counted from the start of the document.

Tokens of an unfinished block are part of the state and are read again by the next call, so that any
split of a stream gives the same result; a block that a reset or the end of the segment cuts short
changes no weights. Every lane has its own block borders.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks.body import Body, Round
from pallas_kernels.blocks.layout import Marks
from pallas_kernels.blocks.rounds import Sizes, run_rounds

__all__ = [
    "BlockState",
    "Body",
    "Round",
    "init_blocks",
    "join",
    "leave",
    "place_in_block",
    "scan_blocks",
]


class BlockState(NamedTuple):
    """The carry before the current block, and the tokens of that block so far.

    carry: `[B, ...]`.  tokens: `[B, block - 1, ...]`; of lane b the last `count_B[b]` are the
    block's, the others are 0. Both float32 or wider.  count_B: int32, in 0 .. block - 1.
    """

    carry: Any
    tokens: Any
    count_B: jax.Array


def init_blocks(initial: Any, xs: Any, *, block: int) -> BlockState:
    """The state at the start of a document.

    initial: the carry at the start of a document, without lanes. xs: arrays, or their
    `jax.ShapeDtypeStruct`s, `[B, T, ...]` with any T, as `scan_blocks` will get them.
    """
    batch = jax.tree.leaves(xs)[0].shape[0]
    carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), initial)

    def nothing(x: Any) -> jax.Array:
        wide = jnp.result_type(jnp.float32, x.dtype)
        return jnp.zeros((batch, block - 1, *x.shape[2:]), wide)

    return BlockState(carry, jax.tree.map(nothing, xs), jnp.zeros((batch,), jnp.int32))


def place_in_block(
    count_B: jax.Array, reset_BT: jax.Array | None, tokens: int, block: int
) -> jax.Array:
    """Which token of its block each token is, from 0, `[B, T]`."""
    step_T = jnp.arange(tokens, dtype=jnp.int32)
    place_BT = count_B[:, None] + step_T
    if reset_BT is not None:
        last_BT = lax.cummax(jnp.where(reset_BT, step_T, -1), axis=1)
        place_BT = jnp.where(last_BT >= 0, step_T - last_BT, place_BT)
    return place_BT % block


def scan_blocks(
    body: Round,
    consts: Any,
    initial: Any,
    state: BlockState,
    xs: Any,
    reset: jax.Array | None = None,
    *,
    block: int,
    queries: Any = None,
) -> tuple[Any, BlockState]:
    """Outputs of a segment, and the state after it.

    for each block of up to `block` tokens, cut short by resets and the end of the segment:
        carry = initial, if the first token has a reset
        y, new = body of (consts, carry, the block's xs)
        carry = new, if the block has all its tokens

    consts: arrays that all blocks share.  initial: the carry at the start of a document, without
    lanes (or anything that broadcasts against the carry).  xs: `[B, T, ...]`, T from 1.
    queries: what else `prepare` gets of each token, as the second of `(xs, queries)`: arrays
    `[B, T, ...]` that only that token's own output depends on, so that the state need not hold
    them; 0 for tokens read again. Without them it gets `xs`.
    reset: `[B, T]` bool.
    Differentiable in consts, initial, the state, xs and queries, as deep as the definition is.
    Memory for the backward pass grows as one carry every `body.size(block)` blocks, however
    many documents there are; blocks cut short cost as much as full ones.
    """
    batch, tokens = jax.tree.leaves(xs)[0].shape[:2]
    if reset is None:
        reset = jnp.zeros((batch, tokens), bool)
    streams, marks, start_B = join(state, xs, queries, reset, block=block)
    size = min(body.size(block), tokens, -(-tokens // block) + 1)
    sizes = Sizes(block, size, -(-tokens // size), -(-(-(-tokens // block) + 1) // size))

    marks = Marks(*(jnp.pad(mark, ((0, 0), (0, size * block))) for mark in marks))
    inputs = streams if queries is not None else streams[0]
    carry, y = run_rounds(body, sizes, consts, initial, state.carry, inputs, marks, start_B)
    y = jax.tree.map(lambda y: y[:, block - 1 : block - 1 + tokens], y)
    return y, leave(state, carry, streams[0], reset, block=block)


def join(
    state: BlockState, xs: Any, queries: Any, reset_BT: jax.Array, *, block: int
) -> tuple[tuple[Any, Any], Marks, jax.Array]:
    """Tokens held and new, `[B, block - 1 + T, ...]`; their marks; where each lane begins."""
    tokens = reset_BT.shape[1]
    held_B = jnp.where(reset_BT[:, 0], 0, state.count_B)
    place_BT = place_in_block(state.count_B, reset_BT, tokens, block)

    def stream(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old.astype(new.dtype), new], 1)

    def behind_nothing(new: jax.Array) -> jax.Array:
        return jnp.pad(new, ((0, 0), (block - 1, 0)) + ((0, 0),) * (new.ndim - 2))

    start_B = block - 1 - held_B
    step_J = jnp.arange(block - 1)
    marks = Marks(
        live=stream(step_J >= start_B[:, None], jnp.ones_like(reset_BT)),
        begins=stream(step_J == start_B[:, None], place_BT == 0),
        fresh=behind_nothing(reset_BT),
    )
    streams = jax.tree.map(stream, state.tokens, xs), jax.tree.map(behind_nothing, queries)
    return streams, marks, start_B


def leave(
    state: BlockState, carry: Any, streams: Any, reset_BT: jax.Array, *, block: int
) -> BlockState:
    """The state after a segment; `streams` of the tokens as `join` returns them."""
    tokens = reset_BT.shape[1]
    count_B = (place_in_block(state.count_B, reset_BT, tokens, block)[:, -1] + 1) % block
    keep_BJ = jnp.arange(block - 1) >= block - 1 - count_B[:, None]

    def tail(old: jax.Array, joined: jax.Array) -> jax.Array:
        last = joined[:, tokens:]
        keep = keep_BJ.reshape(keep_BJ.shape + (1,) * (last.ndim - 2))
        return jnp.where(keep, last, 0).astype(old.dtype)

    return BlockState(carry, jax.tree.map(tail, state.tokens, streams), count_B)
