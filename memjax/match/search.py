"""Solve for several fields together: a coarse one, and others for what its steps cannot meet."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from memjax.config import ConfigError
from memjax.experiment import Experiment
from memjax.match.fields import candidates, read, with_value
from memjax.match.settings import UNITS, Match, estimate, quantity
from memjax.match.solve import Tried, off, solve

NEAR, NEARBY = 6, 0.3
"""A fine field starts from the nearest NEAR values of a coarse one that are so near the target."""
MOST_FINE = 2.0
"""A fine adjustment changes its field by no more than this factor, if there is another way."""
FACTORS, SHIFTS = (2.0, 0.5, 3.0, 1 / 3, 4.0, 0.25, 8.0), (1, -1, 2, -2)
"""By which fields are changed, if fine adjustments did not help, before another is solved for."""
ROUNDS = 5
"""Searches by an estimate, each with what the config found before it really counts."""
MOST_COUNTS, MOST_EXACT = 2000, 40
"""Configs counted before a search is given up, some 40 seconds by an estimate and minutes else."""


class Matched(NamedTuple):
    """A config that meets the target, and what it took: path -> (old, new)."""

    experiment: Experiment
    changed: dict[str, tuple[Any, Any]]
    before: float
    value: float
    target: float


class _GivenUp(Exception):
    """Too many configs were counted."""


def match(experiment: Experiment, vocab_size: int, target: float, settings: Match) -> Matched:
    """The config with its sizes solved for. Raises ConfigError, one line, if none fits.

    The search is by `estimate`, in units of the quantity at the config found last; where that comes
    near and no nearer, because the fields change how the two are related, by the quantity itself.
    """
    count = partial(quantity, vocab_size=vocab_size, by=settings.by)
    quick = partial(estimate, vocab_size=vocab_size, by=settings.by)
    start = Tried(experiment, count(experiment))
    if off(start.value, target) <= settings.tolerance:
        return Matched(experiment, {}, start.value, start.value, target)
    fields = list(settings.change or candidates(experiment, settings.by))
    found = closest = start
    for _ in range(ROUNDS):
        measure = partial(_in_units, found.value / quick(found.experiment), quick)
        guess = _search(experiment, fields, measure, target, settings)
        found = Tried(guess.experiment, count(guess.experiment))
        closest = min(closest, found, key=lambda one: off(one.value, target))
        if off(closest.value, target) <= settings.tolerance:
            break
    else:
        closest = _search(closest.experiment, fields, count, target, settings, most=MOST_EXACT)
    changed = _changed(experiment, closest.experiment, fields)
    return Matched(closest.experiment, changed, start.value, closest.value, target)


def _in_units(unit: float, count: Callable[[Experiment], float], experiment: Experiment) -> float:
    return unit * count(experiment)


def _search(
    experiment: Experiment,
    fields: Sequence[str],
    count: Callable[[Experiment], float],
    target: float,
    settings: Match,
    most: int = MOST_COUNTS,
) -> Tried:
    """The config with its sizes solved for, by what `count` counts."""
    start = Tried(experiment, count(experiment))
    counts: dict[str, float] = {}

    def measure(changed: Experiment) -> float:
        key = repr(changed.model)
        if key not in counts:
            if len(counts) >= most:
                raise _GivenUp
            counts[key] = count(changed)
        return counts[key]

    step = partial(solve, target=target, measure=measure, tolerance=settings.tolerance)
    closest, inert = start, list(fields)
    try:
        for field, gentle, tried in _tries(experiment, fields, step, target):
            if field in inert and tried:
                inert.remove(field)
            closest = min([closest, *tried[:1]], key=lambda one: off(one.value, target))
            if tried and gentle and off(tried[0].value, target) <= settings.tolerance:
                return tried[0]
    except _GivenUp:
        inert = []
    if off(closest.value, target) <= settings.tolerance:
        return closest
    raise ConfigError(_failure(settings, target, start, closest, fields, inert))


Step = Callable[..., list[Tried]]


def _tries(
    experiment: Experiment, fields: Sequence[str], step: Step, target: float
) -> Iterator[tuple[str, bool, list[Tried]]]:
    """A field, whether to be content with a solution, and what was tried.

    First each field by itself, and with others for what its steps are too coarse to meet; then
    the same from where all fields, one after the other, come nearest; at last every field where
    one or two others were changed by some factor or number.
    """
    yield from _fine(experiment, fields, step, target)
    near = Tried(experiment, math.inf)
    for field in fields:
        tried = step(near.experiment, field)
        yield field, False, tried
        near = min([near, *tried[:1]], key=lambda one: off(one.value, target))
    yield from _fine(near.experiment, fields, step, target)
    for one, two in itertools.permutations(fields, 2):
        for changed in _scaled(near.experiment, one):
            yield one, True, step(changed, two)
            for third in fields:
                if third not in (one, two):
                    for both in _scaled(changed, two):
                        yield one, True, step(both, third)


def _fine(
    experiment: Experiment, fields: Sequence[str], step: Step, target: float
) -> Iterator[tuple[str, bool, list[Tried]]]:
    extreme = []
    for coarse in fields:
        rungs = step(experiment, coarse, around=NEAR // 2)
        yield coarse, True, rungs
        for rung in rungs[:NEAR]:
            for fine in fields if off(rung.value, target) < NEARBY else ():
                if fine != coarse:
                    tried = step(rung.experiment, fine)
                    gentle = _is_gentle(experiment, tried, fine)
                    yield coarse, gentle, tried
                    extreme += [] if gentle else tried[:1]
    if extreme:  # contented with, as there is nothing better
        extreme.sort(key=lambda one: off(one.value, target))
        yield fields[0], True, extreme[:1]


def _is_gentle(experiment: Experiment, tried: Sequence[Tried], fine: str) -> bool:
    if not tried:
        return True
    old, new = read(experiment, fine), read(tried[0].experiment, fine)
    return old is None or 1 / MOST_FINE <= new / old <= MOST_FINE


def _scaled(experiment: Experiment, field: str) -> Iterator[Experiment]:
    old = read(experiment, field)
    if old is None:
        return
    scaled = [old * f if isinstance(old, float) else round(old * f) for f in FACTORS]
    shifted = [] if isinstance(old, float) else [old + shift for shift in SHIFTS]
    for value in dict.fromkeys([*shifted, *scaled]):
        changed = with_value(experiment, field, value) if value > 0 else None
        if changed is not None:
            yield changed


def _changed(old: Experiment, new: Experiment, fields: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    pairs = {field: (read(old, field), read(new, field)) for field in fields}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _failure(
    settings: Match,
    target: float,
    start: Tried,
    closest: Tried,
    fields: Sequence[str],
    inert: Sequence[str],
) -> str:
    unit, names = UNITS[settings.by], ", ".join(fields)
    line = f"match: {target:,.0f} {unit} cannot be met within {settings.tolerance:.2%} "
    if len(inert) == len(fields):
        return line + f"by {names}: it changes nothing there; name another field"
    changed = _changed(start.experiment, closest.experiment, fields)
    tried = ", ".join(f"{k}={new}" for k, (_, new) in changed.items()) or "no change"
    return line + (
        f"from {start.value:,.0f} by {names}; the closest is {closest.value:,.0f} with {tried}; "
        "name other fields to change, or a larger tolerance"
    )
