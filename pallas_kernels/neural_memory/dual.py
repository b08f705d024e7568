"""Test-time memories in their dual form: no weights of single tokens are ever formed.

All gradients of a block are taken at the weights W that it starts with. For a weight matrix whose
inputs under the keys are a_j and whose gradients at its outputs are d_j, token j writes the
rank-one matrix a_j d_jT, so the matrix at token t applied to a row x is

    kept_t x W + surprise_t x S - sum_{j <= t} write_tj (x . a_j) d_j

(`Rows` in `learners`). Layer after layer, a query is read with exactly the weights of its token.

Everything is a matrix of the last two axes, so that the same lines run on all heads at once and on
one inside a kernel: constants are rows `[..., 1, V]`, numbers of tokens columns `[..., C, 1]`, and
products are those of a `Maths`.
Source: arXiv:2501.00663, Sec. 3.2 (Eqs. 16-18); the dual form as arXiv:2407.04620, Sec. 2.5.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.neural_memory.learners import Rows
from pallas_kernels.neural_memory.rule import Memory, Rule, Tokens
from pallas_kernels.products import Maths, last_row


class Prepared(NamedTuple):
    """What of a block does not depend on the memory: q, k, v `[..., C, channels]`, a threshold."""

    tokens: Tokens
    rows: Rows


class Writes(NamedTuple):
    """For every weight matrix, the rows that the keys put in and the gradients at its outputs."""

    inputs: tuple[jax.Array, ...]
    gradients: tuple[jax.Array, ...]


def step(maths: Maths, rule: Rule, constants: Any, memory: Memory, prepared: Prepared):
    """One block: the memory behind it, and what it wrote."""
    weights = tuple(map(rule.retention.weights, memory.weights))
    writes = surprises(maths, rule, constants, weights, prepared.tokens)
    rows = prepared.rows

    def sum_of_writes(factor_CC: jax.Array, inputs: jax.Array, gradients: jax.Array) -> jax.Array:
        last_C1 = maths.as_column(last_row(factor_CC))
        return maths.columns_dot_columns(last_C1 * inputs, gradients)

    weights = tuple(
        last_row(rows.kept_C1) * w - sum_of_writes(rows.write_CC, *write)
        for w, *write in zip(memory.weights, *writes)
    )
    if rows.surprise_C1 is None or rows.passed_C1 is None or rows.push_CC is None:
        return Memory(weights, ()), writes
    surprise_11, passed_11 = last_row(rows.surprise_C1), last_row(rows.passed_C1)
    weights = tuple(w + surprise_11 * s for w, s in zip(weights, memory.momenta))
    momenta = tuple(
        passed_11 * s - sum_of_writes(rows.push_CC, *write)
        for s, *write in zip(memory.momenta, *writes)
    )
    return Memory(weights, momenta), writes


def surprises(
    maths: Maths, rule: Rule, constants: Any, weights: tuple[jax.Array, ...], tokens: Tokens
) -> Writes:
    """Inputs and output gradients of every matrix for every token, all at the same weights."""
    keys = tokens["k"]

    def answer(nudges):
        inputs: dict[int, jax.Array] = {}

        def linear(i: int, x: jax.Array) -> jax.Array:
            inputs[i] = x
            return maths.dot(x, weights[i]) + nudges[i]

        y = rule.structure(linear, constants, keys)
        return y, tuple(inputs[i] for i in range(len(weights)))

    nudges = tuple(jnp.zeros((*keys.shape[:-1], w.shape[-1]), keys.dtype) for w in weights)
    answers, pull, inputs = jax.vjp(answer, nudges, has_aux=True)
    (gradients,) = pull(rule.bias.gradient(answers, tokens["v"], tokens.get("threshold")))
    return Writes(inputs, gradients)


def finish(maths: Maths, rule: Rule, constants: Any, memory: Memory, prepared: Prepared, writes):
    """What the memory answers to the query of every token, that token written."""
    rows = prepared.rows
    weights = tuple(map(rule.retention.weights, memory.weights))

    def linear(i: int, x: jax.Array) -> jax.Array:
        y = maths.dot(rows.kept_C1 * x, weights[i])
        if rows.surprise_C1 is not None:
            y += maths.dot(rows.surprise_C1 * x, memory.momenta[i])
        scores_CC = rows.write_CC * maths.rows_dot_rows(x, writes.inputs[i])
        return y - maths.dot(scores_CC, writes.gradients[i])

    return rule.structure(linear, constants, prepared.tokens["q"])


def constant_rows(constants: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Constants `[H, V]` as rows `[H, 1, V]`."""
    return {name: x[:, None] for name, x in constants.items()}
