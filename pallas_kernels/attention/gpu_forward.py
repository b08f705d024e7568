"""The forward pass of attention on a Hopper GPU: a running softmax over blocks of keys.

    m' = max(m, rowmax s);  p = e^{s - m'};  l' = e^{m - m'} l + rowsum p;  o' = e^{m - m'} o + p V

A block of threads has three warpgroups: two compute, each for 64 queries of a head, with o in
registers; the third copies keys, values and their numbers, STAGES blocks ahead. A sink is a key
seen before all others, whose value is 0: m begins as the sink and l as 1.
Source: arXiv:2307.08691; a warpgroup that copies and two that compute arXiv:2407.08608.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.gpu_blocks import (
    COMPUTING,
    KEYS,
    OWN,
    ROWS,
    Arrays,
    Plan,
    reach,
    turned,
    walk_of,
)
from pallas_kernels.attention.gpu_tile import (
    LN_2,
    LOG2_E,
    MANY,
    Side,
    along,
    barriers_of,
    feed,
    scores_of,
    settings_of,
)
from pallas_kernels.attention.tile import LOWEST
from pallas_kernels.warpgroup_gpu import Warpgroup

STAGES = 2


def forward(
    plan: Plan, arrays: Arrays, slopes_H: jax.Array | None, sinks_H: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """o `[B, L, H V]`, bfloat16, and log-sum-exp `[B H, L]`, float32, sinks included."""
    group = Warpgroup(plan.interpreter)
    pl, plgpu = group.pl, group.gpu
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    length = arrays.q_BTF.shape[1]
    key_size, value_size = plan.key_size, plan.value_size
    query, key = arrays.queries, arrays.keys
    inputs: dict[str, jax.Array | None] = {
        "reach": reach(plan.rule, arrays, OWN, KEYS, of_keys=False),
        "q": arrays.q_BTF,
        "k": arrays.k_BJF,
        "v": arrays.v_BJF,
        "query_position": query.position_BT if plan.placed else None,
        "query_segment": query.segment_BT,
        "key_position": key.position_BT if plan.placed else None,
        "key_segment": key.segment_BT,
        "slope": slopes_H,
        "sink": sinks_H,
    }
    given = {name: x for name, x in inputs.items() if x is not None}
    numbers = [name for name in ("key_position", "key_segment") if name in given]

    def kernel(*refs):
        hbm = dict(zip(given, refs))
        o_hbm, lse_hbm, q_tile, k_tile, v_tile, *tiles, o_tile, lse_tile = refs[len(given) : -3]
        q_loaded, loaded, consumed = refs[-3:]
        number_tiles = dict(zip(numbers, tiles, strict=True))
        row, head, who = (lax.axis_index(x) for x in ("row", "head", "warpgroup"))
        block = turned(lax.axis_index("block"), length // OWN, plan.rule)
        walk = walk_of(hbm["reach"], row, block)
        key_head = lax.div(head, jnp.int32(plan.share))

        def load(step, slot):
            keys = pl.ds(walk.any_block(step) * KEYS, KEYS)
            at = loaded.at[slot]
            for name, tile, size in (("k", k_tile, key_size), ("v", v_tile, value_size)):
                source = hbm[name].at[row, keys, pl.ds(key_head * size, size)]
                plgpu.copy_gmem_to_smem(source, tile.at[slot], at)
            for name, tile in number_tiles.items():
                plgpu.copy_gmem_to_smem(hbm[name].at[row, keys], tile.at[slot], at)

        def compute():
            plgpu.set_max_registers(MANY, action="increase")
            start = block * OWN + who * ROWS
            own = pl.ds(start, ROWS)
            q = q_tile.at[who]
            source = hbm["q"].at[row, own, pl.ds(head * key_size, key_size)]
            plgpu.copy_gmem_to_smem(source, q, q_loaded.at[who])

            def numbers_of(name):
                return (
                    group.read(hbm[name].at[row, own], layout=group.by_row) if name in hbm else None
                )

            queries = Side(numbers_of("query_position"), numbers_of("query_segment"))
            slope = hbm["slope"][head] if "slope" in hbm else None
            plgpu.barrier_wait(q_loaded.at[who])

            def one_block(step, state, *, masked):
                o, most, total = state
                count = step + walk.full if masked else step
                slot = lax.rem(count, jnp.int32(STAGES))
                plgpu.barrier_wait(loaded.at[slot])
                (products,) = group.products((q, (k_tile.at[slot],)))

                def of_keys(name):
                    if name not in number_tiles:
                        return None
                    return group.read(number_tiles[name], slot, layout=group.by_column)

                position = of_keys("key_position") if masked or slope is not None else None
                keys = Side(position, of_keys("key_segment") if masked else None)
                s = scores_of(plan, products, queries, keys, slope, masked=masked).scores
                more = jnp.maximum(most, jnp.max(s, axis=1))
                p = jnp.exp2(s - along(more, s.shape))
                fade = jnp.exp2(most - more)
                total = total * fade + jnp.sum(p, axis=1)
                o = o * along(fade, o.shape)
                (o,) = group.products((p.astype(bfloat16), v_tile.at[slot]), add=(o,))
                plgpu.barrier_arrive(consumed.at[slot])
                return o, more, total

            most = group.full(LOWEST, ROWS, layout=group.by_row)
            total = group.full(0.0, ROWS, layout=group.by_row)
            if "sink" in hbm:
                most, total = most * 0.0 + hbm["sink"][head] * LOG2_E, total + 1.0
            state = (group.zeros(ROWS, value_size), most, total)
            state = lax.fori_loop(0, walk.full, lambda n, x: one_block(n, x, masked=False), state)
            o, most, total = lax.fori_loop(
                0, walk.masked, lambda n, x: one_block(n, x, masked=True), state
            )
            total = jnp.where(total > 0.0, total, 1.0)
            o_tile[who] = (o / along(total, o.shape)).astype(bfloat16)
            lse_tile[who] = most * LN_2 + jnp.log(total)
            plgpu.commit_smem()
            width = pl.ds(head * value_size, value_size)
            plgpu.copy_smem_to_gmem(o_tile.at[who], o_hbm.at[row, own, width])
            plgpu.copy_smem_to_gmem(lse_tile.at[who], lse_hbm.at[row * plan.heads + head, own])
            plgpu.wait_smem_to_gmem(0)

        pl.when(who < COMPUTING)(compute)
        copying = who == COMPUTING
        pl.when(copying)(lambda: feed(group, walk.full + walk.masked, STAGES, load, consumed))

    return plgpu.kernel(
        kernel,
        out_type=(
            compat.like((plan.batch, length, plan.heads * value_size), bfloat16, arrays.q_BTF),
            compat.like((plan.batch * plan.heads, length), float32, arrays.q_BTF),
        ),
        scratch_types=[
            group.tile(COMPUTING, ROWS, key_size),
            group.tile(STAGES, KEYS, key_size),
            group.tile(STAGES, KEYS, value_size),
            *[plgpu.SMEM((STAGES, KEYS), jnp.int32)] * len(numbers),
            group.tile(COMPUTING, ROWS, value_size),
            plgpu.SMEM((COMPUTING, ROWS), float32),
            *barriers_of(group, own=1, streamed=2 + len(numbers), stages=STAGES),
        ],
        grid=(plan.batch, length // OWN, plan.heads),
        grid_names=("row", "block", "head"),
        **settings_of(group),
    )(*given.values())
