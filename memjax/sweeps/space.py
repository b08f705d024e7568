"""Spaces of points: tuples of changes to a base config, built by plain functions.

    product(axis("model.d_model", 64, 128), seeds(3))            # 6 points
    zipped(axis("model.d_model", 64, 128), axis("optimizer.learning_rate", 3e-3, 1e-3))   # 2
    when(space, {"model.pattern": ("attention",)}, axis("model.mixers.attention.window", 64, 128))

A point is a set of changes, from the path of a field (as after `--config.`) to its value, and a
label for each axis, from which its name is made. The path `config` is the config file itself
(`FILE[:variant]`), so that points may start from different configs.
"""

import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memjax.config import ConfigError, to_dict

CONFIG = "config"


@dataclasses.dataclass(frozen=True)
class Point:
    """Changes to the base config, and the labels of the axes they came from."""

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Point") -> "Point":
        for field in self.changes.keys() & other.changes.keys():
            raise ConfigError(f"sweep: two axes set {field}; keep one of them")
        for name in self.labels.keys() & other.labels.keys():
            raise ConfigError(f"sweep: two axes are called {name!r}; give one of them name=...")
        return Point({**self.changes, **other.changes}, {**self.labels, **other.labels})


Space = tuple[Point, ...]


def axis(field: str, *values: Any, name: str | None = None) -> Space:
    """A point for each value of a field; one dict of label -> value names the values.

    name: what the axis is called in the names of points; default the last part of `field`.
    """
    name = name or field.rpartition(".")[2]
    named = len(values) == 1 and isinstance(values[0], Mapping)
    pairs = list(values[0].items()) if named else [(show(field, v), v) for v in values]
    if not pairs:
        raise ConfigError(f"sweep: axis {field} has no values; give at least one")
    labels = [label for label, _ in pairs]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"sweep: axis {field} has the value {label} twice; keep one of them")
    return tuple(Point({field: value}, {name: str(label)}) for label, value in pairs)


def seeds(count: int, first: int = 0) -> Space:
    """`count` seeds, each of the parameters (train.seed) and of the data order (data.seed)."""
    _at_least(count, 1, "seeds")
    numbers = range(first, first + count)
    return tuple(Point({"train.seed": n, "data.seed": n}, {"seed": str(n)}) for n in numbers)


def product(*spaces: Space) -> Space:
    """Every combination of a point of each space; the last space varies fastest."""
    points: Space = (Point(),)
    for space in spaces:
        points = tuple(left + right for left in points for right in space)
    return points


def zipped(*spaces: Space) -> Space:
    """The first points of all spaces together, the second ones together, and so on."""
    lengths = [len(space) for space in spaces]
    if len(set(lengths)) > 1:
        raise ConfigError(f"sweep: zipped spaces have {lengths} points; they must be as many")
    return tuple(sum(row[1:], row[0]) for row in zip(*spaces))


def chain(*spaces: Space) -> Space:
    """The points of all spaces, one space after the other."""
    return tuple(point for space in spaces for point in space)


def sample(space: Space, count: int, seed: int = 0) -> Space:
    """`count` different points of a space, in its order."""
    _at_least(count, 1, "sample")
    if count > len(space):
        raise ConfigError(f"sweep: sample of {count} from {len(space)} points; ask for fewer")
    kept = sorted(random.Random(seed).sample(range(len(space)), count))
    return tuple(space[index] for index in kept)


def when(
    space: Space,
    condition: Mapping[str, Any] | Callable[[Mapping[str, Any]], bool],
    then: Space,
) -> Space:
    """Points of `space` that meet the condition, each with every point of `then`; others as is.

    condition: values that fields must have, or a function of the point's changes.
    """

    def meets(point: Point) -> bool:
        if isinstance(condition, Mapping):
            absent = object()
            return all(point.changes.get(k, absent) == v for k, v in condition.items())
        return condition(point.changes)

    return tuple(
        p for point in space for p in (product((point,), then) if meets(point) else [point])
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """A number between `low` and `high`; `log` for even odds of each factor; `whole` rounds."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self):
        if not self.low < self.high or (self.log and self.low <= 0):
            rule = "0 < low < high" if self.log else "low < high"
            raise ConfigError(f"sweep: Uniform(low={self.low}, high={self.high}) must have {rule}")

    def draw(self, rng: random.Random) -> float | int:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = rng.uniform(low, high)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.whole else float(f"{value:.4g}")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: Sequence[Any]

    def __post_init__(self):
        if not self.values:
            raise ConfigError("sweep: Choice has no values; give at least one")

    def draw(self, rng: random.Random) -> Any:
        return rng.choice(list(self.values))


Distribution = Uniform | Choice


def draw(count: int, fields: Mapping[str, Distribution], seed: int = 0) -> Space:
    """Random search: `count` points whose fields are drawn one by one.

    The first points stay the same when `count` grows.
    """
    _at_least(count, 1, "draw")
    return tuple(
        point_of({k: d.draw(random.Random(f"{seed} {n} {k}")) for k, d in fields.items()})
        for n in range(count)
    )


def point_of(changes: Mapping[str, Any]) -> Point:
    """A point from changes alone; labels are the last parts of the paths, or the whole paths."""
    last = [field.rpartition(".")[2] for field in changes]
    names = [n if last.count(n) == 1 else field for n, field in zip(last, changes)]
    return Point(dict(changes), {n: show(f, v) for n, (f, v) in zip(names, changes.items())})


def show(field: str, value: Any) -> str:
    """A value as a short label."""
    if field == CONFIG:
        file, _, variant = str(value).partition(":")
        return variant or Path(file).stem
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if dataclasses.is_dataclass(value):
        kind = getattr(type(value), "kind", type(value).__name__)
        changed = [
            f"{f.name}{show('', getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if f.default is not dataclasses.MISSING and getattr(value, f.name) != f.default
        ]
        return "_".join([kind, *changed])
    if isinstance(value, Mapping):
        return "_".join(f"{k}{show('', to_dict(v))}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "+".join(show("", v) for v in value)
    return str(value)


def file_name(labels: Iterable[tuple[str, str]]) -> str:
    """A name for a folder from the labels of a point: d_model=64,seed=0."""
    parts = []
    for name, label in labels:
        clean = re.sub(r"[^A-Za-z0-9_.+-]+", "_", label).strip("_.") or "empty"
        parts.append(f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}={clean}")
    return ",".join(parts) or "base"


def _at_least(value: int, least: int, name: str) -> None:
    if value < least:
        raise ConfigError(f"sweep: {name}({value}) must be at least {least}")
