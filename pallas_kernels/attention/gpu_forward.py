"""The forward pass of attention on a Hopper GPU: a running softmax over blocks of keys.

    m' = max(m, rowmax s);  p = e^{s - m'};  l' = e^{m - m'} l + rowsum p;  o' = e^{m - m'} o + p V

A block of threads has three warpgroups: two compute, each for 64 queries of a head, with o in
registers; the third copies keys, values and their numbers, STAGES blocks ahead. The two that
compute take turns: while one makes its weights, the other has its products. A sink is a key seen
before all others, whose value is 0: m begins as the sink and l as 1.
Source: arXiv:2307.08691; warpgroups that copy, that compute, and their turns arXiv:2407.08608.
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
    Stream,
    along,
    feed,
    own_barriers,
    scores_of,
    settings_of,
    stream_barriers,
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
    shared = key_size == value_size  # o is left where q was

    def kernel(*refs):
        hbm = dict(zip(given, refs))
        o_hbm, lse_hbm, q_tile, k_tile, v_tile, *tiles, lse_tile = refs[len(given) : -6]
        o_tile = q_tile if shared else tiles.pop()
        q_loaded, k_loaded, k_consumed, v_loaded, v_consumed, turn = refs[-6:]
        number_tiles = dict(zip(numbers, tiles, strict=True))
        row, head, who = (lax.axis_index(x) for x in ("row", "head", "warpgroup"))
        block = turned(lax.axis_index("block"), length // OWN, plan.rule)
        walk = walk_of(hbm["reach"], row, block)
        key_head = lax.div(head, jnp.int32(plan.share))

        def load_keys(step, slot):
            keys = pl.ds(walk.any_block(step) * KEYS, KEYS)
            source = hbm["k"].at[row, keys, pl.ds(key_head * key_size, key_size)]
            plgpu.copy_gmem_to_smem(source, k_tile.at[slot], k_loaded.at[slot])
            for name, tile in number_tiles.items():
                plgpu.copy_gmem_to_smem(hbm[name].at[row, keys], tile.at[slot], k_loaded.at[slot])

        def load_values(step, slot):
            keys = pl.ds(walk.any_block(step) * KEYS, KEYS)
            source = hbm["v"].at[row, keys, pl.ds(key_head * value_size, value_size)]
            plgpu.copy_gmem_to_smem(source, v_tile.at[slot], v_loaded.at[slot])

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

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
                plgpu.barrier_wait(k_loaded.at[slot])
                (products,) = group.products((q, (k_tile.at[slot],)), meanwhile=take_turns)

                def of_keys(name):
                    if name not in number_tiles:
                        return None
                    return group.read(number_tiles[name], slot, layout=group.by_column)

                position = of_keys("key_position") if masked or slope is not None else None
                keys = Side(position, of_keys("key_segment") if masked else None)
                plgpu.barrier_arrive(k_consumed.at[slot])
                tile = scores_of(plan, products, queries, keys, slope, masked=masked)
                s, factor = tile.scores, tile.factor
                more = jnp.maximum(most, jnp.max(s, axis=1) * factor)
                p = jnp.exp2(s * factor - along(more, s.shape))
                fade = jnp.exp2(most - more)
                total = total * fade + jnp.sum(p, axis=1)
                o = o * along(fade, o.shape)
                # All of this before the other one's turn to do the same.
                weights, o, more, total = lax.optimization_barrier(
                    (p.astype(bfloat16), o, more, total)
                )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_loaded.at[slot])
                plgpu.barrier_wait(turn)
                (o,) = group.products((weights, v_tile.at[slot]), add=(o,))
                plgpu.barrier_arrive(v_consumed.at[slot])
                return o, more, total

            most = group.full(LOWEST, ROWS, layout=group.by_row)
            total = group.full(0.0, ROWS, layout=group.by_row)
            if "sink" in hbm:
                most, total = most * 0.0 + hbm["sink"][head] * LOG2_E, total + 1.0
            state = (group.zeros(ROWS, value_size), most, total)
            pl.when(who == 1)(take_turns)
            state = lax.fori_loop(0, walk.full, lambda n, x: one_block(n, x, masked=False), state)
            o, most, total = lax.fori_loop(
                0, walk.masked, lambda n, x: one_block(n, x, masked=True), state
            )
            pl.when(who == 0)(take_turns)
            total = jnp.where(total > 0.0, total, 1.0)
            o_tile[who] = (o / along(total, o.shape)).astype(bfloat16)
            lse_tile[who] = most * LN_2 + jnp.log(total)
            plgpu.commit_smem()
            width = pl.ds(head * value_size, value_size)
            plgpu.copy_smem_to_gmem(o_tile.at[who], o_hbm.at[row, own, width])
            plgpu.copy_smem_to_gmem(lse_tile.at[who], lse_hbm.at[row * plan.heads + head, own])
            plgpu.wait_smem_to_gmem(0)

        streams = (
            Stream(k_loaded, k_consumed, load_keys),
            Stream(v_loaded, v_consumed, load_values),
        )
        pl.when(who < COMPUTING)(compute)
        copying = who == COMPUTING
        pl.when(copying)(lambda: feed(group, walk.full + walk.masked, STAGES, *streams))

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
            *([] if shared else [group.tile(COMPUTING, ROWS, value_size)]),
            plgpu.SMEM((COMPUTING, ROWS), float32),
            own_barriers(group, 1),
            *stream_barriers(group, 1 + len(numbers), STAGES),
            *stream_barriers(group, 1, STAGES),
            plgpu.Barrier(num_arrivals=COMPUTING),
        ],
        grid=(plan.batch, plan.heads, length // OWN),
        grid_names=("row", "head", "block"),
        **settings_of(group),
    )(*given.values())
