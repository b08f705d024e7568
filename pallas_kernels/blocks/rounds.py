"""Rounds of a few blocks: laid out, prepared together, scanned, finished together.

The number of rounds depends on the resets. The backward pass computes each round again from the
carry that entered it; if there are more rounds than `Sizes.slots`, from an earlier one, the last
that was saved.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks.layout import (
    Layout,
    Marks,
    plan,
    read,
    to_blocks,
    to_window,
    write,
)


class Sizes(NamedTuple):
    block: int  # tokens
    round: int  # blocks
    most: int  # rounds, if every token is a document
    slots: int  # rounds whose entering carry is saved


def _enter(sizes: Sizes, streams: Any, marks: Marks, pointer_B: jax.Array) -> tuple[Layout, Any]:
    """The layout of the round that begins at the pointers, and its blocks."""
    length = jax.tree.leaves(streams)[0].shape[1]
    layout = plan(marks, pointer_B, sizes.block, sizes.round, length)
    return layout, jax.tree.map(lambda x: to_blocks(x, layout), streams)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_rounds(body, sizes, consts, initial, carry, streams, marks, pointer_B):
    """The last carry, and y over the whole stream, `[B, L, ...]`."""
    carry, y, _ = _forward(body, sizes, 0, consts, initial, carry, streams, marks, pointer_B)
    return carry, y


def _rounds(marks: Marks, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """How many rounds there are, and the stride at which they are saved."""
    blocks = jnp.max(jnp.sum(marks.begins, 1, dtype=jnp.int32))
    rounds = (blocks + sizes.round - 1) // sizes.round
    return rounds, jnp.maximum((rounds + sizes.slots - 1) // sizes.slots, 1)


def _forward(body, sizes, slots, consts, initial, carry, streams, marks, pointer_B):
    """`run_rounds`, with the carries and pointers that entered every `stride`-th round."""
    rounds, stride = _rounds(marks, sizes)

    def forward(carry, pointer_B):
        layout, blocks = _enter(sizes, streams, marks, pointer_B)
        carry, y = body.run(layout, consts, initial, carry, blocks)
        windows = jax.tree.map(lambda y: to_window(y, layout), y)
        return carry, windows, pointer_B + layout.tokens_B

    like = jax.eval_shape(forward, carry, pointer_B)[1]
    length = marks.live.shape[1]  # a window longer than the streams
    y = jax.tree.map(lambda y: jnp.zeros((y.shape[0], length, *y.shape[2:]), y.dtype), like)
    saved = jax.tree.map(lambda x: jnp.zeros((slots + 1, *x.shape), x.dtype), (carry, pointer_B))

    def one(index, loop):
        carry, pointer_B, y, saved = loop
        if slots:
            slot = jnp.where(index % stride == 0, index // stride, slots)  # the last is never read
            saved = jax.tree.map(
                lambda all, x: lax.dynamic_update_index_in_dim(all, x, slot, 0),
                saved,
                (carry, pointer_B),
            )
        carry, windows, after_B = forward(carry, pointer_B)
        y = jax.tree.map(lambda y, window: write(y, window, pointer_B), y, windows)
        return carry, after_B, y, saved

    loop = (carry, pointer_B, y, saved)
    loop = one(0, loop) if sizes.most == 1 else lax.fori_loop(0, rounds, one, loop)
    carry, _, y, saved = loop
    return carry, y, saved


def _save(body, sizes, consts, initial, carry, streams, marks, pointer_B):
    carry, y, saved = _forward(
        body, sizes, sizes.slots, consts, initial, carry, streams, marks, pointer_B
    )
    return (carry, y), (consts, initial, streams, marks, saved)


def _backward(body, sizes, residuals, cotangents):
    consts, initial, streams, marks, saved = residuals
    d_carry, dy = cotangents
    rounds, stride = _rounds(marks, sizes)

    def replay(_, loop):
        carry, pointer_B = loop
        layout, blocks = _enter(sizes, streams, marks, pointer_B)
        carry, _ = body.run(layout, consts, initial, carry, blocks)
        return carry, pointer_B + layout.tokens_B

    def one(step, loop):
        d_consts, d_initial, d_carry, d_streams = loop
        index = rounds - 1 - step
        slot = index // stride
        entering = jax.tree.map(lambda x: x[slot], saved)
        if sizes.most > sizes.slots:
            entering = lax.fori_loop(slot * stride, index, replay, entering)
        carry, pointer_B = entering
        layout, blocks = _enter(sizes, streams, marks, pointer_B)
        _, pull = jax.vjp(partial(body.run, layout), consts, initial, carry, blocks)
        dy_blocks = jax.tree.map(lambda x: to_blocks(x, layout), dy)
        more_consts, more_initial, d_carry, d_blocks = pull((d_carry, dy_blocks))
        d_consts, d_initial = jax.tree.map(
            jnp.add, (d_consts, d_initial), (more_consts, more_initial)
        )
        windows = jax.tree.map(lambda x: to_window(x, layout), d_blocks)
        # Behind the round's tokens a window is 0 and must not replace what is there.
        d_streams = jax.tree.map(
            lambda all, x: write(all, x + read(all, pointer_B, x.shape[1]), pointer_B),
            d_streams,
            windows,
        )
        return d_consts, d_initial, d_carry, d_streams

    zeros = jax.tree.map(jnp.zeros_like, (consts, initial))
    extra = sizes.block * sizes.round
    d_streams = jax.tree.map(
        lambda x: jnp.zeros((x.shape[0], x.shape[1] + extra, *x.shape[2:]), x.dtype), streams
    )
    loop = (*zeros, d_carry, d_streams)
    loop = one(0, loop) if sizes.most == 1 else lax.fori_loop(0, rounds, one, loop)
    d_consts, d_initial, d_carry, d_streams = loop
    d_streams = jax.tree.map(lambda d, x: d[:, : x.shape[1]], d_streams, streams)
    return d_consts, d_initial, d_carry, d_streams, None, None


run_rounds.defvjp(_save, _backward)
