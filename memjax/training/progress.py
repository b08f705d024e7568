"""Progress of training: a bar on a terminal, plain lines elsewhere, both on stderr."""

import math
import sys
import time
from abc import ABC, abstractmethod
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_APART_S = 2.0


class Report(ABC):
    """Shows how far a run is."""

    @abstractmethod
    def start(self, step: int) -> None:
        """Training goes on after `step`."""

    @abstractmethod
    def step(self, step: int) -> None:
        """`step` has ended."""

    @abstractmethod
    def record(self, record: dict[str, Any]) -> None:
        """A record was written to metrics.jsonl."""

    @abstractmethod
    def note(self, text: str) -> None:
        """A line that stays."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more follows."""


class Bar(Report):
    """Steps, loss, tokens a second, time left and the last evaluation, on one line."""

    def __init__(self, steps: int):
        self._console = Console(stderr=True)
        columns = (
            BarColumn(30 if self._console.width > 110 else 6),  # the numbers need the room
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(compact=True),
        )
        self._progress = Progress(*columns, console=self._console, refresh_per_second=4)
        self._task = self._progress.add_task("training", total=steps, shown="compiling")
        self._compiling, self._eval = True, ""

    def start(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        self._progress.start()

    def step(self, step: int) -> None:
        if self._compiling:
            self._compiling = False
            self._progress.update(self._task, shown="")
        self._progress.update(self._task, completed=step)

    def record(self, record: dict[str, Any]) -> None:
        if "eval_loss" in record:
            self._eval = f"  valid {record['eval_loss']:.4f}"
        self._progress.update(self._task, shown=_show(record, "tok/s") + self._eval)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class Lines(Report):
    """A line a record, at most one in two seconds, but the first and the last always."""

    def __init__(self, steps: int):
        self._steps, self._last, self._held = steps, -math.inf, ""

    def start(self, step: int) -> None:
        pass

    def step(self, step: int) -> None:
        pass

    def record(self, record: dict[str, Any]) -> None:
        valid = f"  valid {record['eval_loss']:.4f}" if "eval_loss" in record else ""
        self._held = f"step {record['step']}/{self._steps}  {_show(record)}{valid}"
        due = time.monotonic() - self._last >= LINES_APART_S
        if due or valid or record["step"] == self._steps:
            self._flush()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._held:
            print(self._held, file=sys.stderr, flush=True)
            self._held, self._last = "", time.monotonic()


class Silent(Report):
    """For every process but the first."""

    def start(self, step: int) -> None:
        pass

    def step(self, step: int) -> None:
        pass

    def record(self, record: dict[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def make_report(steps: int, first_process: bool) -> Report:
    """What suits stderr."""
    if not first_process:
        return Silent()
    return Bar(steps) if sys.stderr.isatty() else Lines(steps)


def _show(record: dict[str, Any], unit: str = "tokens/s") -> str:
    skipped = f"  skipped {record['skipped']}" if record["skipped"] else ""
    rate = record["tokens_per_s"]
    shown = f"{rate:,.0f}" if rate < 1e6 else f"{rate / 1e6:.2f}M"
    return f"loss {record['loss']:.4f}  {shown} {unit}{skipped}"
