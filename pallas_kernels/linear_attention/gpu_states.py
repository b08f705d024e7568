"""Gated linear attention with a decay a channel on a Hopper GPU: states, and what tokens read.

    walk_states    S' = diag(through) S + XT Y, chunk after chunk; S that enters each is written
    read_states    O = scale (P C + A S), or scale (PT C + A S), all chunks at once

X and A carry their decays already. A block of threads of the walk takes a lane and some columns of
V: as few as give every processor a block, since chunks must wait for each other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.warpgroup_gpu import CHUNK, Warpgroup, columns_of, stages_of


def walk_states(
    x_BTF: jax.Array,
    y_BTF: jax.Array,
    through_NMK: jax.Array,
    state_NKV: jax.Array,
    *,
    heads: int,
    reverse: bool,
    interpreter: Any,
) -> tuple[jax.Array, jax.Array]:
    """S that enters each chunk `[N, M, K, V]`, bfloat16, and the last, `[N, K, V]`, float32; with
    `reverse` chunks go from last to first."""
    group = Warpgroup(interpreter)
    pl, plgpu = group.pl, group.gpu
    tokens = x_BTF.shape[1]
    lanes, key_size, value_size = state_NKV.shape
    chunks, columns = tokens // CHUNK, columns_of(lanes, value_size, key_size)
    stages = stages_of(columns, key_size)
    bfloat16, float32 = jnp.bfloat16, jnp.float32

    def kernel(x_hbm, y_hbm, through_hbm, state_hbm, states_hbm, last_hbm, *scratch):
        x_tile, y_tile, through_tile, state_tile, loaded = scratch
        lane, column = lax.axis_index("lane"), lax.axis_index("column") * columns
        row, head = lax.div(lane, heads), lax.rem(lane, heads)
        own = pl.ds(column, columns)
        keys = pl.ds(head * key_size, key_size)
        values = pl.ds(head * value_size + column, columns)

        def place(step):
            return chunks - 1 - step if reverse else step

        def load(step):
            slot, chunk = lax.rem(step, stages), place(step)
            rows, at = pl.ds(chunk * CHUNK, CHUNK), loaded.at[slot]
            plgpu.copy_gmem_to_smem(x_hbm.at[row, rows, keys], x_tile.at[slot], at)
            plgpu.copy_gmem_to_smem(y_hbm.at[row, rows, values], y_tile.at[slot], at)
            plgpu.copy_gmem_to_smem(through_hbm.at[lane, chunk], through_tile.at[slot], at)

        def one_chunk(step, state):
            slot, chunk = lax.rem(step, stages), place(step)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            entering = state_tile.at[lax.rem(step, 2)]
            entering[...] = state.astype(bfloat16)
            plgpu.barrier_wait(loaded.at[slot])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(entering, states_hbm.at[lane, chunk, :, own])
            through = group.read(through_tile, slot, layout=group.by_row)
            kept = state * lax.broadcast_in_dim(through, state.shape, (0,))
            (state,) = group.products(((x_tile.at[slot],), y_tile.at[slot]), add=(kept,))
            plgpu.commit_smem()
            pl.when(step + stages < chunks)(lambda: load(step + stages))
            return state

        for step in range(min(stages, chunks)):
            load(jnp.int32(step))
        state = group.read(state_hbm.at[lane, :, own])
        last_hbm[lane, :, own] = lax.fori_loop(0, chunks, one_chunk, state)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            compat.like((lanes, chunks, key_size, value_size), bfloat16, x_BTF),
            compat.like(state_NKV.shape, float32, x_BTF),
        ),
        scratch_types=[
            group.tile(stages, CHUNK, key_size, width=columns),
            group.tile(stages, CHUNK, columns, width=columns),
            plgpu.SMEM((stages, key_size), float32),
            group.tile(2, key_size, columns, width=columns),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        ],
        grid=(lanes, value_size // columns),
        grid_names=("lane", "column"),
        **group.settings,
    )(x_BTF, y_BTF, through_NMK, state_NKV)


def read_states(
    pairs_NMCC: jax.Array,
    c_BTF: jax.Array,
    a_BTF: jax.Array,
    states_NMKV: jax.Array,
    *,
    heads: int,
    scale: float,
    reverse: bool,
    interpreter: Any,
) -> jax.Array:
    """O, bfloat16, of the shape of c; `reverse` takes the transpose of P."""
    group = Warpgroup(interpreter)
    plgpu = group.gpu
    lanes, chunks, key_size, value_size = states_NMKV.shape
    bfloat16 = jnp.bfloat16

    def kernel(pairs_hbm, c_hbm, a_hbm, states_hbm, o_hbm, pairs, c, a, states, loaded):
        by_token, by_chunk = [(c_hbm, c), (a_hbm, a)], [(pairs_hbm, pairs), (states_hbm, states)]
        _, place = group.load_chunk(heads, by_token, by_chunk, loaded)
        weights = (pairs,) if reverse else pairs
        (o,) = group.products([(weights, c), (a, states)])
        plgpu.commit_smem()
        c[...] = (o * scale).astype(bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(c, o_hbm.at[place(c)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=compat.like(c_BTF.shape, bfloat16, c_BTF),
        scratch_types=[
            group.tile(CHUNK, CHUNK),
            group.tile(CHUNK, value_size),
            group.tile(CHUNK, key_size),
            group.tile(key_size, value_size),
            plgpu.Barrier(num_arrivals=4),
        ],
        grid=(chunks, lanes),
        grid_names=("chunk", "lane"),
        **group.settings,
    )(pairs_NMCC, c_BTF, a_BTF, states_NMKV)
