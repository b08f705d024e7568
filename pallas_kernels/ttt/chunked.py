"""Test-time training in blocks, plain JAX: the dual form on all lanes and heads at once.

What does not wait for the previous block is computed for all blocks of a round at once.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BlockState, Body, scan_blocks
from pallas_kernels.products import PLAIN, accumulation_dtype
from pallas_kernels.ttt import dual


def _prepare(consts, xs, valid_NBC):
    place_rate_C1, norm = consts
    (k, v, rate), q = xs
    dtype = norm.scale_HK.dtype
    q, k, v, rate = (jnp.swapaxes(x.astype(dtype), 2, 3) for x in (q, k, v, rate[..., None]))
    return dual.prepare(PLAIN, place_rate_C1, jnp.swapaxes(rate, -1, -2), q, k, v)


def _step(step, consts, carry, prepared):
    memory, kept = step(PLAIN, consts[1], dual.with_rows(carry), prepared)
    return dual.without_rows(memory), kept


def _finish(finish, consts, carry, prepared, kept):
    o_NBHCK = finish(PLAIN, consts[1], dual.with_rows(carry), prepared, kept)
    return jnp.swapaxes(o_NBHCK, 2, 3)


LINEAR = Body(partial(_step, dual.step_linear), _prepare, partial(_finish, dual.finish_linear))
MLP = Body(partial(_step, dual.step_mlp), _prepare, partial(_finish, dual.finish_mlp))


def ttt_chunked(body: Body, q, k, v, rate, place_rate, memory, norm, state: BlockState, reset):
    """Same as the reference; see `pallas_kernels.ttt` for shapes."""
    dtype = accumulation_dtype(q, k, v)
    consts = (place_rate[:, None], jax.tree.map(lambda x: x[..., None, :], norm))
    consts = jax.tree.map(lambda x: x.astype(dtype), consts)
    block = len(place_rate)
    o, state = scan_blocks(body, consts, memory, state, (k, v, rate), reset, block=block, queries=q)
    return o.astype(q.dtype), state
