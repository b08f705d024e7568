"""A round of blocks as one kernel on a TPU, by `pallas_kernels.chunk_scan_tpu`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, lanes
from pallas_kernels.blocks.layout import Layout
from pallas_kernels.chunk_scan_tpu import Plan, chunk_scan

ROUND_TOKENS = 2048  # the backward pass keeps the carry of every block of one round
LARGEST_BLOCK = 256

Tile = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class KernelBody:
    """A block, in plain jnp on matrices of one lane: a head of a row of the batch.

    tile(consts, xs, carry) -> (y_CV, carry), all float32; the carry counts where the block is full.
        A function of module level or a frozen value: it is compared and hashed.
    Of `scan_blocks` it takes consts and `initial` of `[H, rows, columns]`, a carry of
    `[B, H, rows, columns]`, and xs and queries of `[B, T, H, K]` (tiles `[C, K]`) or `[B, T, H]`
    (rows `[1, C]`). y `[B, T, H, V]`, float32.
    """

    tile: Tile

    def size(self, block: int) -> int:
        """The most blocks of a round."""
        return max(1, ROUND_TOKENS // block)

    def run(
        self, layout: Layout, consts: Any, initial: Any, carry: Any, blocks: Any
    ) -> tuple[Any, Any]:
        """One kernel over (lanes, blocks)."""
        blocks_N, batch, length, heads = jax.tree.leaves(blocks)[0].shape[:4]

        def spread(x_HKV: jax.Array) -> jax.Array:
            shape = (batch, *x_HKV.shape)
            return jnp.broadcast_to(x_HKV, shape).reshape(-1, *x_HKV.shape[1:])

        def fold(x_NBCH: jax.Array) -> jax.Array:
            if x_NBCH.ndim == 4:
                x_BHNC = jnp.transpose(x_NBCH, (1, 3, 0, 2))
                return x_BHNC.reshape(batch * heads, blocks_N, 1, length)
            x_BHNCK = jnp.transpose(x_NBCH, (1, 3, 0, 2, 4))
            return x_BHNCK.reshape(batch * heads, blocks_N * length, -1)

        def flags(x_NB: jax.Array) -> jax.Array:
            return x_NB.T.astype(jnp.float32)[:, :, None, None]

        plan = Plan(_Tile(self.tile), length, jnp.float32, dispatch.current_target().interpreter)
        y_LCV, after = chunk_scan(
            plan,
            jax.tree.map(spread, (consts, initial)),
            (flags(layout.full_NB), flags(layout.fresh_NB)),
            jax.tree.map(fold, blocks),
            jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry),
        )
        y_BHNCV = y_LCV.reshape(batch, heads, blocks_N, length, -1)
        after = jax.tree.map(lambda x, old: x.reshape(old.shape), after, carry)
        return after, jnp.transpose(y_BHNCV, (2, 0, 3, 1, 4))


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The tile with its restarts, as `chunk_scan` takes it."""

    tile: Tile

    def __call__(self, consts: Any, fixed: Any, xs: Any, carry: Any) -> tuple[jax.Array, Any]:
        consts, initial = consts
        full_11, fresh_11 = fixed
        carry = _where(fresh_11 > 0, initial, carry)
        y_CV, after = self.tile(consts, xs, carry)
        return y_CV, _where(full_11 > 0, after, carry)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def unfit(block: int, carry: Any, **arrays: jax.Array | None) -> str | None:
    """Why a kernel cannot take a call; `carry` of one lane of one head, `[rows, columns]` each."""
    reason = lanes.dtype_unfit(**arrays)
    if reason is not None:
        return reason
    if block % lanes.SMALLEST_CHUNK or block > LARGEST_BLOCK:
        return (
            f"update_every={block} must be a multiple of {lanes.SMALLEST_CHUNK}, at most "
            f"{LARGEST_BLOCK}"
        )
    return lanes.vmem_unfit(carry)
