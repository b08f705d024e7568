"""Over how many devices each axis of the arrays of a traced program is split, as compilers find it.

Inputs, constraints and the results of `jax.shard_map` say it; what is made of them follows: along
an axis that both have, an array is split as what it is made of. Within `jax.shard_map` arrays are
parts already. It goes forward alone: zeros that a loop begins with are split as what becomes of
them, other constants not at all.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

from memjax.programs import called

Split = tuple[int, ...]
"""Parts along each axis."""

REDUCTIONS = {"argmax", "argmin"}


def split_of(value: Any) -> Split:
    """How an array with a sharding, or its shape and sharding, is split."""
    shard = value.sharding.shard_shape(value.shape)
    return tuple(whole // max(1, part) for whole, part in zip(value.shape, shard))


@functools.lru_cache(maxsize=1024)
def through(jaxpr: Any, given: tuple[Split, ...]) -> tuple[Split, ...]:
    """How the outputs of a program are split, given its inputs."""
    splits = dict(zip(jaxpr.invars, given))

    def at(var: Any) -> Split:
        return _whole(var) if isinstance(var, Literal) else splits.get(var, _whole(var))

    for eqn in jaxpr.eqns:
        splits.update(zip(eqn.outvars, follow(eqn, [at(var) for var in eqn.invars])))
    return tuple(at(var) for var in jaxpr.outvars)


def _whole(var: Any) -> Split:
    return (1,) * len(getattr(var.aval, "shape", ()))


def follow(eqn: Any, given: Sequence[Split]) -> list[Split]:
    """How the results of an operation are split, given what it reads."""
    name, params = eqn.primitive.name, eqn.params
    if name == "sharding_constraint":
        return [_constrained(eqn, given[0])]
    if name == "shard_map":
        return parts_of(eqn)[1]
    if name == "scan":
        return _scan(params, given)
    if name == "while":
        first = params["cond_nconsts"]
        body, fixed = params["body_jaxpr"].jaxpr, params["body_nconsts"]
        return _loop(body, given[first : first + fixed], given[first + fixed :], ())[0]
    if name == "cond":
        outs = [through(one.jaxpr, tuple(given[1:])) for one in params["branches"]]
        return [_most(each) for each in zip(*outs)]
    inner = called(eqn)
    if inner is not None:
        first = len(given) - len(inner[0].invars)
        return list(through(inner[0], tuple(given[first:])))
    return [_of_one(eqn, given, var) for var in eqn.outvars]


def parts_of(eqn: Any) -> tuple[list[Split], list[Split]]:
    """How `jax.shard_map` splits what it is given, and what it makes."""
    both = (eqn.params["in_specs"], eqn.invars), (eqn.params["out_specs"], eqn.outvars)
    mesh = eqn.params["mesh"]
    taken, made = (
        [_of_spec(spec, mesh, len(var.aval.shape)) for spec, var in zip(specs, found)]
        for specs, found in both
    )
    return taken, made


def _constrained(eqn: Any, before: Split) -> Split:
    sharding, ndim = eqn.params["sharding"], len(before)
    free = eqn.params.get("unconstrained_dims", ())
    after = _of_spec(sharding.spec, sharding.mesh, ndim)
    return tuple(before[i] if i in free else after[i] for i in range(ndim))


def _of_spec(spec: Any, mesh: Any, ndim: int) -> Split:
    def parts(names: Any) -> int:
        names = (names,) if isinstance(names, str) else names
        split = isinstance(names, tuple)  # or None, or left to the compiler
        return math.prod(mesh.shape[name] for name in names) if split else 1

    found = [parts(names) for names in spec]
    return tuple(found + [1] * (ndim - len(found)))


def of_turn(eqn: Any, given: Sequence[Split]) -> list[Split]:
    """How what one turn of a loop is given is split: constants, carry, slices."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        body, fixed, count = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
        xs = [split[1:] for split in given[fixed + count :]]
    else:
        given = given[params["cond_nconsts"] :]
        body, fixed = params["body_jaxpr"].jaxpr, params["body_nconsts"]
        count, xs = len(given) - fixed, []
    carry, _ = _loop(body, given[:fixed], given[fixed : fixed + count], xs)
    return [*given[:fixed], *carry, *xs]


def _scan(params: dict, given: Sequence[Split]) -> list[Split]:
    body, fixed, count = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
    xs = [split[1:] for split in given[fixed + count :]]
    carry, ys = _loop(body, given[:fixed], given[fixed : fixed + count], xs)
    return [*carry, *((1, *split) for split in ys)]


def _loop(body: Any, consts: Sequence[Split], carry: Sequence[Split], xs: Sequence[Split]):
    """How the carry is split in the end, and what a turn makes besides."""
    while True:
        outs = through(body, (*consts, *carry, *xs))
        after = [_most(pair) for pair in zip(carry, outs)]
        if after == list(carry):
            return after, outs[len(carry) :]
        carry = after


def _most(splits: Sequence[Split]) -> Split:
    return tuple(max(each) for each in zip(*splits))


def _of_one(eqn: Any, given: Sequence[Split], out: Any) -> Split:
    name, params, shape = eqn.primitive.name, eqn.params, out.aval.shape
    if name == "dot_general":
        return _product(params["dimension_numbers"], *given)
    if name == "broadcast_in_dim":
        split = [1] * len(shape)
        for axis, to in enumerate(params["broadcast_dimensions"]):
            if eqn.invars[0].aval.shape[axis] == shape[to]:
                split[to] = given[0][axis]
        return tuple(split)
    if name == "transpose":
        return tuple(given[0][axis] for axis in params["permutation"])
    if name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(eqn.invars[0].aval.shape, given[0], shape)
    if name == "stack":
        most, axis = _most(given), params["axis"]
        return (*most[:axis], 1, *most[axis:])
    if name == "unstack":
        return tuple(n for axis, n in enumerate(given[0]) if axis != params["axis"])
    if name.startswith("reduce_") and "axes" in params or name in REDUCTIONS:
        return tuple(n for axis, n in enumerate(given[0]) if axis not in params["axes"])
    split = [1] * len(shape)
    for var, parts in zip(eqn.invars, given):
        if math.prod(parts) > 1 and len(parts) == len(shape):
            for axis, (one, n) in enumerate(zip(var.aval.shape, parts)):
                alike = one == shape[axis] or (one > 1 and shape[axis] % n == 0)
                split[axis] = max(split[axis], n if alike else 1)
    return tuple(split)


def _product(numbers: Any, left: Split, right: Split) -> Split:
    (contract_l, contract_r), (batch_l, batch_r) = numbers
    batch = [max(left[i], right[j]) for i, j in zip(batch_l, batch_r)]
    rest_l = [n for i, n in enumerate(left) if i not in (*contract_l, *batch_l)]
    rest_r = [n for i, n in enumerate(right) if i not in (*contract_r, *batch_r)]
    return (*batch, *rest_l, *rest_r)


def _reshaped(old: tuple[int, ...], split: Split, new: tuple[int, ...]) -> Split:
    """Axes that become one, or come of one, together: the first of them takes the parts."""
    found, i, j = [1] * len(new), 0, 0
    while i < len(old) and j < len(new):
        first, sizes = j, [old[i], new[j]]
        parts, i, j = split[i], i + 1, j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0], parts, i = sizes[0] * old[i], parts * split[i], i + 1
            else:
                sizes[1], j = sizes[1] * new[j], j + 1
        for axis in range(first, j):
            found[axis] = math.gcd(parts, new[axis])
            parts //= found[axis]
    return tuple(found)
