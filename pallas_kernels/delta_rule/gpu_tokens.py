"""Outputs of tokens from the states of chunks on a Hopper GPU: all chunks at once.

    o_i = scale (sum_{j <= i} pair_ij (a_i . b_j) c_j) + state_scale enter_i S_T a_i

With `reverse` j >= i, and `leave` for `enter`. With `across` a has the size of V, and S is read as
it stands (o_i is S a_i). With `extra` (then `across`) two more outputs are S extra_i and
b_i . extra_i.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.warpgroup_gpu import CHUNK, ENTER, LEAVE, Warpgroup


def tokens_of(
    a_BTF: jax.Array,
    b_BTF: jax.Array,
    c_BTF: jax.Array,
    states_NMKV: jax.Array,
    gates_NMGC: jax.Array,
    *,
    heads: int,
    scale: float,
    state_scale: float,
    reverse: bool = False,
    across: bool = False,
    extra_BTF: jax.Array | None = None,
    interpreter: Any,
) -> tuple[jax.Array, ...]:
    """o, of the shape of c; with `extra` one more, and numbers `[N, M, C]`, float32."""
    group = Warpgroup(interpreter)
    plgpu = group.gpu
    inputs = [a_BTF, b_BTF, c_BTF] + ([] if extra_BTF is None else [extra_BTF])
    sizes = [x.shape[2] // heads for x in inputs]
    count, outs = len(inputs), 1 if extra_BTF is None else 3
    lanes, chunks, *state_shape = states_NMKV.shape
    gate = LEAVE if reverse else ENTER
    bfloat16 = jnp.bfloat16

    def kernel(*refs):
        sources, (states_hbm, gates_hbm) = refs[:count], refs[count : count + 2]
        outs_hbm = refs[count + 2 : count + 2 + outs]
        *tiles, states, gates, loaded = refs[count + 2 + outs :]
        tiles, numbers = tiles[:count], tiles[count:]
        of_chunk, place = group.load_chunk(
            heads,
            zip(sources, tiles, strict=True),
            [(states_hbm, states), (gates_hbm, gates)],
            loaded,
        )
        a, b, c, *more = tiles
        entering = (states,) if across else states
        scores, o = group.products((a, (b,)), (a, entering))
        scores = (scores * group.weights(gates, reverse=reverse) * scale).astype(bfloat16)
        o = o * group.rows(gates, gate, sizes[2]) * state_scale
        (o,) = group.products((scores, c), add=(o,))
        plgpu.commit_smem()
        c[...] = o.astype(bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(c, outs_hbm[0].at[place(c)])
        if more:
            b, extra = (group.read(x).astype(jnp.float32) for x in (b, more[0]))
            numbers[0][...] = jnp.sum(b * extra, axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(numbers[0], outs_hbm[2].at[of_chunk])
            (second,) = group.products((more[0], entering))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            c[...] = second.astype(bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(c, outs_hbm[1].at[place(c)])
        plgpu.wait_smem_to_gmem(0)

    out_type = [compat.like(c_BTF.shape, bfloat16, c_BTF)] * 2
    out_type.append(compat.like((lanes, chunks, CHUNK), jnp.float32, c_BTF))
    return tuple(
        plgpu.kernel(
            kernel,
            out_type=tuple(out_type[:outs]),
            scratch_types=[
                *(group.tile(CHUNK, size) for size in sizes),
                *([] if extra_BTF is None else [plgpu.SMEM((CHUNK,), jnp.float32)]),
                group.tile(*state_shape),
                plgpu.SMEM(gates_NMGC.shape[2:], jnp.float32),
                plgpu.Barrier(num_arrivals=count + 2),
            ],
            grid=(chunks, lanes),
            grid_names=("chunk", "lane"),
            **group.settings,
        )(*inputs, states_NMKV, gates_NMGC)
    )
