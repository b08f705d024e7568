"""The triangular system of every chunk of the gated delta rule on a Hopper GPU, and its gradient.

    A_ij = beta_i pair_ij (k_i . k_j), j < i      T = (I + A)^-1
    U = T diag(beta) V                            W = T diag(beta enter) K

One warpgroup a chunk, all chunks at once. T is made by merging of blocks on the diagonal, with
products of numbers in two bfloat16 parts (16 bits); U, W and T leave in bfloat16.

With cotangents dU and dW, and Y = TT dU, Z = TT dW:

    dV = beta Y        dA_ij = -(y_i . u_j + z_i . w_j), j < i        M_ij = dA_ij pair_ij
    dK = beta enter Z + (beta M) K + (beta M)T K
    dbeta_i = (M K)_i . k_i + y_i . v_i + enter_i z_i . k_i
    dG_i    = beta_i (M K)_i . k_i - k_i . ((beta M)T K)_i + beta_i enter_i z_i . k_i

where G are the sums of log decay inside `pair` and `enter`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.warpgroup_gpu import BETA, CHUNK, ENTER, Warpgroup


def _parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _inverse(group: Warpgroup, strict_CC: jax.Array, tiles: Any) -> jax.Array:
    """(I + A)^-1 for strictly lower triangular A, as `tile_math.unit_lower_inverse`.

    T holds the inverses of blocks on the diagonal. N being the blocks of A that link two of them,
    T - T N T holds those of twice the size, and T N is T A where N is.
    """
    i, j = group.places()
    *solved, high, low = tiles

    def links(level: Any) -> jax.Array:
        """Pairs in one block of twice 2^level, but not in one of 2^level; those below it count."""
        return ((i ^ j) >> level) == 1

    def merge(level: jax.Array, inverse_CC: jax.Array) -> jax.Array:
        a, b = _parts(inverse_CC)
        solved[0][...], solved[1][...] = a, b
        group.gpu.commit_smem()
        (left,) = group.products([(a, high), (a, low), (b, high)])
        a, b = _parts(jnp.where(links(level), left, 0.0))
        (step,) = group.products([(a, solved[0]), (a, solved[1]), (b, solved[0])])
        group.gpu.commit_smem()
        return inverse_CC - step

    high[...], low[...] = _parts(strict_CC)
    pairs_CC = (i == j).astype(jnp.float32) - jnp.where(links(0), strict_CC, 0.0)
    return lax.fori_loop(1, CHUNK.bit_length() - 1, merge, pairs_CC)


def solve(
    k_BTF: jax.Array,
    v_BTF: jax.Array,
    gates_NMGC: jax.Array,
    solved_NMCC: jax.Array | None = None,
    *,
    heads: int,
    interpreter: Any,
) -> tuple[jax.Array, ...]:
    """U `[B, T, H V]`, W `[B, T, H K]` and, unless it is given, T `[N, M, C, C]`, all bfloat16."""
    group = Warpgroup(interpreter)
    plgpu = group.gpu
    batch, tokens, _ = k_BTF.shape
    sizes = [x.shape[2] // heads for x in (k_BTF, v_BTF)]
    lanes, chunks = batch * heads, tokens // CHUNK
    bfloat16 = jnp.bfloat16

    inputs = [k_BTF, v_BTF, gates_NMGC] + ([] if solved_NMCC is None else [solved_NMCC])

    def kernel(*refs):
        k_hbm, v_hbm, gates_hbm, *refs = refs
        if solved_NMCC is None:
            u_hbm, w_hbm, solved_hbm, k, v, gates, *tiles, loaded = refs
        else:
            solved_hbm, u_hbm, w_hbm, k, v, gates, *tiles, loaded = refs
        by_chunk = [(gates_hbm, gates)]
        by_chunk += [] if solved_NMCC is None else [(solved_hbm, tiles[0])]
        of_chunk, place = group.load_chunk(heads, [(k_hbm, k), (v_hbm, v)], by_chunk, loaded)
        if solved_NMCC is None:
            (overlap,) = group.products((k, (k,)))
            strict = overlap * group.weights(gates, strict=True) * group.rows(gates, BETA, CHUNK)
            tiles[0][...] = _inverse(group, strict, tiles).astype(bfloat16)
        beta, enter = (group.read(gates, x, layout=group.by_column) for x in (BETA, ENTER))

        def times(factor, tile):
            """T diag(factor) times a tile, left in the tile."""
            across = lax.broadcast_in_dim(factor, (CHUNK, CHUNK), (1,))
            weighted = group.read(tiles[0]).astype(jnp.float32) * across
            (out,) = group.products((weighted.astype(bfloat16), tile))
            plgpu.commit_smem()
            tile[...] = out.astype(bfloat16)

        plgpu.commit_smem()
        times(beta, v)
        times(beta * enter, k)
        plgpu.commit_smem()
        if solved_NMCC is None:
            plgpu.copy_smem_to_gmem(tiles[0], solved_hbm.at[of_chunk])
        plgpu.copy_smem_to_gmem(v, u_hbm.at[place(v)])
        plgpu.copy_smem_to_gmem(k, w_hbm.at[place(k)])
        plgpu.wait_smem_to_gmem(0)

    out_type = [compat.like(x.shape, bfloat16, k_BTF) for x in (v_BTF, k_BTF)]
    if solved_NMCC is None:
        out_type.append(compat.like((lanes, chunks, CHUNK, CHUNK), bfloat16, k_BTF))
    return plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        scratch_types=[
            *(group.tile(CHUNK, size) for size in sizes),
            plgpu.SMEM(gates_NMGC.shape[2:], jnp.float32),
            *[group.tile(CHUNK, CHUNK)] * (4 if solved_NMCC is None else 1),
            plgpu.Barrier(num_arrivals=len(inputs)),
        ],
        grid=(chunks, lanes),
        grid_names=("chunk", "lane"),
        **group.settings,
    )(*inputs)


def solve_gradient(
    k_BTF,
    v_BTF,
    u_BTF,
    w_BTF,
    solved_NMCC,
    less_BTF,
    d_w_BTF,
    d_k_BTF,
    gates_NMGC,
    *,
    heads,
    interpreter,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dK, dV (bfloat16), and of each token dbeta and dG `[N, M, 2, C]`, float32.

    `less` is -dU; `d_k` is another part of dK, to which this one is added.
    """
    group = Warpgroup(interpreter)
    plgpu = group.gpu
    batch, tokens, _ = k_BTF.shape
    inputs = [k_BTF, v_BTF, u_BTF, w_BTF, less_BTF, d_w_BTF]
    sizes = [x.shape[2] // heads for x in inputs]
    lanes, chunks = batch * heads, tokens // CHUNK
    bfloat16, float32 = jnp.bfloat16, jnp.float32

    def kernel(*refs):
        sources, (given_hbm, solved_hbm, gates_hbm) = refs[:6], refs[6:9]
        d_k_hbm, d_v_hbm, numbers_hbm = refs[9:12]
        k, v, u, w, less, d_w = tiles = refs[12:18]
        solved, gates, numbers, loaded, given = refs[18:]
        of_chunk, place = group.load_chunk(
            heads,
            zip(sources, tiles, strict=True),
            [(solved_hbm, solved), (gates_hbm, gates)],
            loaded,
        )

        def along(x, tile):
            """Sums over rows of the products of x with a tile."""
            return jnp.sum(x * group.read(tile).astype(float32), axis=1)

        (minus_y,) = group.products(((solved,), less))
        plgpu.commit_smem()
        less[...] = minus_y.astype(bfloat16)
        minus_d_beta = along(minus_y, v)
        plgpu.commit_smem()
        v[...] = (-minus_y * group.rows(gates, BETA, sizes[1])).astype(bfloat16)
        (z,) = group.products(((solved,), d_w))
        plgpu.commit_smem()
        d_w[...] = z.astype(bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v, d_v_hbm.at[place(v)])
        beta, enter = (group.read(gates, x, layout=group.by_row) for x in (BETA, ENTER))
        entered = along(z, k) * enter
        less_yu, zw, overlap = group.products((less, (u,)), (d_w, (w,)), (k, (k,)))
        pairs = (less_yu - zw) * group.weights(gates, strict=True)  # M
        inside = jnp.sum(pairs * overlap, axis=1)
        weighted = (pairs * group.rows(gates, BETA, CHUNK)).astype(bfloat16)
        solved[...] = weighted
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(given_hbm.at[place(k)], w, given)
        entering = lax.broadcast_in_dim(beta * enter, (CHUNK, sizes[0]), (0,))
        z = group.read(d_w).astype(float32) * entering
        (d_k,) = group.products([(weighted, k), ((solved,), k)], add=(z,))
        # d_k . k is the sum of the terms of dG, but with the sign of the last one turned.
        numbers[0, :] = entered + inside - minus_d_beta
        numbers[1, :] = 2 * beta * (entered + inside) - along(d_k, k)
        plgpu.barrier_wait(given)
        plgpu.commit_smem()
        k[...] = (d_k + group.read(w).astype(float32)).astype(bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, d_k_hbm.at[place(k)])
        plgpu.copy_smem_to_gmem(numbers, numbers_hbm.at[of_chunk])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            compat.like(k_BTF.shape, bfloat16, k_BTF),
            compat.like(v_BTF.shape, bfloat16, k_BTF),
            compat.like((lanes, chunks, 2, CHUNK), float32, k_BTF),
        ),
        scratch_types=[
            *(group.tile(CHUNK, size) for size in sizes),
            group.tile(CHUNK, CHUNK),
            plgpu.SMEM(gates_NMGC.shape[2:], float32),
            plgpu.SMEM((2, CHUNK), float32),
            plgpu.Barrier(num_arrivals=8),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(chunks, lanes),
        grid_names=("chunk", "lane"),
        **group.settings,
    )(*inputs, d_k_BTF, solved_NMCC, gates_NMGC)
