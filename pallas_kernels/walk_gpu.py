"""A matrix memory with additive writes on a Hopper GPU (Mosaic GPU): a walk over the chunks.

    o_i = scale (sum_{j <= i} pair_ij (a_i . b_j) c_j + enter_i ST a_i)
    S'  = through S + sum_j leave_j b_j c_jT

`pair_ij`, `enter`, `leave` and `through` are exponentials of sums of log decay. With `reverse` time
runs backward: j >= i, chunks from last to first, `enter` and `leave` change places. One block of
threads (a warpgroup, two of them a processor) takes a segment of a lane and 64 columns of c through
its chunks: tiles come by TMA, `STAGES` chunks ahead; products are wgmma; S stays in registers, in
float32, and its bfloat16 copy in shared memory is what products read.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.warpgroup_gpu import CHUNK, ENTER, LEAVE, Warpgroup

COLUMNS = 64  # of values: with more, the state of K = 128 does not fit the registers
STAGES = 2


class Heads(NamedTuple):
    """A lane is a part of K and a part of V of a head: no sum of the recurrence joins them.

    o is the sum of the parts of K. Heads of a group share queries and keys.
    """

    heads: int
    groups: int
    key_parts: int = 1
    value_parts: int = 1

    @property
    def lanes(self) -> int:
        return self.heads * self.key_parts * self.value_parts

    def head(self, lane: jax.Array) -> jax.Array:
        return lax.div(lane, self.key_parts * self.value_parts)

    def slots(self, role: str) -> int:
        """Parts side by side in the last axis of queries and keys ("k"), or of values ("v")."""
        return self.groups * self.key_parts if role == "k" else self.heads * self.value_parts

    def slot(self, lane: jax.Array, role: str) -> jax.Array:
        """Which of them a lane reads."""
        head = self.head(lane)
        if role == "v":
            return head * self.value_parts + lax.rem(lane, self.value_parts)
        part = lax.rem(lax.div(lane, self.value_parts), self.key_parts)
        return lax.div(head, self.heads // self.groups) * self.key_parts + part


def walk(
    a_BTF: jax.Array | None,
    b_BTF: jax.Array,
    c_BTF: jax.Array,
    gates_NMGC: jax.Array | None,
    state_NSKV: jax.Array | None,
    *,
    heads: Heads,
    roles: str,
    segments: int,
    scale: float,
    reverse: bool = False,
    interpreter: Any = None,
) -> tuple[jax.Array | None, jax.Array]:
    """o `[B, T, lanes V]` bfloat16, and the state after each segment `[N, S, K, V]`, float32.

    a, b, c: bfloat16, parts of heads side by side in the last axis; `roles` tells of each whether
    it is one of queries and keys (k) or of values (v). K and V are the sizes of a part of b and c.
    T is whole chunks. Without `a` there is no o; without a state it is zero.
    """
    group = Warpgroup(interpreter)
    pl, plgpu = group.pl, group.gpu
    batch, tokens, _ = b_BTF.shape
    key_size, value_size = (
        x.shape[2] // heads.slots(role) for x, role in zip((b_BTF, c_BTF), roles[-2:])
    )
    chunks = tokens // CHUNK
    per_segment = -(-chunks // segments)
    bfloat16, float32 = jnp.bfloat16, jnp.float32

    def kernel(*refs):
        refs = list(refs)
        sources = [refs.pop(0) for _ in range(matrices)]
        gates_hbm = refs.pop(0) if gated else None
        state_hbm = refs.pop(0) if state_NSKV is not None else None
        o_hbm = refs.pop(0) if reads else None
        last_hbm, *tiles, value_tile, loaded = refs
        state_tile = tiles.pop() if reads else None
        gates_tile = tiles.pop(matrices) if gated else None
        unit, column = lax.axis_index("unit"), lax.axis_index("column") * COLUMNS
        lane, segment = lax.div(unit, segments), lax.rem(unit, segments)
        row, part = lax.div(lane, heads.lanes), lax.rem(lane, heads.lanes)
        gates_lane = row * heads.heads + heads.head(part)
        first = segment * per_segment
        last = jnp.minimum(first + per_segment, chunks)
        own = pl.ds(column, COLUMNS)

        def place(step):
            return last - 1 - step if reverse else first + step

        def load(step):
            slot, chunk = lax.rem(step, STAGES), place(step)
            rows = pl.ds(chunk * CHUNK, CHUNK)
            for source, tile, role in zip(sources, tiles, roles, strict=True):
                size = source.shape[2] // heads.slots(role)
                start = heads.slot(part, role) * size
                of_values = source is sources[-1]
                width = pl.ds(start + column, COLUMNS) if of_values else pl.ds(start, size)
                plgpu.copy_gmem_to_smem(source.at[row, rows, width], tile.at[slot], loaded.at[slot])
            if gated:
                plgpu.copy_gmem_to_smem(
                    gates_hbm.at[gates_lane, chunk], gates_tile.at[slot], loaded.at[slot]
                )

        def one_chunk(step, state):
            slot, chunk = lax.rem(step, STAGES), place(step)
            plgpu.barrier_wait(loaded.at[slot])
            *queries, keys, values = (tile.at[slot] for tile in tiles)
            gates = gates_tile.at[slot] if gated else None
            enter, leave = (LEAVE, ENTER) if reverse else (ENTER, LEAVE)
            if reads:
                state_tile[...] = state.astype(bfloat16)
                plgpu.wait_smem_to_gmem(0)
            if gated:
                written = group.read(values).astype(float32) * group.rows(gates, leave, COLUMNS)
                value_tile[...] = written.astype(bfloat16)
            writes = value_tile if gated else values
            if reads or gated:
                plgpu.commit_smem()
            kept = state * gates[ENTER, CHUNK - 1] if gated else state
            if reads:
                scores, o = group.products((queries[0], (keys,)), (queries[0], state_tile))
                scores = (scores * group.weights(gates, reverse=reverse)).astype(bfloat16)
                o = o * group.rows(gates, enter, COLUMNS) if gated else o
                o, state = group.products((scores, values), ((keys,), writes), add=(o, kept))
                plgpu.commit_smem()
                value_tile[...] = (o * scale).astype(bfloat16)
            else:
                (state,) = group.products(((keys,), writes), add=(kept,))
            plgpu.commit_smem()
            if reads:
                width = pl.ds(part * value_size + column, COLUMNS)
                rows = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(value_tile, o_hbm.at[row, rows, width])
            pl.when(step + STAGES < last - first)(lambda: load(step + STAGES))
            return state

        for step in range(STAGES):
            pl.when(step < last - first)(lambda step=step: load(jnp.int32(step)))
        if state_hbm is None:
            state = group.zeros(key_size, COLUMNS)
        else:
            state = group.read(state_hbm.at[unit, :, own])
        state = lax.fori_loop(0, last - first, one_chunk, state)
        last_hbm[unit, :, own] = state
        plgpu.wait_smem_to_gmem(0)

    reads, gated = a_BTF is not None, gates_NMGC is not None
    inputs = ([a_BTF] if reads else []) + [b_BTF, c_BTF]
    matrices = len(inputs)
    widths = [key_size] * (matrices - 1) + [COLUMNS]
    scratch: list[Any] = [group.tile(STAGES, CHUNK, width) for width in widths]
    if gates_NMGC is not None:
        inputs.append(gates_NMGC)
        scratch.append(plgpu.SMEM((STAGES, gates_NMGC.shape[2], CHUNK), float32))
    if reads:
        scratch.append(group.tile(key_size, COLUMNS))
    scratch.append(group.tile(CHUNK, COLUMNS))
    scratch.append(plgpu.Barrier(num_arrivals=matrices + gated, num_barriers=STAGES))
    lanes = batch * heads.lanes
    state_shape = (lanes * segments, key_size, value_size)
    if state_NSKV is not None:
        inputs.append(state_NSKV.reshape(state_shape))
    out_type = [compat.like(state_shape, float32, b_BTF)]
    if reads:
        out_type.insert(0, compat.like((batch, tokens, heads.lanes * value_size), bfloat16, b_BTF))
    *o, states = plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        scratch_types=scratch,
        grid=(lanes * segments, value_size // COLUMNS),
        grid_names=("unit", "column"),
        **group.settings,
    )(*inputs)
    return (o[0] if o else None), states.reshape(lanes, segments, key_size, value_size)
