"""The gradients of attention on a Hopper GPU: a kernel for d q, and one for d k and d v.

    p = e^{s - lse};  d p = d o vT - o . d o;  d s = p d p;  d l = cap' d s
    d q = scale d l k;  d k = scale d lT q;  d v = pT d o;  d slope = -sum d s distance

As in the forward pass two warpgroups compute and one copies. Each of the two owns 64 queries and
goes through the keys they see, or owns 64 keys and goes through the queries, of every head that
reads them, that see those: there its tiles of scores have a row a key, so that d k and d v are
products with weights from registers. The products that add to a gradient are waited for with the
scores of the next step, which follow them without a gap. Source: arXiv:2307.08691.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.attention.gpu_blocks import (
    COMPUTING,
    OWN,
    ROWS,
    STEP,
    Arrays,
    Plan,
    reach,
    turned,
    walk_of,
)
from pallas_kernels.attention.gpu_tile import (
    LOG2_E,
    MANY,
    Side,
    Stream,
    across,
    along,
    feed,
    own_barriers,
    scores_of,
    settings_of,
    stream_barriers,
)
from pallas_kernels.warpgroup_gpu import Warpgroup

STAGES = 3


def query_gradients(
    plan: Plan,
    arrays: Arrays,
    d_o_BTF: jax.Array,
    lse_NT: jax.Array,
    dot_NT: jax.Array,
    slopes_H: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """d q `[B, L, H K]`, bfloat16, and of each query d slope `[B H, L]`, float32, with slopes."""
    group = Warpgroup(plan.interpreter)
    pl, plgpu = group.pl, group.gpu
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    length = arrays.q_BTF.shape[1]
    key_size, value_size = plan.key_size, plan.value_size
    given = _inputs(plan, arrays, d_o_BTF, lse_NT, dot_NT, slopes_H, of_keys=False)
    numbers = [name for name in ("key_position", "key_segment") if name in given]
    sloped = slopes_H is not None

    def kernel(*refs):
        hbm, refs = dict(zip(given, refs)), refs[len(given) :]
        d_q_hbm, d_slope_hbm = refs[0], refs[1] if sloped else None
        q_tile, d_o_tile, k_tile, v_tile, *tiles = refs[1 + sloped : -3]
        d_slope_tile = tiles.pop() if sloped else None
        own_loaded, loaded, consumed = refs[-3:]
        number_tiles = dict(zip(numbers, tiles, strict=True))
        row, head, who = (lax.axis_index(x) for x in ("row", "head", "warpgroup"))
        block = turned(lax.axis_index("block"), length // OWN, plan.rule)
        walk = walk_of(hbm["reach"], row, block)
        key_head, lane = lax.div(head, jnp.int32(plan.share)), row * plan.heads + head

        def load(step, slot):
            keys = pl.ds(walk.any_block(step) * STEP, STEP)
            for name, tile, size in (("k", k_tile, key_size), ("v", v_tile, value_size)):
                source = hbm[name].at[row, keys, pl.ds(key_head * size, size)]
                plgpu.copy_gmem_to_smem(source, tile.at[slot], loaded.at[slot])
            for name, tile in number_tiles.items():
                plgpu.copy_gmem_to_smem(hbm[name].at[row, keys], tile.at[slot], loaded.at[slot])

        def compute():
            plgpu.set_max_registers(MANY, action="increase")
            start = block * OWN + who * ROWS
            own = pl.ds(start, ROWS)
            q, d_o = q_tile.at[who], d_o_tile.at[who]
            for name, tile, size in (("q", q, key_size), ("d_o", d_o, value_size)):
                source = hbm[name].at[row, own, pl.ds(head * size, size)]
                plgpu.copy_gmem_to_smem(source, tile, own_loaded.at[who])

            def of_queries(name, at):
                return (
                    group.read(hbm[name].at[at, own], layout=group.by_row) if name in hbm else None
                )

            lse, less = of_queries("lse", lane), of_queries("less", lane)
            position, segment = (of_queries(f"query_{x}", row) for x in ("position", "segment"))
            queries = Side(position, segment)
            slope = hbm["slope"][head] if sloped else None
            plgpu.barrier_wait(own_loaded.at[who])

            def one_block(step, sums, d_slope, *, masked):
                count = step + walk.full if masked else step
                slot = lax.rem(count, jnp.int32(STAGES))
                plgpu.barrier_wait(loaded.at[slot])
                k, v = k_tile.at[slot], v_tile.at[slot]
                shape = (ROWS, STEP)
                products, d_p = group.products(
                    (q, (k,)), (d_o, (v,)), add=(group.zeros(*shape), along(less, shape))
                )
                _leave(group, consumed, count)
                keys = _side(group, "key", number_tiles, slot, masked, sloped)
                tile = scores_of(plan, products, queries, keys, slope, masked=masked)
                d_s = jnp.exp2(tile.scores * tile.factor - along(lse, shape)) * d_p
                if d_slope is not None:
                    d_slope = d_slope - jnp.sum(d_s * tile.distance.astype(float32), axis=1)
                d_l = d_s if tile.steepness is None else d_s * tile.steepness
                group.add_to(sums[0], d_l.astype(bfloat16), k)
                return d_slope

            d_slope = group.full(0.0, ROWS, layout=group.by_row) if sloped else None
            loops = _loops(walk.full, walk.masked, one_block)
            (d_q,), d_slope = group.accumulate([(ROWS, key_size)], loops, d_slope)
            _leave(group, consumed, walk.full + walk.masked)
            plgpu.commit_smem()
            q_tile[who] = (d_q * plan.rule.scale).astype(bfloat16)
            if d_slope_tile is not None:
                d_slope_tile[who] = d_slope
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, d_q_hbm.at[row, own, pl.ds(head * key_size, key_size)])
            if d_slope_tile is not None:
                plgpu.copy_smem_to_gmem(d_slope_tile.at[who], d_slope_hbm.at[lane, own])
            plgpu.wait_smem_to_gmem(0)

        pl.when(who < COMPUTING)(compute)
        copying = who == COMPUTING
        pl.when(copying)(
            lambda: feed(group, walk.full + walk.masked, STAGES, Stream(loaded, consumed, load))
        )

    out_type = [compat.like(arrays.q_BTF.shape, bfloat16, arrays.q_BTF)]
    if sloped:
        out_type.append(compat.like(lse_NT.shape, float32, arrays.q_BTF))
    out = plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        scratch_types=[
            group.tile(COMPUTING, ROWS, key_size),
            group.tile(COMPUTING, ROWS, value_size),
            group.tile(STAGES, STEP, key_size),
            group.tile(STAGES, STEP, value_size),
            *[plgpu.SMEM((STAGES, STEP), jnp.int32)] * len(numbers),
            *([plgpu.SMEM((COMPUTING, ROWS), float32)] if sloped else []),
            own_barriers(group, 2),
            *stream_barriers(group, 2 + len(numbers), STAGES),
        ],
        grid=(plan.batch, plan.heads, length // OWN),
        grid_names=("row", "head", "block"),
        **settings_of(group),
    )(*given.values())
    return out[0], out[1] if sloped else None


def key_gradients(
    plan: Plan,
    arrays: Arrays,
    d_o_BTF: jax.Array,
    lse_NT: jax.Array,
    dot_NT: jax.Array,
    slopes_H: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """d k `[B, L, G K]` and d v `[B, L, G V]`, bfloat16."""
    group = Warpgroup(plan.interpreter)
    pl, plgpu = group.pl, group.gpu
    bfloat16, float32 = jnp.bfloat16, jnp.float32
    length = arrays.k_BJF.shape[1]
    key_size, value_size = plan.key_size, plan.value_size
    given = _inputs(plan, arrays, d_o_BTF, lse_NT, dot_NT, slopes_H, of_keys=True)
    sloped = slopes_H is not None
    numbers = {"lse": float32, "less": float32}
    numbers |= {x: jnp.int32 for x in ("query_position", "query_segment") if x in given}

    def kernel(*refs):
        hbm, refs = dict(zip(given, refs)), refs[len(given) :]
        d_k_hbm, d_v_hbm, k_tile, v_tile, q_tile, d_o_tile, *tiles = refs[:-3]
        own_loaded, loaded, consumed = refs[-3:]
        number_tiles = dict(zip(numbers, tiles, strict=True))
        row, key_head, who = (lax.axis_index(x) for x in ("row", "head", "warpgroup"))
        block = lax.axis_index("block")

        def head_of(step):
            """Each block is taken for all heads in turn."""
            return key_head * plan.share + lax.rem(step, jnp.int32(plan.share))

        def load(walk, step, slot):
            head = head_of(step)
            queries = pl.ds(walk.any_block(lax.div(step, jnp.int32(plan.share))) * STEP, STEP)
            lane = row * plan.heads + head
            for name, tile, size in (("q", q_tile, key_size), ("d_o", d_o_tile, value_size)):
                source = hbm[name].at[row, queries, pl.ds(head * size, size)]
                plgpu.copy_gmem_to_smem(source, tile.at[slot], loaded.at[slot])
            for name, tile in number_tiles.items():
                at = lane if name in ("lse", "less") else row
                plgpu.copy_gmem_to_smem(hbm[name].at[at, queries], tile.at[slot], loaded.at[slot])

        def compute():
            plgpu.set_max_registers(MANY, action="increase")
            # Each warpgroup reads the table: less to keep in registers.
            walk = walk_of(hbm["reach"], row, block)
            full = walk.full * plan.share
            start = block * OWN + who * ROWS
            own = pl.ds(start, ROWS)
            k, v = k_tile.at[who], v_tile.at[who]
            at = [(row, own, pl.ds(key_head * n, n)) for n in (key_size, value_size)]
            plgpu.copy_gmem_to_smem(hbm["k"].at[at[0]], k, own_loaded.at[who])
            plgpu.copy_gmem_to_smem(hbm["v"].at[at[1]], v, own_loaded.at[who])

            def of_keys(name):
                return (
                    group.read(hbm[name].at[row, own], layout=group.by_row) if name in hbm else None
                )

            keys = Side(of_keys("key_position"), of_keys("key_segment"))
            plgpu.barrier_wait(own_loaded.at[who])

            def one_block(step, sums, state, *, masked):
                d_v, d_k = sums
                count = step + full if masked else step
                slot = lax.rem(count, jnp.int32(STAGES))
                slope = hbm["slope"][head_of(step)] if sloped else None
                plgpu.barrier_wait(loaded.at[slot])
                q, d_o = q_tile.at[slot], d_o_tile.at[slot]
                (products,) = group.products((k, (q,)))
                _leave(group, consumed, count)

                def of_queries(name):
                    numbers = group.read(number_tiles[name], slot, layout=group.by_column)
                    return across(numbers, products.shape)

                queries = _side(group, "query", number_tiles, slot, masked, sloped)
                tile = scores_of(plan, products, queries, keys, slope, masked=masked, by_key=True)
                p = jnp.exp2(tile.scores * tile.factor - of_queries("lse"))
                group.add_to(d_v, p.astype(bfloat16), d_o)
                p = p if tile.steepness is None else p * tile.steepness
                (d_p,) = group.products((v, (d_o,)), add=(of_queries("less"),))
                group.add_to(d_k, (p * d_p).astype(bfloat16), q)
                return state

            steps = walk.masked * plan.share
            sizes = [(ROWS, value_size), (ROWS, key_size)]
            (d_v, d_k), _ = group.accumulate(sizes, _loops(full, steps, one_block), ())
            _leave(group, consumed, full + steps)
            plgpu.commit_smem()
            v_tile[who] = d_v.astype(bfloat16)
            k_tile[who] = (d_k * plan.rule.scale).astype(bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, d_k_hbm.at[at[0]])
            plgpu.copy_smem_to_gmem(v, d_v_hbm.at[at[1]])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            walk = walk_of(hbm["reach"], row, block)
            steps = (walk.full + walk.masked) * plan.share
            feed(group, steps, STAGES, Stream(loaded, consumed, partial(load, walk)))

        pl.when(who < COMPUTING)(compute)
        pl.when(who == COMPUTING)(copy)

    return plgpu.kernel(
        kernel,
        out_type=tuple(compat.like(x.shape, bfloat16, x) for x in (arrays.k_BJF, arrays.v_BJF)),
        scratch_types=[
            group.tile(COMPUTING, ROWS, key_size),
            group.tile(COMPUTING, ROWS, value_size),
            group.tile(STAGES, STEP, key_size),
            group.tile(STAGES, STEP, value_size),
            *(plgpu.SMEM((STAGES, STEP), kind) for kind in numbers.values()),
            own_barriers(group, 2),
            *stream_barriers(group, 2 + len(numbers), STAGES),
        ],
        grid=(plan.batch, plan.groups, length // OWN),
        grid_names=("row", "head", "block"),
        **settings_of(group),
    )(*given.values())


def _inputs(plan, arrays, d_o_BTF, lse_NT, dot_NT, slopes_H, *, of_keys) -> dict[str, jax.Array]:
    sizes = (STEP, OWN) if of_keys else (OWN, STEP)
    query, key = arrays.queries, arrays.keys
    inputs = {
        "reach": reach(plan.rule, arrays, *sizes, of_keys=of_keys),
        "q": arrays.q_BTF,
        "k": arrays.k_BJF,
        "v": arrays.v_BJF,
        "d_o": d_o_BTF,
        # In the units and with the sign of their use, once and not in every step.
        "lse": lse_NT * LOG2_E,
        "less": -dot_NT,
        "query_position": query.position_BT if plan.placed else None,
        "query_segment": query.segment_BT,
        "key_position": key.position_BT if plan.placed else None,
        "key_segment": key.segment_BT,
        "slope": slopes_H,
    }
    return {name: x for name, x in inputs.items() if x is not None}


def _side(
    group: Warpgroup, what: str, tiles: dict[str, Any], slot: Any, masked: bool, sloped: bool
) -> Side:
    """The side that is gone through, in the slot of a step."""

    def numbers(name, needed):
        if not needed or name not in tiles:
            return None
        return group.read(tiles[name], slot, layout=group.by_column)

    return Side(numbers(f"{what}_position", masked or sloped), numbers(f"{what}_segment", masked))


def _leave(group: Warpgroup, consumed: Any, count: jax.Array) -> None:
    """Leave the slot of the step before `count`, whose products have ended."""
    before = lax.rem(count + jnp.int32(STAGES - 1), jnp.int32(STAGES))
    group.pl.when(count > 0)(lambda: group.gpu.barrier_arrive(consumed.at[before]))


def _loops(full: jax.Array, masked: jax.Array, one_block: Callable[..., Any]) -> list[Any]:
    """Blocks seen in full, then those that need a mask."""
    return [(full, partial(one_block, masked=False)), (masked, partial(one_block, masked=True))]
