"""What `memjax sweep` does: plan, show, run, and say how it went."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memjax.config import ConfigError
from memjax.sweeps.directory import (
    DONE,
    ENDED,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    Directory,
)
from memjax.sweeps.kubernetes import Kubernetes, write_manifests
from memjax.sweeps.local import Local, Scheduler
from memjax.sweeps.plan import Planned, Planner
from memjax.sweeps.search import Proposals
from memjax.sweeps.slurm import Slurm, submit
from memjax.sweeps.spec import Sweep, load_sweep
from memjax.sweeps.table import Live
from memjax.sweeps.worker import EVALUATED

STATES = (DONE, RUNNING, WAITING, STOPPED, ENDED, FAILED)
Executor = Local | Slurm | Kubernetes


def default_workdir(source: str) -> str:
    """runs/<name>: of the folder of a file called sweep.py, else of the file, and the variant."""
    file, _, variant = source.partition(":")
    path = Path(file)
    stem = path.absolute().parent.name if path.stem == "sweep" else path.stem
    return str(Path("runs") / "-".join(filter(None, (stem, variant))))


def run_sweep(
    source: str,
    workdir: str,
    executor: Executor,
    overrides: Sequence[tuple[str, str]] = (),
    again: bool = True,
) -> dict[str, Any]:
    """Finish what a sweep lacks: points that wait, were stopped or failed; what is done stays.

    again: whether points that failed in an earlier call are tried again.

    Returns counts by state and a row a point. Raises ConfigError before anything starts; Stopped
    after a signal, when all points have saved.
    """
    sweep = load_sweep(source)
    planner = Planner(sweep, overrides)
    directory = Directory(workdir)
    if sweep.search is not None and not isinstance(executor, Local):
        raise ConfigError(
            "--executor: a search needs --executor=local: each point depends on others"
        )
    if sweep.stop is not None and not isinstance(executor, Local):
        raise ConfigError("--executor: early stopping needs --executor=local; set stop=None")
    planned = planner.plan(sweep.points) if sweep.search is None else []
    start = time.monotonic()
    with directory.locked():
        planned = directory.adopt(planned)
        if sweep.search is None:
            _record(directory, planned, sweep, source)
        if isinstance(executor, Local):
            _run_local(sweep, planner, planned, directory, executor, source, again)
        else:
            todo = _todo(directory, [p.name for p in planned], sweep, again)
            if isinstance(executor, Slurm):
                submit(directory, todo, executor, sweep.retries)
            else:
                write_manifests(directory, todo, executor)
    return {**summary(directory), "seconds": time.monotonic() - start}


def _record(
    directory: Directory,
    planned: Sequence[Planned],
    sweep: Sweep,
    source: str,
    proposed: dict[str, dict[str, Any]] | None = None,
) -> None:
    settings: dict[str, Any] = {"evaluate": [e.given() for e in sweep.evaluate]}
    if proposed is not None:
        settings["proposed"] = proposed
    directory.write(planned, source, settings)


def _todo(directory: Directory, names: Sequence[str], sweep: Sweep, again: bool) -> list[str]:
    """The points with something left to do, those that failed before with their last words."""
    todo, evaluations = [], [e.given() for e in sweep.evaluate]
    for name in names:
        if directory.settled(name, sweep.stop is not None, evaluations):
            continue
        status = directory.status(name)
        if status["state"] == FAILED:
            if not again:
                continue
            print(f"{name}: failed before ({status.get('error')}); trying again", file=sys.stderr)
            for line in directory.last_lines(name, 3):
                print(f"    {line}", file=sys.stderr)
        todo.append(name)
    return todo


def _run_local(
    sweep: Sweep,
    planner: Planner,
    planned: list[Planned],
    directory: Directory,
    local: Local,
    source: str,
    again: bool,
) -> None:
    steps = {p.name: p.experiment.train.steps for p in planned}
    next_point: Callable[[], str | None] = lambda: None  # noqa: E731
    ended: Callable[[str, str], None] = lambda point, state: None  # noqa: E731
    todo = _todo(directory, list(steps), sweep, again)
    states = {name: directory.status(name)["state"] for name in steps}
    states |= dict.fromkeys(todo, WAITING)
    live = Live(directory, states, steps)
    if sweep.search is not None:
        proposals = Proposals(sweep.search, planner, directory, live)

        def record() -> None:
            _record(directory, proposals.planned, sweep, source, proposals.proposed)

        next_point, ended = proposals.connect(record)
    done = sum(state in (DONE, ENDED) for state in states.values())
    if done:
        live.note(f"{done} of {len(states)} points are done already")
    if not todo and sweep.search is None:
        return
    scheduler = Scheduler(
        directory,
        todo,
        local,
        live,
        retries=sweep.retries,
        rule=sweep.stop,
        next_point=next_point,
        ended=ended,
    )
    scheduler.run()


def summary(directory: Directory) -> dict[str, Any]:
    """How a sweep stands: counts by state, and a row a point, the best first."""
    plan = directory.plan()
    wanted = plan["settings"].get("evaluate", [])
    names = dict(zip(map(str, wanted), _names_of(wanted)))
    rows = []
    for point in plan["points"]:
        status, state = directory.status(point["name"]), directory.state(point["name"])
        last = {k: status.get(k) for k in ("step", "loss", "eval_loss")}
        found = {
            names[str(one["settings"])]: {k: one[k] for k in EVALUATED if k in one}
            for one in status.get("evaluated") or []
            if str(one["settings"]) in names
        }
        if state in (RUNNING, STOPPED, FAILED, ENDED):
            records = directory.records(point["name"])
            record = records[-1] if records else {}
            last |= {k: record.get(k) for k in ("step", "loss", "eval_loss")}
        rows.append(
            {
                "point": point["name"],
                "state": state,
                **last,
                "evaluations": found,
                "params": point["params"],
                "state_bytes": point["state_bytes"],
                "seconds": status.get("seconds"),
                "error": status.get("error") if state == FAILED else None,
            }
        )
    rows.sort(key=_rank)
    counts = Counter(row["state"] for row in rows)
    return {
        "workdir": str(directory.path),
        "points": len(rows),
        **{state.replace(" ", "_"): counts[state] for state in STATES},
        "rows": rows,
    }


def _names_of(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """What tells the evaluations of a sweep apart; a single one has nothing to tell."""
    fields = dict.fromkeys(key for one in evaluations for key in one)
    differ = [k for k in fields if len({str(one.get(k)) for one in evaluations}) > 1]
    return [
        ", ".join(f"{key}={str(one[key]).lower()}" for key in differ if key in one)
        for one in evaluations
    ]


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    """The first evaluation decides, or else the loss."""
    first: dict[str, Any] = next(iter(row["evaluations"].values()), {})
    accuracy = first.get("accuracy")
    values = [first.get("word_perplexity"), None if accuracy is None else -accuracy]
    values += [row["eval_loss"], row["loss"]]
    ranks = [(place, value) for place, value in enumerate(values) if value is not None]
    return ranks[0] if ranks else (len(values), 0.0)
