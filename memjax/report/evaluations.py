"""Evaluations of runs: read, and named by what sets them apart."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Evaluated = tuple[str, ...]
"""Task, split, protocol, context, state and extent of an evaluation, in words; some are empty."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_evals(folder: Path) -> dict[Evaluated, dict[str, Any]]:
    """The newest result of each kind."""
    evals: dict[Evaluated, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        result = read_json(path)
        if "task" not in result:
            continue
        what = _what(result)
        if what not in evals or result.get("step", 0) >= evals[what].get("step", 0):
            evals[what] = result
    return evals


def _what(result: dict[str, Any]) -> Evaluated:
    stream, context = result.get("protocol") == "stream", result.get("context")
    parts = [str(result.get(key) or "") for key in ("task", "split", "protocol")]
    parts.append("" if context is None else f"context {context}")
    parts.append(f"state {'carried' if result.get('carry') else 'zeroed'}" if stream else "")
    cut = result.get("whole_split") is False
    parts.append(f"first {result.get('documents')} documents" if cut else "")
    return tuple(parts)


def tell_apart(found: Sequence[Evaluated]) -> tuple[str, dict[Evaluated, str]]:
    """What all evaluations have in common, and what sets each apart; empty for a single one."""
    alike = [len(set(parts)) == 1 for parts in zip(*found)]
    common = [part for part, same in zip(found[0], alike) if same and part] if found else []
    apart = {
        what: ", ".join(part for part, same in zip(what, alike) if not same and part)
        for what in found
    }
    return ", ".join(common), apart
