"""From a sweep to a table of checked runs, before anything starts.

Every point becomes a typed config; every mistake is found here. Costs come from the functions of
`memjax describe`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from memjax.config import ConfigError, build, load_file, override, to_dict
from memjax.data import Data, load_tokenizer
from memjax.describe import parameter_count, state_bytes, training_flops
from memjax.experiment import Experiment
from memjax.match import Match, match, quantity
from memjax.sweeps.space import CONFIG, Point, file_name
from memjax.sweeps.spec import Sweep

LONGEST_NAME = 120


class Costs(NamedTuple):
    """What a point costs. flops: of the whole training."""

    params: int
    state_bytes: int
    flops_per_token: float
    tokens: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Planned:
    """A point, ready to run. matched: what matching changed, path -> (old, new)."""

    name: str
    experiment: Experiment
    labels: dict[str, str]
    matched: dict[str, tuple[Any, Any]]
    costs: Costs

    @property
    def digest(self) -> str:
        return digest(self.experiment)


def digest(experiment: Experiment) -> str:
    """Equal for equal configs."""
    text = json.dumps(to_dict(experiment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Planner:
    """Makes points into checked runs; keeps vocabularies and costs of configs seen before."""

    def __init__(self, sweep: Sweep, overrides: Sequence[tuple[str, str]] = ()):
        """overrides: (path, text) pairs of the command line, which change every point's base."""
        self.sweep, self.overrides = sweep, overrides
        self._bases: dict[str, Any] = {}
        self._vocabularies: dict[Data, int] = {}
        self._costs: dict[str, tuple[int, int, float]] = {}
        self._matches: dict[str, tuple[Experiment, dict[str, tuple[Any, Any]]]] = {}
        self._target: float | None = None

    def plan(self, points: Sequence[Point]) -> list[Planned]:
        """The points in order, those with equal configs only once. Raises ConfigError."""
        planned: dict[str, Planned] = {}
        for point in points:
            made = self.plan_one(point)
            planned.setdefault(made.digest, made)
        return _named(list(planned.values()))

    def plan_one(self, point: Point) -> Planned:
        """One point. Raises ConfigError with the name of the point."""
        name = file_name(point.labels.items())
        try:
            experiment = self._experiment(point)
            matched: dict[str, tuple[Any, Any]] = {}
            if self.sweep.match is not None:
                experiment, matched = self._match(experiment, self.sweep.match)
            return Planned(name, experiment, dict(point.labels), matched, self._cost(experiment))
        except ConfigError as error:
            raise ConfigError(f"sweep point {name}: {error}") from None

    def _experiment(self, point: Point) -> Experiment:
        changes = dict(point.changes)
        base = changes.pop(CONFIG, self.sweep.base)
        if isinstance(base, str):
            if base not in self._bases:
                self._bases[base] = load_file(base)
            base = self._bases[base]
        data = json.loads(json.dumps(to_dict(base)))
        for field, text in self.overrides:
            if field in changes:
                raise ConfigError(f"--config.{field}: the sweep sets it; leave it out")
            override(data, field, text)
        for field, value in changes.items():
            _assign(data, field, value)
        return build(Experiment, data)

    def _vocabulary(self, data: Data) -> int:
        key = dataclasses.replace(data, sequence=1, batch=1, seed=0, stream="packed")
        if key not in self._vocabularies:
            self._vocabularies[key] = load_tokenizer(data).vocab_size
        return self._vocabularies[key]

    def _cost(self, experiment: Experiment) -> Costs:
        vocabulary = self._vocabulary(experiment.data)
        segment = experiment.data.sequence
        key = json.dumps([to_dict(experiment.model), vocabulary, segment])
        if key not in self._costs:
            model = experiment.model
            self._costs[key] = (
                parameter_count(model, vocabulary),
                state_bytes(model, vocabulary),
                training_flops(model, vocabulary, segment),
            )
        params, state, per_token = self._costs[key]
        train = experiment.train
        tokens = train.steps * experiment.data.batch * segment * train.horizon
        return Costs(params, state, per_token, tokens, tokens * per_token)

    def _match(self, experiment: Experiment, settings: Match):
        vocabulary = self._vocabulary(experiment.data)
        if self._target is None:
            self._target = self._find_target(experiment, vocabulary, settings)
        model = to_dict(experiment.model)
        key = json.dumps([model, vocabulary, experiment.data.sequence], sort_keys=True)
        if key not in self._matches:
            found = match(experiment, vocabulary, self._target, settings)
            self._matches[key] = (found.experiment, found.changed)
        found_experiment, changed = self._matches[key]
        return dataclasses.replace(experiment, model=found_experiment.model), changed

    def _find_target(self, first: Experiment, vocabulary: int, settings: Match) -> float:
        if isinstance(settings.to, int | float):
            return float(settings.to)
        if settings.to is None:
            return quantity(first, vocabulary, settings.by)
        data = load_file(settings.to)
        for field, text in self.overrides:
            override(data, field, text)
        other = build(Experiment, data)
        return quantity(other, self._vocabulary(other.data), settings.by)


def _assign(data: dict, field: str, value: Any) -> None:
    """Set a path in plain data to a value."""
    override(data, field, value if isinstance(value, str) else "")
    if not isinstance(value, str):
        *sections, last = field.split(".")
        here = data
        for section in sections:
            here = here[section]
        here[last] = to_dict(value)


def _named(points: list[Planned]) -> list[Planned]:
    """The points with names that are short and differ."""
    names = [point.name for point in points]
    return [
        dataclasses.replace(p, name=f"{p.name[:LONGEST_NAME]}-{p.digest[:6]}")
        if names.count(p.name) > 1 or len(p.name) > LONGEST_NAME
        else p
        for p in points
    ]
