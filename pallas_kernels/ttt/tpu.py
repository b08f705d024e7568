"""Test-time training on a TPU: the dual form on the matrices of one head, for `blocks.tpu`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import blocks
from pallas_kernels.blocks import tpu
from pallas_kernels.blocks.tpu import KernelBody
from pallas_kernels.tile_math import TILES
from pallas_kernels.ttt import dual


@dataclasses.dataclass(frozen=True)
class Tile:
    """One block: its outputs, and the memory after it."""

    step: Callable
    finish: Callable

    def __call__(self, consts: Any, xs: Any, memory: Any) -> tuple[jax.Array, Any]:
        place_rate_1C, norm = consts
        (k_CK, v_CK, rate_1C), q_CK = xs
        place_rate_C1 = TILES.as_column(place_rate_1C)
        block = dual.prepare(TILES, place_rate_C1, rate_1C, q_CK, k_CK, v_CK)
        after, kept = self.step(TILES, norm, memory, block)
        return self.finish(TILES, norm, memory, block, kept), after


LINEAR = KernelBody(Tile(dual.step_linear, dual.finish_linear))
MLP = KernelBody(Tile(dual.step_mlp, dual.finish_mlp))


def unfit(q, k, v, memory, *, block: int) -> str | None:
    """Why the kernel cannot take a call."""
    shapes = [x.shape[1:] if x.ndim == 3 else (1, x.shape[1]) for x in memory]
    return tpu.unfit(block, shapes, q=q, k=k, v=v)


def ttt_tpu(body: KernelBody, q, k, v, rate, place_rate, memory, norm, state, reset):
    """Same as the reference; see `pallas_kernels.ttt` for shapes."""
    heads = q.shape[2]
    place_rate_H1C = jnp.broadcast_to(place_rate, (heads, 1, len(place_rate)))
    consts = (place_rate_H1C, jax.tree.map(lambda x: x[..., None, :], norm))
    entering = state._replace(carry=dual.with_rows(state.carry))
    o, after = blocks.scan_blocks(
        body,
        jax.tree.map(lambda x: x.astype(jnp.float32), consts),
        dual.with_rows(memory),
        entering,
        (k, v, rate.astype(jnp.float32)),
        reset,
        block=len(place_rate),
        queries=q,
    )
    return o.astype(q.dtype), after._replace(carry=dual.without_rows(after.carry))
