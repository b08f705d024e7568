"""Test-time memories in blocks, plain JAX: the dual form on all lanes and heads at once.

Arrays are `[..., H, C, channels]`, with lanes, or blocks and lanes, in front.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BlockState, Body, Round, scan_blocks
from pallas_kernels.neural_memory import dual
from pallas_kernels.neural_memory.dual import Prepared
from pallas_kernels.neural_memory.learners import products_between
from pallas_kernels.neural_memory.rule import Memory, NeuralMemoryState, Rule, Tokens
from pallas_kernels.products import PLAIN, dot


def neural_memory_chunked(rule, tokens, weights, constants, initial, state, reset, *, update_every):
    """Same as the reference; see `pallas_kernels.neural_memory` for shapes."""
    body, constants = body_of(rule), dual.constant_rows(constants)
    return run_blocks(body, tokens, constants, initial, state, reset, update_every=update_every)


def run_blocks(
    body: Round, tokens, constants, initial, state: NeuralMemoryState, reset, *, update_every: int
):
    """o and the next state, by a body that gets its queries among the other streams."""
    q = tokens["q"]
    replayed = {"q": jnp.zeros_like(q, shape=(q.shape[0], update_every - 1, *q.shape[2:]))}
    entering = BlockState(
        Memory(state.weights, state.momenta), {**state.tokens, **replayed}, state.count_B
    )
    o_BTHV, after = scan_blocks(
        body, constants, initial, entering, tokens, reset, block=update_every
    )
    memory = after.carry
    kept = {name: x for name, x in after.tokens.items() if name != "q"}
    return o_BTHV, NeuralMemoryState(memory.weights, memory.momenta, kept, after.count_B)


@cache
def body_of(rule: Rule) -> Body:
    """The body of `scan_blocks`: the same object for the same rule, because it is compared."""
    return Body(
        step=partial(dual.step, PLAIN, rule),
        prepare=partial(_prepare, rule),
        finish=partial(_finish, rule),
    )


def whole_blocks(rule, constants, memory: Memory, tokens: Tokens, *, update_every: int):
    """The memory after T tokens from the start of a block, and o; T a multiple of update_every."""
    batch, length = tokens["q"].shape[:2]
    constants = dual.constant_rows(constants)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, -1, update_every, *x.shape[2:]), 1, 0)

    prepared = _prepare(rule, constants, jax.tree.map(split, tokens), None)

    def one_block(memory, prepared):
        after, writes = dual.step(PLAIN, rule, constants, memory, prepared)
        return after, (memory, writes)

    memory, (entering, writes) = lax.scan(one_block, memory, prepared)
    o_NBCHV = _finish(rule, constants, entering, prepared, writes)
    return memory, jnp.moveaxis(o_NBCHV, 0, 1).reshape(batch, length, *o_NBCHV.shape[3:])


def read(rule: Rule, constants: dict[str, jax.Array], memory: Memory, q_BTHK: jax.Array):
    """What the memory answers to queries, as it is: o_BTHV."""
    weights = tuple(map(rule.retention.weights, memory.weights))
    q_BHTK, constants = jnp.swapaxes(q_BTHK, 1, 2), dual.constant_rows(constants)
    o_BHTV = rule.structure(lambda i, x: dot(x, weights[i]), constants, q_BHTK)
    return jnp.swapaxes(o_BHTV, 1, 2)


def _prepare(rule: Rule, constants: Any, tokens: Tokens, valid_NBC: Any) -> Prepared:
    del constants, valid_NBC
    by_head = {name: jnp.swapaxes(x, 2, 3) for name, x in tokens.items()}
    rate_BHC = by_head["rate"]
    keep = products_between(by_head.get("log_keep", jnp.zeros_like(rate_BHC)))
    momentum = None
    if "log_momentum" in by_head:
        momentum = products_between(by_head["log_momentum"])
    rows = rule.learner.rows(PLAIN, rate_BHC[..., None, :], keep, momentum)
    if "threshold" in by_head:
        by_head["threshold"] = by_head["threshold"][..., None]
    return Prepared(by_head, rows)


def _finish(rule: Rule, constants: Any, memory: Memory, prepared: Prepared, writes: dual.Writes):
    return jnp.swapaxes(dual.finish(PLAIN, rule, constants, memory, prepared, writes), -3, -2)
