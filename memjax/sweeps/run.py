"""What `memjax sweep` does: plan, show, run, and say how it went."""

import dataclasses
import statistics
import subprocess
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
    PLAN,
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

STATES = (DONE, RUNNING, WAITING, STOPPED, ENDED, FAILED)
SHARE_OF_ROOF = 0.3
"""What a training step reaches of the roof of products; a guess, where nothing was measured."""

Executor = Local | Slurm | Kubernetes


def default_workdir(source: str) -> str:
    """runs/<name>: of the folder of a file called sweep.py, else of the file, and the variant."""
    file, _, variant = source.partition(":")
    path = Path(file)
    stem = path.absolute().parent.name if path.stem == "sweep" else path.stem
    return str(Path("runs") / "-".join(filter(None, (stem, variant))))


def dry_run(
    source: str,
    workdir: str | None,
    overrides: Sequence[tuple[str, str]],
    speed: float | None,
    executor: str,
) -> dict[str, Any]:
    """The points with what they cost; nothing is written but the cache of the data."""
    sweep = load_sweep(source)
    planner = Planner(sweep, overrides)
    directory = Directory(workdir or default_workdir(source))
    planned = planner.plan(sweep.points) if sweep.search is None else []
    if (directory.path / PLAN).is_file():
        planned = directory.adopt(planned)
    rate, basis = _speed(speed, directory, executor == "local")
    rows = []
    for point in planned:
        costs = point.costs
        row = {
            "point": point.name,
            "state": directory.state(point.name),
            **costs._asdict(),
            "hours": None if rate is None else costs.flops / rate / 3600,
            "matched": {key: list(pair) for key, pair in point.matched.items()},
        }
        rows.append(row)
    if sweep.search is not None:
        print(
            f"{sweep.search.trials} points are proposed by Optuna while the sweep runs",
            file=sys.stderr,
        )
    total = sum(point.costs.flops for point in planned)
    return {
        "points": rows,
        "flops": total,
        "flops_per_s": rate,
        "basis": basis,
        "hours": None if rate is None else total / rate / 3600,
    }


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
    evaluate = [
        {k: v for k, v in dataclasses.asdict(e).items() if v is not None} for e in sweep.evaluate
    ]
    settings: dict[str, Any] = {"evaluate": evaluate}
    if proposed is not None:
        settings["proposed"] = proposed
    directory.write(planned, source, settings)


def _todo(directory: Directory, names: Sequence[str], sweep: Sweep, again: bool) -> list[str]:
    """The points with something left to do, those that failed before with their last words."""
    todo = []
    for name in names:
        if directory.settled(name, ended_count=sweep.stop is not None):
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
    rows = []
    for point in plan["points"]:
        status, state = directory.status(point["name"]), directory.state(point["name"])
        last = {k: status.get(k) for k in ("step", "loss", "eval_loss", "word_perplexity")}
        if state in (RUNNING, STOPPED, FAILED, ENDED):
            records = directory.records(point["name"])
            record = records[-1] if records else {}
            last |= {k: record.get(k) for k in ("step", "loss", "eval_loss")}
        rows.append(
            {
                "point": point["name"],
                "state": state,
                **last,
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


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    for place, key in enumerate(("word_perplexity", "eval_loss", "loss")):
        if row[key] is not None:
            return place, row[key]
    return 3, 0.0


def _speed(
    given: float | None, directory: Directory, local: bool
) -> tuple[float | None, str | None]:
    """Operations a second that a run reaches, and where the number is from."""
    if given is not None:
        return given, "--speed"
    measured = _measured(directory)
    if measured is not None:
        return measured, f"measured in {directory.path}"
    if not local:
        return None, None
    command = [sys.executable, "-m", "memjax.sweeps.roof"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None, None
    return (
        SHARE_OF_ROOF * float(done.stdout),
        f"{SHARE_OF_ROOF:.0%} of the matrix-product roof of this machine: a guess",
    )


def _measured(directory: Directory) -> float | None:
    """The median over finished points of an earlier call."""
    try:
        points = directory.plan()["points"]
    except ConfigError:
        return None
    rates = []
    for point in points[:50]:
        records = directory.records(point["name"])
        speeds = [r["tokens_per_s"] for r in records if r.get("tokens_per_s")]
        if speeds:
            rates.append(statistics.median(speeds) * point["flops_per_token"])
    return statistics.median(rates) if rates else None
