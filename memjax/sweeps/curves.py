"""Curves of points that are running, read as they grow."""

import json
import os
from collections.abc import Iterable
from typing import Any

from memjax.sweeps.directory import Directory
from memjax.training.metrics import FILE


class _Tail:
    """The records of a metrics.jsonl; each look reads what was added since the one before."""

    def __init__(self, path: str):
        self.path, self.offset, self.rest = path, 0, b""
        self.records: list[dict[str, Any]] = []

    def look(self) -> None:
        try:
            size = os.path.getsize(self.path)
        except OSError:
            return
        if size < self.offset:  # a resumed run dropped records of steps that were lost
            self.offset, self.rest, self.records = 0, b"", []
        if size == self.offset:
            return
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = self.rest + file.read()
            self.offset = file.tell()
        *lines, self.rest = data.split(b"\n")
        for line in lines:
            try:
                self.records.append(json.loads(line))
            except ValueError:
                continue


class Curves:
    """Records of the points of a sweep."""

    def __init__(self, sweep: Directory):
        self.sweep = sweep
        self._tails: dict[str, _Tail] = {}

    def _tail(self, point: str) -> _Tail:
        if point not in self._tails:
            self._tails[point] = _Tail(str(self.sweep.run(point) / FILE))
        tail = self._tails[point]
        tail.look()
        return tail

    def last(self, point: str) -> dict[str, Any]:
        """The newest record; empty before the first."""
        records = self._tail(point).records
        return records[-1] if records else {}

    def all(self, names: Iterable[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        """The curve of each point; empty for those that have not begun."""
        return {name: self.curve(name, metric) for name in names}

    def curve(self, point: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of the records that have a finite value of the metric."""
        records = self._tail(point).records
        return [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
