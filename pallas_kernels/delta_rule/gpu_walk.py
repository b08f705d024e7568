"""The states of the gated delta rule on a Hopper GPU, chunk after chunk, and their cotangents.

    D = U - W S        S' = through S + (leave . K)T D

    dD = scale PT dO + leave . (K R)      R_before = through R + scale (enter . Q)T dO - WT dD

R is the cotangent of S', R_before that of S; the second walk goes from the last chunk to the first.
A block of threads takes a lane and some columns of V: as few as give every processor a block, since
chunks must wait for each other. Outputs of tokens are made elsewhere, of all chunks at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.warpgroup_gpu import (
    CHUNK,
    ENTER,
    LEAVE,
    Warpgroup,
    columns_of,
    stages_of,
)


def walk(
    keyed: list[jax.Array],
    x_BTF: jax.Array,
    gates_NMGC: jax.Array,
    state_NKV: jax.Array,
    *,
    heads: int,
    scale: float,
    reverse: bool,
    interpreter: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """D (reverse: -dD) `[B, T, H V]` and S (reverse: R) of each chunk `[N, M, K, V]`, bfloat16, and
    the last state (reverse: the cotangent of the first) `[N, K, V]`, float32.

    `keyed` is K, W (reverse: Q, K, W) and x is U (reverse: dO).
    """
    group = Warpgroup(interpreter)
    pl, plgpu = group.pl, group.gpu
    batch, tokens, _ = x_BTF.shape
    lanes, key_size, value_size = state_NKV.shape
    chunks, columns = tokens // CHUNK, columns_of(lanes, value_size, key_size)
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    inputs, stages = [*keyed, x_BTF], stages_of(columns, key_size)
    count = len(inputs)

    def kernel(*refs):
        sources, (gates_hbm, state_hbm) = refs[:count], refs[count : count + 2]
        out_hbm, states_hbm, last_hbm = refs[count + 2 : count + 5]
        tiles = refs[count + 5 : 2 * count + 5]
        gates_tile, state_tile, out_tile, more_tile, loaded = refs[2 * count + 5 :]
        lane, column = lax.axis_index("lane"), lax.axis_index("column") * columns
        row, head = lax.div(lane, heads), lax.rem(lane, heads)
        own = pl.ds(column, columns)
        values = pl.ds(head * value_size + column, columns)

        def place(step):
            return chunks - 1 - step if reverse else step

        def load(step):
            slot, chunk = lax.rem(step, stages), place(step)
            rows = pl.ds(chunk * CHUNK, CHUNK)
            for source, tile in zip(sources, tiles, strict=True):
                width = values if source is sources[-1] else pl.ds(head * key_size, key_size)
                plgpu.copy_gmem_to_smem(source.at[row, rows, width], tile.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(gates_hbm.at[lane, chunk], gates_tile.at[slot], loaded.at[slot])

        def one_chunk(step, state):
            slot, chunk, side = lax.rem(step, stages), place(step), lax.rem(step, 2)
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)
            entering, out = state_tile.at[side], out_tile.at[side]
            entering[...] = state.astype(bfloat16)
            plgpu.barrier_wait(loaded.at[slot])
            *keyed, x = (tile.at[slot] for tile in tiles)
            gates = gates_tile.at[slot]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(entering, states_hbm.at[lane, chunk, :, own])
            kept = state * gates[ENTER, CHUNK - 1]
            given = group.read(x).astype(float32)
            if reverse:
                q, k, w = keyed
                scores, read = group.products((k, (q,)), (k, entering))
                scores = scores * group.weights(gates, reverse=True) * scale
                read = read * group.rows(gates, LEAVE, columns)
                (d,) = group.products((scores.astype(bfloat16), x), add=(read,))
                out[...] = (-d).astype(bfloat16)
                more_tile[...] = (given * group.rows(gates, ENTER, columns) * scale).astype(
                    bfloat16
                )
            else:
                k, w = keyed
                (less,) = group.products((w, entering))
                d = given - less
                out[...] = d.astype(bfloat16)
                more_tile[...] = (d * group.rows(gates, LEAVE, columns)).astype(bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_hbm.at[row, pl.ds(chunk * CHUNK, CHUNK), values])
            if reverse:
                (state,) = group.products([((q,), more_tile), ((w,), out)], add=(kept,))
            else:
                (state,) = group.products(((k,), more_tile), add=(kept,))
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
            compat.like(x_BTF.shape, bfloat16, x_BTF),
            compat.like((lanes, chunks, key_size, value_size), bfloat16, x_BTF),
            compat.like(state_NKV.shape, float32, x_BTF),
        ),
        scratch_types=[
            *[group.tile(stages, CHUNK, key_size, width=columns)] * len(keyed),
            group.tile(stages, CHUNK, columns, width=columns),
            plgpu.SMEM((stages, *gates_NMGC.shape[2:]), float32),
            group.tile(2, key_size, columns, width=columns),
            group.tile(2, CHUNK, columns, width=columns),
            group.tile(CHUNK, columns, width=columns),
            plgpu.Barrier(num_arrivals=count + 1, num_barriers=stages),
        ],
        grid=(lanes, value_size // columns),
        grid_names=("lane", "column"),
        **group.settings,
    )(*inputs, gates_NMGC, state_NKV)
