"""Points that Optuna proposes. What is known of earlier points is told to it anew at each start."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from memjax.config import ConfigError
from memjax.sweeps.directory import DONE, ENDED, Directory
from memjax.sweeps.plan import Planned, Planner
from memjax.sweeps.space import Choice, Distribution, point_of
from memjax.sweeps.spec import Search
from memjax.sweeps.table import Live

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
}


def load_optuna() -> Any:
    """Optuna. Raises ConfigError if it is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("a sweep with search= needs the package optuna; install memjax[search]")
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Proposals:
    """Trials of a search: asked for one by one, told how they ended.

    A trial is the point `trial=N`; its config says what was proposed, so that a search goes on
    where it was: finished trials are told to a new study, unfinished ones run first.
    """

    def __init__(self, search: Search, planner: Planner, directory: Directory, live: Live):
        self.optuna = load_optuna()
        self.search, self.planner, self.directory, self.live = search, planner, directory, live
        sampler = getattr(self.optuna.samplers, SAMPLERS[search.sampler])
        self.study = self.optuna.create_study(sampler=sampler(seed=search.seed))
        self.space = {key: _distribution(self.optuna, d) for key, d in search.fields.items()}
        self.planned: list[Planned] = []
        self.trials: dict[str, Any] = {}
        self.proposed: dict[str, dict[str, Any]] = {}
        self.unfinished: list[str] = []
        self._restore()

    def _restore(self) -> None:
        try:
            known = self.directory.plan()
        except ConfigError:
            return
        proposed = known["settings"].get("proposed", {})
        for row in known["points"]:
            name = row["name"]
            values = proposed.get(name)
            if values is None:
                raise ConfigError(f"--workdir={self.directory.path} holds a sweep without search")
            self.study.enqueue_trial(values)
            self._propose(name)
            if self.directory.settled(name, ended_count=True):
                self.tell(name, self.directory.status(name)["state"])
            else:
                self.unfinished.append(name)

    def _propose(self, name: str) -> None:
        trial = self.study.ask(self.space)
        fields = self.search.fields
        values = {k: _value(fields[k], trial.params[k]) for k in fields}
        point = point_of(values)
        made = self.planner.plan_one(point)
        self.trials[name], self.proposed[name] = trial, dict(trial.params)
        self.planned.append(dataclasses.replace(made, name=name))

    def connect(self, record: Callable[[], None]):
        """Functions for the scheduler: the next point, and what to do when one has ended."""

        def next_point() -> str | None:
            if self.unfinished:
                return self._announce(self.unfinished.pop(0))
            if len(self.planned) >= self.search.trials:
                return None
            name = f"trial={len(self.planned):04d}"
            self._propose(name)
            record()
            return self._announce(name)

        return next_point, self.tell

    def _announce(self, name: str) -> str:
        planned = next(p for p in self.planned if p.name == name)
        self.live.states.setdefault(name, "waiting")
        self.live.steps[name] = planned.experiment.train.steps
        shown = "  ".join(f"{key} {label}" for key, label in planned.labels.items())
        self.live.note(f"{name}: {shown}")
        return name

    def tell(self, name: str, state: str) -> None:
        """A trial has ended."""
        trial = self.trials[name]
        metric = self.search.metric
        values = [r[metric] for r in self.directory.records(name) if r.get(metric) is not None]
        states = self.optuna.trial.TrialState
        if state in (DONE, ENDED) and values:
            self.study.tell(trial, values[-1])
        else:
            self.study.tell(trial, state=states.FAIL)


def _distribution(optuna: Any, ours: Distribution) -> Any:
    kinds = optuna.distributions
    if isinstance(ours, Choice):
        return kinds.CategoricalDistribution(tuple(range(len(ours.values))))
    if ours.whole:
        return kinds.IntDistribution(round(ours.low), round(ours.high), log=ours.log)
    return kinds.FloatDistribution(ours.low, ours.high, log=ours.log)


def _value(ours: Distribution, proposed: Any) -> Any:
    return ours.values[proposed] if isinstance(ours, Choice) else proposed
