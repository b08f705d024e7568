"""Gated linear attention with a decay a channel on a Hopper GPU: what happens inside a chunk.

    P_ij = sum_k q_ik k_jk e^{g_{j+1, k} + ... + g_{i, k}}      (j <= i)

Blocks are halved down to single tokens. At each level a token is in the late or in the early half
of its block, and its decay reaches to the border b between them: D_i = g_{b+1} + ... + g_i for a
late one, D_j = g_{j+1} + ... + g_b for an early one. With w_i = q_i e^{D_i} or k_i e^{D_i}, the
pairs of the level are those products w_i . w_j that join two halves of one block. D is a product of
a matrix of zeros and ones with g (in two bfloat16 parts, 16 bits): a sum of numbers that are not
positive, so no exponent is positive and none is a difference. A reset is a decay of e^-800: 0.

Backward, dP_ij = c do_i . v_j, and M the same numbers on both sides of the diagonal:

    Y = M W (pairs of the level);   dq_i = e^{D_i} y_i if late,  dk_i = e^{D_i} y_i if early
    dg = LT (w . y)                 where D = L g

with the same L that made D: no difference of sums either. Likewise for q and k as the state meets
them, and every g of a chunk gets through . sum_v S dS'.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.warpgroup_gpu import CHUNK, Warpgroup

LEVELS = CHUNK.bit_length() - 1
PART = 64  # channels of a block of threads in the backward pass


class _Places:
    """Masks of a chunk, `[C, C]`, from the indices of its rows and columns.

    Made anew where they are used, from one register a row and one a column: kept, they would fill
    the registers.
    """

    def __init__(self, group: Warpgroup):
        rows, columns = (group.indices(CHUNK, layout) for layout in (group.by_row, group.by_column))
        self.index, square = rows, (CHUNK, CHUNK)
        self.i = lax.broadcast_in_dim(rows, square, (0,))
        self.t = lax.broadcast_in_dim(columns, square, (1,))

    def late(self, level: Any, width: int) -> jax.Array:
        """Whether rows of a matrix `[C, width]` are of a late half."""
        half = (self.index >> level) & 1
        return lax.broadcast_in_dim(half, (CHUNK, width), (0,)) == 1

    def linked(self, level: Any) -> jax.Array:
        """Pairs of two halves of one block."""
        return ((self.i ^ self.t) >> level) == 1

    def reached(self, level: Any, *, transposed: bool = False) -> jax.Array:
        """Whose decay (t, columns) lies between token i and the border of its block."""
        i, t = self.i, self.t
        late, early = ((i <= t), (i > t)) if transposed else ((t <= i), (t > i))
        half = (i >> level) & 1
        return (((i ^ t) >> level) == 0) & (((half == 1) & late) | ((half == 0) & early))


def _ones(mask: jax.Array) -> jax.Array:
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)


def _decay(group: Warpgroup, ones: Any, parts: Any) -> jax.Array:
    """exp of the sums of log decay over the tokens of each row of a mask."""
    (sums,) = group.products([(ones, part) for part in parts])
    return jnp.exp(sums)


def _write(group: Warpgroup, tile: Any, x: jax.Array) -> None:
    """To a tile that products have read, and will."""
    group.gpu.commit_smem()
    tile[...] = x.astype(jnp.bfloat16)
    group.gpu.commit_smem()


def _write_ones(group: Warpgroup, tile: Any, mask: jax.Array) -> None:
    """A mask that is known when the kernel is compiled goes to shared memory, not to registers.

    Parts of it are constants there, and the assembler of CUDA 13.0 gives the register of such a
    constant its value behind the first product that reads it.
    """
    _write(group, tile, _ones(mask))


def _of_level(group: Warpgroup, places: _Places, level: Any, q: Any, k: Any, parts: Any, tile: Any):
    """e^D of a level; w is left in `tile`."""
    decay = _decay(group, _ones(places.reached(level)), parts)
    late = places.late(level, q.shape[1])
    chosen = jnp.where(late, group.read(q), group.read(k))
    _write(group, tile, chosen.astype(jnp.float32) * decay)
    return decay


def pairs(
    q_BTF: jax.Array,
    k_BTF: jax.Array,
    g_BTF: tuple[jax.Array, jax.Array],
    *,
    heads: int,
    products: bool,
    interpreter: Any,
) -> tuple[jax.Array, ...]:
    """q e^{g_1 + ... + g_i}, k e^{g_{i+1} + ... + g_C}, of the shape of q, and with `products` P
    `[N, M, C, C]`; all bfloat16. g comes in two parts whose sum it is."""
    group = Warpgroup(interpreter)
    plgpu = group.gpu
    batch, tokens, _ = q_BTF.shape
    size = q_BTF.shape[2] // heads
    lanes, chunks = batch * heads, tokens // CHUNK
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    inputs = [q_BTF, k_BTF, *g_BTF]

    def kernel(*refs):
        sources, (enter_hbm, leave_hbm, *rest) = refs[:4], refs[4:-1]
        pairs_hbm = rest.pop(0) if products else None
        q, k, *parts = rest[:4]
        ones, w, pairs_tile = rest[4:] if products else (rest[4], None, None)
        of_chunk, place = group.load_chunk(heads, zip(sources, rest[:4], strict=True), [], refs[-1])
        places = _Places(group)
        i, t = places.i, places.t
        if products:
            (own,) = group.products((q, (k,)))

            def one_level(level, pairs):
                _of_level(group, places, level, q, k, parts, w)
                (both,) = group.products((w, (w,)))
                return jnp.where(places.linked(level) & (t < i), both, pairs)

            pairs = lax.fori_loop(0, LEVELS, one_level, jnp.where(i == t, own, 0.0))
            pairs_tile[...] = pairs.astype(bfloat16)
        # In shared memory, where a mask does not change: see `_write_ones`.
        _write_ones(group, ones, t <= i)
        entering = group.read(q).astype(float32) * _decay(group, ones, parts)
        _write_ones(group, ones, t > i)
        leaving = group.read(k).astype(float32) * _decay(group, ones, parts)
        plgpu.commit_smem()
        q[...], k[...] = entering.astype(bfloat16), leaving.astype(bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, enter_hbm.at[place(q)])
        plgpu.copy_smem_to_gmem(k, leave_hbm.at[place(k)])
        if products:
            plgpu.copy_smem_to_gmem(pairs_tile, pairs_hbm.at[of_chunk])
        plgpu.wait_smem_to_gmem(0)

    out_type = [compat.like(q_BTF.shape, bfloat16, q_BTF)] * 2
    if products:
        out_type.append(compat.like((lanes, chunks, CHUNK, CHUNK), bfloat16, q_BTF))
    return plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        scratch_types=[
            *[group.tile(CHUNK, size)] * 4,
            group.tile(CHUNK, CHUNK),
            *([group.tile(CHUNK, size), group.tile(CHUNK, CHUNK)] if products else []),
            plgpu.Barrier(num_arrivals=4),
        ],
        grid=(chunks, lanes),
        grid_names=("chunk", "lane"),
        **group.settings,
    )(*inputs)


def pair_gradients(
    q_BTF: jax.Array,
    k_BTF: jax.Array,
    g_BTF: tuple[jax.Array, jax.Array],
    v_BTF: jax.Array,
    d_o_BTF: jax.Array,
    states_NMKV: jax.Array,
    behind_NMKV: jax.Array,
    through_NMK: jax.Array,
    *,
    heads: int,
    scale: float,
    interpreter: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq and dk, bfloat16, and dg, float32, all of the shape of q.

    `behind` is the cotangent of the state behind each chunk, over `scale`.
    """
    group = Warpgroup(interpreter)
    pl, plgpu = group.pl, group.gpu
    key_size, value_size = q_BTF.shape[2] // heads, v_BTF.shape[2] // heads
    lanes, chunks = states_NMKV.shape[:2]
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    inputs = [q_BTF, k_BTF, *g_BTF, v_BTF, d_o_BTF, states_NMKV, behind_NMKV, through_NMK]

    def kernel(*refs):
        sources, (d_q_hbm, d_k_hbm, d_g_hbm) = refs[:9], refs[9:12]
        *tiles, numbers, loaded = refs[12:]
        q, k, high, low, v, d_o, state, behind, through = tiles
        chunk, lane = lax.axis_index("chunk"), lax.axis_index("lane")
        channel = lax.axis_index("part") * PART
        row, head = lax.div(lane, heads), lax.rem(lane, heads)
        rows = pl.ds(chunk * CHUNK, CHUNK)
        at = (row, rows, pl.ds(head * key_size + channel, PART))
        of_values = (row, rows, pl.ds(head * value_size, value_size))
        of_state = (lane, chunk, pl.ds(channel, PART))
        where = [at] * 4 + [of_values] * 2 + [of_state] * 3
        for source, tile, place in zip(sources, tiles, where, strict=True):
            plgpu.copy_gmem_to_smem(source.at[place], tile, loaded)
        plgpu.barrier_wait(loaded)
        parts, places = (high, low), _Places(group)
        i, t = places.i, places.t

        def crossing():
            """Of the state that crosses the chunk: the same for the decays of all its tokens."""
            s, r = (group.read(x).astype(float32) for x in (state, behind))
            numbers[...] = jnp.sum(s * r, axis=1)
            plgpu.commit_smem()
            factors = [group.read(x, layout=group.by_column) for x in (numbers, through)]
            return lax.broadcast_in_dim(factors[0] * factors[1], (CHUNK, PART), (1,))

        d_q, d_k = group.products((d_o, (state,)), (v, (behind,)))
        d_g = crossing()
        late_early, early_late = group.products((d_o, (v,)), (v, (d_o,)))
        own = jnp.sum(jnp.where(i == t, late_early, 0.0), axis=1)
        own = lax.broadcast_in_dim(own, (CHUNK, PART), (0,))
        # Values and states are done with: what is written from here on lies where they were.
        w, u, both, ones = (x.at[:, pl.ds(0, PART)] for x in (v, d_o, state, behind))
        # With t > i: do_t . v_i
        _write(group, both, jnp.where(t < i, late_early, early_late))

        def from_border(d_g, x, d_x, inside):
            """The decay between a token and the chunk's border, and what is added to dg by it."""
            _write_ones(group, ones, inside)
            d_x = d_x * _decay(group, ones, parts)
            _write(group, u, d_x * group.read(x).astype(float32))
            (d_g,) = group.products(((ones,), u), add=(d_g,))
            return d_x, d_g

        d_q, d_g = from_border(d_g, q, d_q, t <= i)
        d_k, d_g = from_border(d_g, k, d_k, t > i)
        d_q = d_q + own * group.read(k).astype(float32)
        d_k = d_k + own * group.read(q).astype(float32)

        def one_level(level, sums):
            d_q, d_k, d_g = sums
            decay = _of_level(group, places, level, q, k, parts, w)
            pairs = jnp.where(places.linked(level), group.read(both).astype(float32), 0.0)
            (y,) = group.products((pairs.astype(bfloat16), w))
            _write(group, u, group.read(w).astype(float32) * y)
            y, late = y * decay, places.late(level, PART)
            d_q, d_k = d_q + jnp.where(late, y, 0.0), d_k + jnp.where(late, 0.0, y)
            (d_g,) = group.products((_ones(places.reached(level, transposed=True)), u), add=(d_g,))
            return d_q, d_k, d_g

        d_q, d_k, d_g = lax.fori_loop(0, LEVELS, one_level, (d_q, d_k, d_g))
        d_g_hbm[at] = d_g * scale
        plgpu.commit_smem()
        q[...], k[...] = (d_q * scale).astype(bfloat16), (d_k * scale).astype(bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, d_q_hbm.at[at])
        plgpu.copy_smem_to_gmem(k, d_k_hbm.at[at])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            *[compat.like(q_BTF.shape, bfloat16, q_BTF)] * 2,
            compat.like(q_BTF.shape, float32, q_BTF),
        ),
        scratch_types=[
            *[group.tile(CHUNK, PART)] * 4,
            *[group.tile(CHUNK, value_size)] * 2,
            *[group.tile(PART, value_size)] * 2,
            *[plgpu.SMEM((PART,), float32)] * 2,
            plgpu.Barrier(num_arrivals=9),
        ],
        grid=(chunks, lanes, key_size // PART),
        grid_names=("chunk", "lane", "part"),
        **group.settings,
    )(*inputs)
