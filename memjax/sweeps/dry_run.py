"""What a sweep would cost: its points, checked and counted, before anything runs."""

import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from memjax.config import ConfigError
from memjax.sweeps.directory import PLAN, Directory
from memjax.sweeps.plan import Planner
from memjax.sweeps.run import default_workdir
from memjax.sweeps.spec import load_sweep

SHARE_OF_ROOF = 0.3
"""What a training step reaches of the roof of products; a guess, where nothing was measured."""


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
