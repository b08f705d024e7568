"""Ring attention as one kernel on each TPU: keys and values are sent while the tile is computed.

The shard is an early and a late half (zigzag). Two slots hold keys and values: the one at hand is
read and sent to the right neighbour's other slot. A slot may be written once its owner says so
(`free`), and is read once it has arrived (`arrived`). All of the shard lies in VMEM.

The backward pass is the one of `ring`. By name only (`impl="rdma"`): it has run in the interpreter,
which found no race with copies as early or as late as they may be, and not on a TPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, dispatch
from pallas_kernels.attention.tile import HIDDEN, LOWEST
from pallas_kernels.ring_attention.ring import Ring, Shard, backward, forward
from pallas_kernels.tile_math import dot, rows_dot_rows

VMEM_BYTES = 12 * 2**20
COLLECTIVE = 7  # the barrier that devices meet at


def unfit(q, k, v, *others, causal: bool, window: int | None) -> str | None:
    """Why the kernel cannot take a call."""
    if not causal or window is not None:
        return "it is causal, without a window"
    if any(other is not None for other in others):
        return "it has no `segment_ids`, `bias`, `cache`, `logit_cap` and `sinks`"
    tile = q.size + 3 * (k.size + v.size) + 2 * q.size
    if 4 * tile > VMEM_BYTES:
        return f"a shard needs {4 * tile >> 20} MiB of VMEM; at most {VMEM_BYTES >> 20} are taken"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_rdma(plan: Ring, shard: Shard) -> tuple[jax.Array, ...]:
    """o_BGRTV of each half of the queries."""
    return _forward(plan, shard)[0]


def _forward(plan: Ring, shard: Shard):
    if not plan.zigzag:  # one device
        return forward(plan, shard)
    q = jnp.stack([piece.q_BGRTK for piece in shard.queries])
    _, batch, groups, share, tokens, size = q.shape
    k = jnp.stack([piece.k_BGJK for piece in shard.keys])
    v = jnp.stack([piece.v_BGJV for piece in shard.keys])
    lanes = (2, batch * groups)
    o, lse = _call(
        plan,
        q.reshape(*lanes, share * tokens, size),
        k.reshape(*lanes, *k.shape[3:]),
        v.reshape(*lanes, *v.shape[3:]),
    )
    kind = q.dtype
    outputs = tuple(x.astype(kind) for x in o.reshape(*q.shape[:5], v.shape[-1]))
    return outputs, (shard, outputs, tuple(lse.reshape(*q.shape[:5], 1)))


ring_rdma.defvjp(_forward, backward)


def _call(plan: Ring, q_PMSK, k_PMCK, v_PMCV) -> tuple[jax.Array, jax.Array]:
    interpreter = dispatch.current_target().interpreter
    size = lax.axis_size(plan.axis_name)
    rows, columns = q_PMSK.shape[:3], v_PMCV.shape[3]
    vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
    return pl.pallas_call(
        partial(_kernel, plan, size),
        in_specs=[vmem] * 3,
        out_specs=[vmem] * 2,
        out_shape=[
            compat.like((*rows, columns), jnp.float32, q_PMSK),
            compat.like((*rows, 1), jnp.float32, q_PMSK),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, *k_PMCK.shape), k_PMCK.dtype),
            pltpu.VMEM((2, *v_PMCV.shape), v_PMCV.dtype),
            pltpu.VMEM((*rows, 1), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2)),
            pltpu.SemaphoreType.DMA((2, 2)),
            pltpu.SemaphoreType.REGULAR,
        ],
        compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE, has_side_effects=True),
        interpret=False if interpreter is None else interpreter,
        name="ring_attention_rdma",
    )(q_PMSK, k_PMCK, v_PMCV)


def _kernel(plan: Ring, size: int, q_ref, k_ref, v_ref, o_ref, lse_ref, *scratch) -> None:
    k_slots, v_slots, total_ref, sent, arrived, free = scratch
    me = lax.axis_index(plan.axis_name)
    right, left = lax.rem(me + 1, size), lax.rem(me + size - 1, size)

    def signal(semaphore: Any, device: jax.Array) -> None:
        pl.semaphore_signal(semaphore, 1, device_id=(device,), device_id_type=pl.DeviceIdType.MESH)

    barrier = pltpu.get_barrier_semaphore()  # no copy before the neighbours are in the kernel
    for device in (left, right):
        signal(barrier, device)
    pl.semaphore_wait(barrier, 2)
    k_slots[0], v_slots[0] = k_ref[...], v_ref[...]
    o_ref[...] = jnp.zeros(o_ref.shape, jnp.float32)
    lse_ref[...] = jnp.full(lse_ref.shape, LOWEST, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    for step in range(size):
        here, there = step % 2, (step + 1) % 2
        copies = []
        if step < size - 1:
            if step > 0:
                pl.semaphore_wait(free, 1)
            for which, slots in enumerate((k_slots, v_slots)):
                copy = pltpu.make_async_remote_copy(
                    src_ref=slots.at[here],
                    dst_ref=slots.at[there],
                    send_sem=sent.at[here, which],
                    recv_sem=arrived.at[there, which],
                    device_id=(right,),
                    device_id_type=pl.DeviceIdType.MESH,
                )
                copy.start()
                copies.append(copy)
        source = lax.rem(me + size - step, size)
        keys = (k_slots.at[here], v_slots.at[here])
        read = partial(_read, plan, q_ref, keys, o_ref, lse_ref, total_ref)
        read(1, 0, diagonal=False)  # late queries see early keys of every device
        for piece, seen in ((0, source < me), (1, source > me)):
            pl.when(seen)(partial(read, piece, piece, diagonal=False))
        if step == 0:
            read(0, 0, diagonal=True)
            read(1, 1, diagonal=True)
        for copy in copies:
            copy.wait()
        if copies and step < size - 2:
            signal(free, left)
    total = total_ref[...]
    o_ref[...] = o_ref[...] / total
    lse_ref[...] = lse_ref[...] + jnp.log(total)


def _read(plan, q_ref, keys, o_ref, most_ref, total_ref, query: int, key: int, *, diagonal: bool):
    """One half of the queries against one half of the keys at hand, lane by lane."""
    k_ref, v_ref = keys
    kind = q_ref.dtype

    def one_lane(lane, carry):
        scores = rows_dot_rows(q_ref[query, lane], k_ref[key, lane], kind) * plan.rule.scale
        if diagonal:
            token = lax.rem(
                lax.broadcasted_iota(jnp.int32, scores.shape, 0), jnp.int32(scores.shape[1])
            )
            seen = token >= lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(seen, scores, HIDDEN)
        before = most_ref[query, lane]
        most = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - most), jnp.exp(before - most)
        most_ref[query, lane] = most
        total_ref[query, lane] = total_ref[query, lane] * fade + jnp.sum(
            weights, axis=1, keepdims=True
        )
        read = dot(weights, v_ref[key, lane], kind)
        o_ref[query, lane] = o_ref[query, lane] * fade + read
        return carry

    lax.fori_loop(0, q_ref.shape[1], one_lane, 0)
