"""What a sweep is: a base config, points, and what holds for all of them.

A sweep file is Python with `get_sweep()`, or `get_sweep(variant)` for `--sweep=FILE:variant`.
"""

import dataclasses
import difflib
import importlib.util
from pathlib import Path
from typing import Any, Literal

from memjax.config import ConfigError, check, check_at_least
from memjax.experiment import Experiment
from memjax.match import Match
from memjax.sweeps.space import Choice, Distribution, Point, Space, Uniform
from memjax.sweeps.stopping import Halving, Median


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """An evaluation of every finished point; fields as of `memjax eval`, None its default."""

    task: Literal["wikitext", "pg19", "text", "stdlib"] | None = None
    data: str | None = None
    split: str = "test"
    protocol: Literal["stream", "windows", "sliding"] | None = None
    context: int | None = None
    stride: int | None = None
    carry: bool | None = None
    batch: int | None = None
    max_documents: int | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are not left to their defaults."""
        fields = dataclasses.asdict(self)
        return {key: value for key, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search by Optuna instead of fixed points: it proposes `trials` points, `jobs` at a time.

    fields: path -> Uniform or Choice. metric: what is made small, of the last record that has it.
    sampler: "tpe", "random", "cmaes" or "qmc" of Optuna.
    """

    fields: dict[str, Distribution]
    trials: int
    metric: Literal["eval_loss", "loss"] = "eval_loss"
    sampler: Literal["tpe", "random", "cmaes", "qmc"] = "tpe"
    seed: int = 0

    def __post_init__(self):
        check_at_least(self, 1, "trials")
        check(self, "fields", len(self.fields) > 0, "must name at least one field")
        for field, distribution in self.fields.items():
            if not isinstance(distribution, Uniform | Choice):
                raise ConfigError(f"fields: {field} must be a Uniform or a Choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A question put to many configs.

    base: a config file FILE[:variant], as after --config, or an Experiment; the path `config` in
        a point replaces it.
    points: changes to the base (`memjax.sweeps.space`). search: points that Optuna proposes.
    match: widths that are solved for, so that all points cost the same.
    evaluate: evaluations of every point once it is trained.
    stop: ends points early that do worse than the others.
    retries: further attempts at a point that failed, in one call.
    """

    base: str | Experiment
    points: Space = (Point(),)
    search: Search | None = None
    match: Match | None = None
    evaluate: tuple[Evaluate, ...] = ()
    stop: Median | Halving | None = None
    retries: int = 0

    def __post_init__(self):
        check_at_least(self, 0, "retries")
        if not self.points or not all(isinstance(point, Point) for point in self.points):
            raise ConfigError("points must come from axis, product, ... and be at least one")
        if self.search is not None and (len(self.points) > 1 or self.points[0].changes):
            raise ConfigError("search proposes the points; leave points out")
        if self.search is not None and self.match is not None and self.match.to is None:
            raise ConfigError("match.to=None needs a first point, which a search has not; name one")


def _hint(path: Path) -> str:
    if (path / "sweep.py").is_file():
        return f"did you mean {path / 'sweep.py'}?"
    files = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, files, 1)
    return f"did you mean {path.parent / near[0]}?" if near else "give one with get_sweep()"


def load_sweep(name: str) -> Sweep:
    """The sweep of `FILE.py[:variant]`. Raises ConfigError, one line."""
    file, _, variant = name.partition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"--sweep={name}: no such .py file; {_hint(path)}")
    spec = importlib.util.spec_from_file_location("memjax_sweep_file", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        sweep: Any = module.get_sweep(variant) if variant else module.get_sweep()
    except ConfigError as error:
        raise ConfigError(f"--sweep={name}: {error}") from None
    except (Exception, SystemExit) as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"--sweep={name}: cannot be loaded: {line}") from error
    if not isinstance(sweep, Sweep):
        raise ConfigError(f"--sweep={name}: get_sweep() must return a memjax.sweeps.Sweep")
    return sweep
