"""Test-time memories in their dual form, plain JAX: no weights of single tokens are ever formed.

All gradients of a block are taken at the weights W that it starts with. For a weight matrix whose
inputs under the keys are a_j and whose gradients at its outputs are d_j, token j writes the
rank-one matrix a_j d_jT, so the matrix at token t applied to a row x is

    kept_t x W + surprise_t x S - sum_{j <= t} write_tj (x . a_j) d_j

(`Rows` in `learners`). Layer after layer, a query is read with exactly the weights of its token.
Arrays are `[..., H, C, channels]`, with lanes, or blocks and lanes, in front.
Source: arXiv:2501.00663, Sec. 3.2 (Eqs. 16-18); the dual form as arXiv:2407.04620, Sec. 2.5.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.blocks import BlockState, Body, scan_blocks
from pallas_kernels.neural_memory.learners import Rows
from pallas_kernels.neural_memory.rule import Memory, NeuralMemoryState, Rule, Tokens
from pallas_kernels.products import columns_dot_columns, dot, rows_dot_rows


class Prepared(NamedTuple):
    """What of a block does not depend on the memory."""

    tokens: Tokens  # [..., H, C, channels], or [..., H, C]
    rows: Rows


class Writes(NamedTuple):
    """For every weight matrix, the rows that the keys put in and the gradients at its outputs."""

    inputs: tuple[jax.Array, ...]
    gradients: tuple[jax.Array, ...]


def neural_memory_chunked(rule, tokens, weights, constants, initial, state, reset, *, update_every):
    """Same as the reference; see `pallas_kernels.neural_memory` for shapes."""
    replayed = {"q": jnp.zeros_like(tokens["q"], shape=_buffer(tokens["q"], update_every))}
    entering = BlockState(
        Memory(state.weights, state.momenta), {**state.tokens, **replayed}, state.count_B
    )
    o_BTHV, after = scan_blocks(
        body_of(rule), constants, initial, entering, tokens, reset, block=update_every
    )
    kept = {name: x for name, x in after.tokens.items() if name != "q"}
    return o_BTHV, NeuralMemoryState(*after.carry, kept, after.count_B)


def _buffer(x: jax.Array, update_every: int) -> tuple[int, ...]:
    return (x.shape[0], update_every - 1, *x.shape[2:])


@cache
def body_of(rule: Rule) -> Body:
    """The body of `scan_blocks`: the same object for the same rule, because it is compared."""
    return Body(
        step=partial(_step, rule), prepare=partial(_prepare, rule), finish=partial(_finish, rule)
    )


def whole_blocks(rule, constants, memory: Memory, tokens: Tokens, *, update_every: int):
    """The memory after T tokens from the start of a block, and o; T a multiple of update_every."""
    batch, length = tokens["q"].shape[:2]

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, -1, update_every, *x.shape[2:]), 1, 0)

    prepared = _prepare(rule, constants, jax.tree.map(split, tokens), None)

    def one_block(memory, prepared):
        after, writes = _step(rule, constants, memory, prepared)
        return after, (memory, writes)

    memory, (entering, writes) = lax.scan(one_block, memory, prepared)
    o_NBCHV = _finish(rule, constants, entering, prepared, writes)
    return memory, jnp.moveaxis(o_NBCHV, 0, 1).reshape(batch, length, *o_NBCHV.shape[3:])


def read(rule: Rule, constants: dict[str, jax.Array], memory: Memory, q_BTHK: jax.Array):
    """What the memory answers to queries, as it is: o_BTHV."""
    weights = tuple(map(rule.retention.weights, memory.weights))
    q_BHTK = jnp.swapaxes(q_BTHK, 1, 2)
    o_BHTV = rule.structure(lambda i, x: dot(x, weights[i]), constants, q_BHTK)
    return jnp.swapaxes(o_BHTV, 1, 2)


def _prepare(rule: Rule, constants: Any, tokens: Tokens, valid_NBC: Any) -> Prepared:
    del constants, valid_NBC
    by_head = {name: jnp.swapaxes(x, 2, 3) for name, x in tokens.items()}
    rate = by_head["rate"]
    log_keep = by_head.get("log_keep", jnp.zeros_like(rate))
    rows = rule.learner.rows(rate, log_keep, by_head.get("log_momentum"))
    return Prepared(by_head, rows)


def _step(rule: Rule, constants: Any, memory: Memory, prepared: Prepared):
    """One block: the memory behind it, and what it wrote."""
    weights = tuple(map(rule.retention.weights, memory.weights))
    writes = surprises(rule, constants, weights, prepared.tokens)
    rows = prepared.rows
    weights = tuple(
        _last(rows.kept_BHC) * w - _sum_of_writes(rows.write_BHCC, *write)
        for w, *write in zip(memory.weights, *writes)
    )
    if rows.push_BHCC is None:
        return Memory(weights, ()), writes
    weights = tuple(w + _last(rows.surprise_BHC) * s for w, s in zip(weights, memory.momenta))
    momenta = tuple(
        _last(rows.passed_BHC) * s - _sum_of_writes(rows.push_BHCC, *write)
        for s, *write in zip(memory.momenta, *writes)
    )
    return Memory(weights, momenta), writes


def surprises(rule: Rule, constants: Any, weights: tuple[jax.Array, ...], tokens: Tokens) -> Writes:
    """Inputs and output gradients of every matrix for every token, all at the same weights."""
    keys = tokens["k"]

    def answer(nudges):
        inputs: dict[int, jax.Array] = {}

        def linear(i: int, x: jax.Array) -> jax.Array:
            inputs[i] = x
            return dot(x, weights[i]) + nudges[i]

        y = rule.structure(linear, constants, keys)
        return y, tuple(inputs[i] for i in range(len(weights)))

    nudges = tuple(jnp.zeros((*keys.shape[:-1], w.shape[-1]), keys.dtype) for w in weights)
    answers, pull, inputs = jax.vjp(answer, nudges, has_aux=True)
    threshold = tokens["threshold"][..., None] if rule.bias.needs_threshold else None
    (gradients,) = pull(rule.bias.gradient(answers, tokens["v"], threshold))
    return Writes(inputs, gradients)


def _finish(rule: Rule, constants: Any, memory: Memory, prepared: Prepared, writes: Writes):
    """What the memory answers to the query of every token, that token written."""
    rows = prepared.rows
    weights = tuple(map(rule.retention.weights, memory.weights))

    def linear(i: int, x: jax.Array) -> jax.Array:
        y = dot(rows.kept_BHC[..., None] * x, weights[i])
        if rows.surprise_BHC is not None:
            y += dot(rows.surprise_BHC[..., None] * x, memory.momenta[i])
        return y - dot(rows.write_BHCC * rows_dot_rows(x, writes.inputs[i]), writes.gradients[i])

    return jnp.swapaxes(rule.structure(linear, constants, prepared.tokens["q"]), -3, -2)


def _last(x_BHC: jax.Array | None) -> jax.Array:
    assert x_BHC is not None
    return x_BHC[..., -1, None, None]


def _sum_of_writes(weight_BHCC: jax.Array, inputs: jax.Array, gradients: jax.Array) -> jax.Array:
    return columns_dot_columns(weight_BHCC[..., -1, :, None] * inputs, gradients)
