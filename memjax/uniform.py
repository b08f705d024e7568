"""What a compiler knows, in a traced program, of arrays whose elements are all the same.

It takes the one branch of a condition that it knows, and forgets the others.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

SAME = {
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "copy_p", "rev",
    "dynamic_slice", "sharding_constraint", "stop_gradient", "name", "pvary", "pcast", "device_put",
    "reduce_or", "reduce_and", "reduce_max", "reduce_min",
}  # fmt: skip
BY_ELEMENT: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "ne": np.not_equal, "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "xor": np.bitwise_xor, "and": np.bitwise_and, "or": np.bitwise_or,
    "not": np.invert, "neg": np.negative,
}  # fmt: skip
DECIDES = {"and": False, "or": True}


class Parts(NamedTuple):
    """Arrays side by side: the size of each along the axis, and what is known of it."""

    axis: int
    parts: tuple[tuple[int, Any], ...]

    def cut(self, start: int, stop: int) -> Any:
        """What is known of a range that lies in one part."""
        first = 0
        for size, known in self.parts:
            if first <= start and stop <= first + size:
                return known
            first += size
        return None


def literal(var: Any) -> Any:
    """The value of a literal number; None for all else."""
    return np.asarray(var.val)[()] if isinstance(var, Literal) and np.ndim(var.val) == 0 else None


def follow(eqn: Any, known: Sequence[Any]) -> list[Any]:
    """For each output of an operation its one value, or `Parts`, or None, given its inputs'."""
    name, params = eqn.primitive.name, eqn.params
    if name == "concatenate":
        return [_side_by_side(eqn, known)]
    if name == "slice" and isinstance(known[0], Parts):
        axis = known[0].axis
        return [known[0].cut(params["start_indices"][axis], params["limit_indices"][axis])]
    if name == "split":
        sizes = [int(size) for size in params["sizes"]]
        ends = list(itertools.accumulate(sizes))
        if isinstance(known[0], Parts) and known[0].axis == params["axis"]:
            return [known[0].cut(end - n, end) for end, n in zip(ends, sizes)]
        return [_number(known[0])] * len(eqn.outvars)
    numbers = [_number(value) for value in known]
    return [_of_numbers(name, params, numbers)] * len(eqn.outvars)


def _number(value: Any) -> Any:
    return None if isinstance(value, Parts) else value


def _of_numbers(name: str, params: dict[str, Any], numbers: list[Any]) -> Any:
    if name in SAME or name == "slice":
        return numbers[0]
    if name == "convert_element_type":
        new = np.dtype(params["new_dtype"])
        return None if numbers[0] is None else np.asarray(numbers[0]).astype(new)[()]
    if name == "select_n":
        return None if numbers[0] is None else numbers[1 + int(numbers[0])]
    if name in DECIDES and any(n is not None and n.dtype == bool for n in numbers):
        decisive = DECIDES[name]
        if any(n is not None and bool(n) == decisive for n in numbers):
            return np.bool_(decisive)
    if name in BY_ELEMENT and all(number is not None for number in numbers):
        return BY_ELEMENT[name](*numbers)
    return None


def _side_by_side(eqn: Any, known: Sequence[Any]) -> Any:
    first = _number(known[0])
    if first is not None and all(_number(k) is not None and k == first for k in known):
        return first
    axis = eqn.params["dimension"]
    sizes = [var.aval.shape[axis] for var in eqn.invars]
    return Parts(axis, tuple(zip(sizes, map(_number, known))))
