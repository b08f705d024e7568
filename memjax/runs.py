"""Run directories: which there are and how far they are."""

import json
from pathlib import Path
from typing import Any

from memjax.config import ConfigError
from memjax.training.metrics import FILE, read_records


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
    metrics = run / FILE
    records = read_records(metrics) if metrics.is_file() else []
    last = records[-1] if records else {}
    saved = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    step = max([last.get("step", 0), *saved])  # records come every few steps, checkpoints between
    row |= {"step": step, "loss": last.get("loss"), "tokens": last.get("tokens")}
    row["evaluations"] = len(list((run / "eval").glob("*.json")))
    return row
