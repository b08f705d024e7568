"""The operations that a traced program executes in products of matrices.

A product of [M, N] and [N, K] takes 2 M N K operations, and a triangular solution half as many. A
product of vectors, or a batch of them, counts nothing, as no other sum does. A loop counts as often
as it turns, a condition for the branch that it takes. What they depend on is evaluated, and nothing
else: inputs whose values decide are given, of the others shapes are enough. So a count needs no
compilation and none of the large arrays.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr

from memjax.programs import called

HIDDEN = ("conv_general_dilated", "pallas_call", "ragged_dot_general", "custom_call")
"""Products that are not counted, so that a program that has them is refused."""

Value = Callable[[], Any]
"""A value that is made when it is called for."""


class Undecided(ValueError):
    """A loop or a condition depends on an input of which only the shape was given."""


def count_products(function: Callable, known: Any, *shapes: Any) -> float:
    """Operations of the products in `function(known, *shapes)`.

    known: a tree of arrays. shapes: trees of arrays or of their shapes.
    Raises Undecided if something else than `known` decides how often a loop turns, ValueError for
    a program with kernels or convolutions, whose operations cannot be seen.
    """
    closed, values = jax.make_jaxpr(function)(known, *shapes), jax.tree.leaves(known)
    return products_of(closed, [*values, *[None] * (len(closed.jaxpr.invars) - len(values))])


def products_of(closed: Any, values: Sequence[Any]) -> float:
    """`count_products` of a traced program, given the values of its inputs, None if not known."""
    needed = [True] * len(closed.jaxpr.outvars)
    program, _ = dce_jaxpr(closed.jaxpr, needed, instantiate=True)
    given = [_undecided if value is None else _known(value) for value in values]
    return _Walk().run(program, _consts(closed), given)[0]


def _known(value: Any) -> Value:
    return lambda: value


def _undecided() -> Any:
    raise Undecided("a loop or a condition depends on an input of which only the shape was given")


def _once(make: Value) -> Value:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


def _parts(make: Value, count: int) -> list[Value]:
    """The values of a list that is made when the first of them is called for."""
    whole = _once(make)

    def part(i: int) -> Value:
        return lambda: whole()[i]

    return [part(i) for i in range(count)]


def _made_by(values: Sequence[Value]) -> list[Value]:
    """What values make that make values."""

    def made(value: Value) -> Value:
        return lambda: value()()

    return [made(value) for value in values]


def _slice(x: Value, i: int) -> Value:
    return _once(lambda: x()[i])


def _stack(values: Sequence[Value]) -> Value:
    return _once(lambda: np.stack([value() for value in values]))


def _consts(closed: Any) -> list[Value]:
    return [_known(const) for const in closed.consts]


class _Walk:
    """Programs read in order. counts: of programs in which nothing is decided; None of others."""

    def __init__(self) -> None:
        self.counts: dict[int, tuple[Any, float | None]] = {}

    def run(self, jaxpr: Any, consts: Sequence[Value], given: Sequence[Value]):
        """The count, and the outputs."""
        values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, given))

        def at(var: Any) -> Value:
            return _known(var.val) if isinstance(var, Literal) else values[var]

        total = 0.0
        for eqn in jaxpr.eqns:
            count, made = self._operation(eqn, [at(var) for var in eqn.invars])
            total += count
            values.update(zip(eqn.outvars, made))
        return total, [at(var) for var in jaxpr.outvars]

    def _closed(self, closed: Any, given: Sequence[Value]) -> tuple[float, list[Value]]:
        return self.run(closed.jaxpr, _consts(closed), given)

    def _alike(self, closed: Any) -> float | None:
        """The count of a program in which nothing is decided, else None."""
        if id(closed) not in self.counts:
            count = None
            with contextlib.suppress(Undecided):
                count = self._closed(closed, [_undecided] * len(closed.jaxpr.invars))[0]
            self.counts[id(closed)] = closed, count  # held, so that no other has its id
        return self.counts[id(closed)][1]

    def _operation(self, eqn: Any, reads: list[Value]) -> tuple[float, list[Value]]:
        name, params = eqn.primitive.name, eqn.params
        if name in HIDDEN:
            raise ValueError(f"the operations of {name} cannot be counted")
        if name == "scan":
            return self._scan(params, reads)
        if name == "while":
            return self._while(params, reads)
        if name == "cond":
            return self._branch(params["branches"], reads)
        inner = called(eqn)
        if inner is not None:
            body, consts = inner
            given = reads[len(reads) - len(body.invars) :]
            return self.run(body, [_known(const) for const in consts], given)

        def make() -> Sequence[Any]:
            out = eqn.primitive.bind(*(read() for read in reads), **params)
            return out if eqn.primitive.multiple_results else [out]

        return _own(eqn), _parts(make, len(eqn.outvars))

    def _scan(self, params: dict, reads: list[Value]) -> tuple[float, list[Value]]:
        closed, turns = params["jaxpr"], range(params["length"])
        if params["reverse"]:
            turns = turns[::-1]
        first = params["num_consts"]
        last = first + params["num_carry"]

        def run() -> tuple[float, list[Value]]:
            carry, total, stacks = reads[first:last], 0.0, {}
            for i in turns:
                slices = [_slice(x, i) for x in reads[last:]]
                count, out = self._closed(closed, [*reads[:first], *carry, *slices])
                total, carry, stacks[i] = total + count, out[: last - first], out[last - first :]
            each = zip(*(stacks[i] for i in sorted(stacks)))
            return total, [*carry, *map(_stack, each)]

        whole = _once(run)
        alike = self._alike(closed)
        total = whole()[0] if alike is None else len(turns) * alike
        made = _parts(lambda: [_once(value) for value in whole()[1]], len(closed.jaxpr.outvars))
        return total, _made_by(made)

    def _while(self, params: dict, reads: list[Value]) -> tuple[float, list[Value]]:
        first = params["cond_nconsts"]
        last = first + params["body_nconsts"]

        def run(body: Any) -> tuple[int, float, list[Value]]:
            turns, total, carry = 0, 0.0, reads[last:]
            while self._closed(params["cond_jaxpr"], [*reads[:first], *carry])[1][0]():
                count, carry = self._closed(body, [*reads[first:last], *carry])
                turns, total = turns + 1, total + count
                carry = [_once(value) for value in carry]
            return turns, total, carry

        whole, alike = _once(lambda: run(params["body_jaxpr"])), self._alike(params["body_jaxpr"])
        if alike is None:
            return whole()[1:]
        made = _parts(lambda: whole()[2], len(params["body_jaxpr"].jaxpr.outvars))
        return run(_counter(params))[0] * alike, _made_by(made)

    def _branch(self, branches: Sequence[Any], reads: list[Value]) -> tuple[float, list[Value]]:
        def run() -> tuple[float, list[Value]]:
            return self._closed(branches[int(reads[0]())], reads[1:])

        counts, whole = {self._alike(one) for one in branches}, _once(run)
        alike = counts.pop()
        if alike is None or counts:
            return whole()
        return alike, _made_by(_parts(lambda: whole()[1], len(branches[0].jaxpr.outvars)))


def _counter(params: dict) -> Any:
    """The body of a loop without what its condition does not read, nor what that is made of."""
    closed, condition = params["body_jaxpr"], params["cond_jaxpr"].jaxpr
    read = {var for eqn in condition.eqns for var in eqn.invars if not isinstance(var, Literal)}
    needed = [var in read for var in condition.invars[params["cond_nconsts"] :]]
    while True:
        used = dce_jaxpr(closed.jaxpr, needed)[1][params["body_nconsts"] :]
        more = [a or b for a, b in zip(needed, used)]
        if more == needed:
            break
        needed = more
    program, _ = dce_jaxpr(closed.jaxpr, needed, instantiate=True)
    kept, carry = iter(program.outvars), program.invars[params["body_nconsts"] :]
    outvars = [next(kept) if one else var for one, var in zip(needed, carry)]
    return closed.replace(jaxpr=program.replace(outvars=outvars))


def _own(eqn: Any) -> float:
    """The operations of a product."""
    if eqn.primitive.name == "dot_general":
        (contract, _), (batch, _) = eqn.params["dimension_numbers"]
        shape, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        if len(result) == len(batch):  # a sum of products of entries, as it could be written too
            return 0.0
        return 2.0 * math.prod(shape[axis] for axis in contract) * math.prod(result)
    if eqn.primitive.name == "triangular_solve":
        return 1.0 * eqn.invars[0].aval.shape[-1] * math.prod(eqn.outvars[0].aval.shape)
    return 0.0
