"""Run directories: which there are and how far they are."""

import json
from pathlib import Path
from typing import Any

from memjax.config import ConfigError


def list_runs(folder: str) -> list[dict[str, Any]]:
    """One row a run below `folder`: steps done and planned, last loss, tokens, evaluations."""
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"{folder}: no such folder; train a run, or name the folder of your runs")
    found = sorted(path.parent for path in root.rglob("config.json"))
    return [_row(run, root) for run in found]


def _row(run: Path, root: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"run": str(run.relative_to(root.parent))}
    try:
        row["steps"] = json.loads((run / "config.json").read_text())["train"]["steps"]
    except (json.JSONDecodeError, KeyError, TypeError, OSError):
        return {**row, "note": "config.json cannot be read"}
    last = last_metrics(run)
    row |= {"step": last.get("step", 0), "loss": last.get("loss"), "tokens": last.get("tokens")}
    row["evaluations"] = len(list((run / "eval").glob("*.json")))
    return row


def last_metrics(run: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics, or nothing."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a killed process did not finish
    return {}
