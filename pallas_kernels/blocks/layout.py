"""How the tokens of a stream, `[B, L, ...]`, fall into blocks that resets cut short.

Blocks are `[N, B, C, ...]`: the next N blocks of C tokens, with 0 behind the end of short ones.
A window is `[B, J, ...]`: the next J = N C tokens of each lane, from the start of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Marks(NamedTuple):
    """Of each token of the stream: whether it is one, starts a block, starts a document."""

    live: jax.Array
    begins: jax.Array
    fresh: jax.Array


class Layout(NamedTuple):
    """How the tokens of a window fall into the blocks of a round."""

    index_NBC: jax.Array  # place in the stream of each token of the blocks
    valid_NBC: jax.Array
    source_BJ: jax.Array  # block * C + place in the block, of each token of the window
    inside_BJ: jax.Array  # whether the token is in one of the blocks
    full_NB: jax.Array
    fresh_NB: jax.Array

    @property
    def tokens_B(self) -> jax.Array:
        """How many tokens the blocks hold."""
        return jnp.sum(self.inside_BJ, 1, dtype=jnp.int32)


def plan(marks: Marks, pointer_B: jax.Array, block: int, count: int, length: int) -> Layout:
    """The next `count` blocks from the pointers, each at the start of a block.

    `marks` reach a window beyond the `length` tokens of the stream.
    """
    live_BJ, begins_BJ, fresh_BJ = (read(mark, pointer_B, block * count) for mark in marks)
    which_BJ = jnp.cumsum(begins_BJ, 1, dtype=jnp.int32) - 1
    inside_BJ = live_BJ & (which_BJ < count)
    block_N11 = jnp.arange(count, dtype=jnp.int32)[:, None, None]
    mine_NBJ = (which_BJ == block_N11) & inside_BJ
    first_NB = jnp.sum(which_BJ < block_N11, -1, dtype=jnp.int32)
    length_NB = jnp.sum(mine_NBJ, -1, dtype=jnp.int32)
    place_C = jnp.arange(block, dtype=jnp.int32)
    index_NBC = pointer_B[:, None] + first_NB[..., None] + place_C
    step_J = jnp.arange(which_BJ.shape[1], dtype=jnp.int32)
    own_BJ = jnp.sum(jnp.where(mine_NBJ, block_N11 * block - first_NB[..., None], 0), 0)
    return Layout(
        jnp.minimum(index_NBC, length - 1),
        place_C < length_NB[..., None],
        jnp.where(inside_BJ, own_BJ + step_J, 0),
        inside_BJ,
        length_NB == block,
        jnp.any(mine_NBJ & fresh_BJ, -1),
    )


def where_leading(condition: jax.Array, x: jax.Array, y: jax.Array | int) -> jax.Array:
    """`jnp.where`, with a condition that has the leading axes of x."""
    return jnp.where(condition.reshape(condition.shape + (1,) * (x.ndim - condition.ndim)), x, y)


def select_leading(condition: jax.Array, new: Any, old: Any) -> Any:
    """`where_leading` on trees; arrays of `new` are broadcast to those of `old`."""
    return jax.tree.map(
        lambda new, old: where_leading(condition, jnp.broadcast_to(new, old.shape), old), new, old
    )


def to_blocks(x_BL: jax.Array, layout: Layout) -> jax.Array:
    """The blocks of a round, out of a stream."""
    lane_B1 = jnp.arange(x_BL.shape[0])[:, None]
    x_NBC = x_BL.at[lane_B1, layout.index_NBC].get(mode="promise_in_bounds")
    return where_leading(layout.valid_NBC, x_NBC, 0)


def to_window(x_NBC: jax.Array, layout: Layout) -> jax.Array:
    """The tokens of the blocks in order, with 0 behind the last."""
    block, lane_B1 = x_NBC.shape[2], jnp.arange(x_NBC.shape[1])[:, None]
    index = layout.source_BJ // block, lane_B1, layout.source_BJ % block
    return where_leading(layout.inside_BJ, x_NBC.at[index].get(mode="promise_in_bounds"), 0)


def read(x_BL: jax.Array, pointer_B: jax.Array, length: int) -> jax.Array:
    """`length` tokens from the pointers on."""
    return jax.vmap(lambda x_L, pointer: lax.dynamic_slice_in_dim(x_L, pointer, length))(
        x_BL, pointer_B
    )


def write(x_BL: jax.Array, window_BJ: jax.Array, pointer_B: jax.Array) -> jax.Array:
    """x with a window in the place of its tokens from the pointers on."""
    return jax.vmap(
        lambda x_L, window_J, at: lax.dynamic_update_slice_in_dim(x_L, window_J, at, 0)
    )(x_BL, window_BJ, pointer_B)
