"""Solve for one field: the value at which a quantity meets a target, and those around it."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from memjax.config import ConfigError
from memjax.experiment import Experiment
from memjax.match.fields import read, with_value

STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
LARGEST = 1 << 24
UNSET = 64
"""Where the search for a size begins that the config leaves to its default, None."""


class Tried(NamedTuple):
    """A config, and its quantity."""

    experiment: Experiment
    value: float


At = Callable[[float], Tried | None]


def solve(
    experiment: Experiment,
    field: str,
    target: float,
    measure: Callable[[Experiment], float],
    tolerance: float,
    around: int = 0,
) -> list[Tried]:
    """What was tried, the nearest first; if some are within the tolerance, the roundest value.

    around: further values to try on either side if none is. Empty if the quantity does not depend
    on the field. Raises ConfigError if it is no number.
    """
    old = read(experiment, field)
    old = UNSET if old is None else old
    if not is_size(old):
        raise ConfigError(f"match: {field}={old}: only a number above 0 can be solved for")
    seen: dict[float, Tried | None] = {}

    def at(value: float) -> Tried | None:
        if value not in seen:
            changed = with_value(experiment, field, value)
            try:
                seen[value] = None if changed is None else Tried(changed, measure(changed))
            except ConfigError:  # rules that only the parts of the model know
                seen[value] = None
        return seen[value]

    bounds = (_whole if isinstance(old, int) else _fraction)(old, target, at)
    if bounds is not None:
        good = [one for b in bounds if (one := at(b)) and off(one.value, target) <= tolerance]
        for candidate in _round(bounds[0], bounds[1], isinstance(old, int)) if good else []:
            tried = at(candidate)
            if tried is not None and off(tried.value, target) <= tolerance:
                return [tried]
        if good:
            return good[:1]
        for _ in range(around if isinstance(old, int) else 0):
            low, high = (int(b) for b in bounds)
            bounds = _valid(low - 1, at, up=False) or low, _valid(high + 1, at, up=True) or high
    known = {tried.value: tried for tried in seen.values() if tried is not None}
    if len(known) < 2:
        return []
    return sorted(known.values(), key=lambda tried: off(tried.value, target))


def off(value: float, target: float) -> float:
    """The relative difference."""
    return abs(value - target) / target


def is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _round(low: float, high: float, whole: bool) -> Iterator[float]:
    """Numbers at and near two bounds, the roundest first."""
    if whole:
        for step in STEPS:
            floor = int(low) // step * step
            yield from (v for v in (floor, floor + step, int(high) // step * step) if v > 0)
    else:
        for digits in (2, 3, 4, 6):
            yield from (float(f"{end:.{digits}g}") for end in (low, high))


def _whole(old: int, target: float, at: At) -> tuple[int, int] | None:
    """The nearest valid integers on both sides of the solution."""
    bounds = _bracket(old, target, at)
    if bounds is None:
        return None
    low, high = bounds
    rising = _measured(at, high) > _measured(at, low)
    interpolate = True
    while high - low > 1:
        guess = _between(low, high, target, at) if interpolate else (low + high) // 2
        interpolate = not interpolate  # interpolation alone may creep up from one side
        middle = _valid(guess, at, up=True)
        if middle is None or middle >= high:
            middle = _valid(guess, at, up=False)
        if middle is None or middle <= low:
            break
        if (_measured(at, middle) < target) == rising:
            low = middle
        else:
            high = middle
    return low, high


def _between(low: int, high: int, target: float, at: At) -> int:
    """Where a power law through two values meets the target."""
    first, last = _measured(at, low), _measured(at, high)
    share = math.log(target / first) / math.log(last / first)
    return min(max(round(low * (high / low) ** share), low + 1), high - 1)


def _valid(value: int, at: At, up: bool) -> int | None:
    """The nearest value that a config can have, from `value` on."""
    steps = range(value, value * 2 + 64) if up else range(value, 0, -1)
    return next((v for _, v in zip(range(300), steps) if at(v) is not None), None)


def _measured(at: At, value: float) -> float:
    tried = at(value)
    assert tried is not None
    return tried.value


def _bracket(old: int, target: float, at: At) -> tuple[int, int] | None:
    """Two values with the target between them, by doubling and halving; None if there are none."""
    start = _valid(old, at, up=True)
    if start is None:
        return None
    for up in (True, False):
        near, best = start, _measured(at, start)
        while 1 <= near <= LARGEST:
            far = _valid(2 * near, at, up=True) if up else _valid(near // 2, at, up=False)
            if far is None or far == near:
                break
            value = _measured(at, far)
            if (value >= target) != (_measured(at, near) >= target):
                return min(near, far), max(near, far)
            if off(value, target) >= off(best, target):  # no change, or the wrong way
                break
            near, best = far, value
    return None


def _fraction(old: float, target: float, at: At) -> tuple[float, float] | None:
    """Numbers close together on both sides of the solution."""
    low, high = old / 64, old * 64
    ends = at(low), at(high)
    if ends[0] is None or ends[1] is None or ends[0].value == ends[1].value:
        return None
    rising = ends[1].value > ends[0].value
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        tried = at(middle)
        if tried is None:
            return None
        if (tried.value < target) == rising:
            low = middle
        else:
            high = middle
    return low, high
