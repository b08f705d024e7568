"""Read runs from disk: configs, curves, evaluations, failures."""

import dataclasses
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memjax.config import diff
from memjax.report.evaluations import Evaluated, read_evals, read_json
from memjax.sweeps.directory import DONE, FAILED, PLAN, STOPPED, WAITING, Directory
from memjax.training.checkpoint import list_steps, read_meta
from memjax.training.metrics import FILE, read_records

CONFIG = "config.json"
UNINTERESTING = ("config.data.cache", "config.train.wandb", "config.train.tensorboard")
SEEDS = ("seed", "train.seed", "data.seed")
MOST_COLUMNS = 12


@dataclasses.dataclass
class Run:
    """A run as a report shows it.

    settings: what sets it apart from the others, by name. evals: what was evaluated -> result.
    goodput: share of its wall time that went into training steps; compilation, data, evaluation,
    checkpoints and steps lost to interruptions are the rest.
    """

    name: str
    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    state: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    evals: dict[Evaluated, dict[str, Any]] = dataclasses.field(default_factory=dict)
    params: int | None = None
    state_bytes: int | None = None
    error: str | None = None
    log: list[str] = dataclasses.field(default_factory=list)
    seconds: float | None = None

    @property
    def last(self) -> dict[str, Any]:
        return self.records[-1] if self.records else {}

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the records that have a value."""
        return [(r["step"], r[key]) for r in self.records if r.get(key) is not None]

    def final(self, key: str) -> float | None:
        """The newest value."""
        curve = self.curve(key)
        return curve[-1][1] if curve else None

    @property
    def tokens_per_s(self) -> float | None:
        rates = [r["tokens_per_s"] for r in self.records if r.get("tokens_per_s")]
        return statistics.median(rates) if rates else None

    @property
    def wall(self) -> float | None:
        """Seconds of all attempts together."""
        return self.seconds or self.last.get("seconds")

    @property
    def goodput(self) -> float | None:
        before, useful = 0, 0.0
        for record in self.records:
            if record.get("tokens_per_s") and record.get("tokens") is not None:
                useful += (record["tokens"] - before) / record["tokens_per_s"]
                before = record["tokens"]
        return min(useful / self.wall, 1.0) if self.wall and useful else None

    @property
    def score(self) -> float:
        """What runs are ordered by: validation loss, or else training loss."""
        for key in ("eval_loss", "loss"):
            value = self.final(key)
            if value is not None:
                return value
        return float("inf")


def collect(root: Path) -> list[Run]:
    """Every run in `root`, those of sweeps with what the sweep knows of them, the best first."""
    sweeps: dict[Path, tuple[Directory, dict[str, Any]]] = {}
    runs = []
    for folder in _find(root):
        sweep = _sweep_of(folder, sweeps)
        runs.append(_read_run(folder, root, sweep))
    runs += _never_began(sweeps, {run.path for run in runs})
    _set_apart(runs)
    runs.sort(key=lambda run: (run.score, run.name))
    return runs


def _find(root: Path) -> list[Path]:
    """Folders with a config.json; there are no runs within runs."""
    found = []
    for folder, folders, files in os.walk(root):
        if CONFIG in files:
            found.append(Path(folder))
            folders.clear()
        folders.sort()
    return found


def _sweep_of(folder: Path, sweeps: dict) -> tuple[Directory, dict[str, Any]] | None:
    """The sweep that a run belongs to, and its points by name."""
    parent = folder.parent.parent
    if folder.parent.name != "runs" or not (parent / PLAN).is_file():
        return None
    if parent not in sweeps:
        sweep = Directory(parent)
        sweeps[parent] = (sweep, {point["name"]: point for point in sweep.plan()["points"]})
    return sweeps[parent]


def _read_run(folder: Path, root: Path, sweep: tuple[Directory, dict[str, Any]] | None) -> Run:
    metrics = folder / FILE
    run = Run(
        name=str(folder.relative_to(root)) if folder != root else folder.absolute().name,
        path=folder,
        config=read_json(folder / CONFIG),
        records=read_records(metrics) if metrics.is_file() else [],
        state=WAITING,
        evals=read_evals(folder / "eval"),
    )
    if sweep is None or folder.name not in sweep[1]:
        _judge(run)
        return run
    directory, points = sweep
    point, status = points[folder.name], directory.status(folder.name)
    run.name, run.settings = folder.name, dict(point["labels"])
    run.params, run.state_bytes = point["params"], point["state_bytes"]
    run.state, run.seconds = directory.state(folder.name), status.get("seconds")
    run.error = status.get("error")
    if run.state == FAILED:
        run.log = directory.last_lines(folder.name)
    return run


def _judge(run: Run) -> None:
    """The state of a run outside a sweep, from what it left."""
    planned = run.config.get("train", {}).get("steps")
    steps = list_steps(run.path / "checkpoints")
    step = max([run.last.get("step", 0), *steps])
    run.state = DONE if planned and step >= planned else STOPPED if step else WAITING
    if steps:
        meta = read_meta(run.path / "checkpoints" / str(steps[-1]))
        run.params = meta["summary"].get("parameters") if meta else None
    if not run.config:
        run.state, run.error = FAILED, f"{CONFIG} cannot be read"


def _never_began(sweeps: dict, seen: set[Path]) -> list[Run]:
    """Points of the sweeps that left no run: they wait, or failed before training."""
    missing = []
    for directory, points in sweeps.values():
        for name, point in points.items():
            if directory.run(name) in seen:
                continue
            status = directory.status(name)
            run = Run(
                name=name,
                path=directory.run(name),
                config=read_json(directory.config(name)),
                records=[],
                state=status["state"],
                settings=dict(point["labels"]),
                params=point["params"],
                state_bytes=point["state_bytes"],
                error=status.get("error"),
                log=directory.last_lines(name) if status["state"] == FAILED else [],
            )
            missing.append(run)
    return missing


def _set_apart(runs: Sequence[Run]) -> None:
    """Give runs that no sweep labelled the config fields in which runs differ."""
    bare = [run for run in runs if not run.settings]
    if len(bare) < 2:
        return
    first = bare[0].config
    differing: dict[str, set[str]] = {}
    changes = [diff(first, run.config) for run in bare]
    for change in changes:
        for key, (old, new) in change.items():
            if key not in UNINTERESTING:
                differing.setdefault(key, {str(old)}).add(str(new))
    kept = sorted(differing, key=lambda key: -len(differing[key]))[:MOST_COLUMNS]
    shown = [key for key in differing if key in kept]
    origin = {key: old for change in changes for key, (old, _) in change.items()}
    for run, change in zip(bare, changes):
        values = {key: change[key][1] if key in change else origin[key] for key in shown}
        run.settings = {k.removeprefix("config."): _short(v) for k, v in values.items()}


def _short(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def by_setting(runs: Iterable[Run]) -> dict[tuple[tuple[str, Any], ...], list[Run]]:
    """Runs that differ in nothing but their seeds, together; empty if no setting has two."""
    groups: dict[tuple[tuple[str, Any], ...], list[Run]] = {}
    for run in runs:
        if run.final("loss") is not None:
            key = tuple((k, str(v)) for k, v in run.settings.items() if k not in SEEDS)
            groups.setdefault(key, []).append(run)
    return groups if any(len(group) > 1 for group in groups.values()) and len(groups) > 0 else {}
