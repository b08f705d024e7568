"""What a sweep looks like while it runs: a live table on a terminal, a line an event elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from memjax.sweeps.directory import DONE, ENDED, FAILED, RUNNING, STOPPED, WAITING, Directory

COLOURS = {DONE: "green", FAILED: "red", RUNNING: "cyan", STOPPED: "yellow", ENDED: "magenta"}
LINES_APART_S = 30.0
FAILURE_LINES = 6


class Live:
    """The points that run, counts of the others, and what failed; a context manager."""

    def __init__(self, sweep: Directory, states: Mapping[str, str], steps: Mapping[str, int]):
        """states: state of every point. steps: training steps of every point."""
        self.sweep, self.states, self.steps = sweep, dict(states), dict(steps)
        self.at: dict[str, dict[str, Any]] = {}
        self.began: dict[str, float] = {}
        self.terminal = sys.stderr.isatty()
        self.console = Console(stderr=True)
        self._live = RichLive(console=self.console, auto_refresh=False, transient=True)
        self._last = self._begin = time.monotonic()

    def __enter__(self) -> "Live":
        if self.terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.terminal:
            self._live.stop()

    def running(self, point: str) -> None:
        """A point was given to a worker."""
        self.states[point], self.began[point] = RUNNING, time.monotonic()
        self.at.pop(point, None)

    def progress(self, point: str, record: dict[str, Any]) -> None:
        """The newest record of a running point."""
        self.at[point] = record

    def settled(self, point: str, state: str, error: str) -> None:
        """A point has ended, a failed one with this error."""
        self.states[point] = state
        self.at.pop(point, None)
        status = self.sweep.status(point)
        seconds = time.monotonic() - self.began.get(point, time.monotonic())
        values = [f"{key} {status[key]:.4f}" for key in ("loss", "eval_loss") if status.get(key)]
        self.note(
            f"{self._count()} {point}: {state} in {seconds:.1f} s  {'  '.join(values)}".rstrip()
        )
        if state == FAILED:
            for line in self.failure(point, error):
                self.note(f"    {line}")

    def failure(self, point: str, error: str) -> list[str]:
        """What a failed point said last, and where the rest is."""
        lines = [line for line in self.sweep.last_lines(point, FAILURE_LINES) if error not in line]
        return [f"error: {error}", *lines, f"log: {self.sweep.log(point)}"]

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.terminal:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def refresh(self) -> None:
        """Draw the table anew, or now and then a line."""
        if self.terminal:
            self._live.update(Group(self._table(), Text(self._counts())), refresh=True)
        elif time.monotonic() - self._last > LINES_APART_S:
            self._last = time.monotonic()
            shown = [f"{point} {self._steps(point)}" for point in self.at]
            self.note(f"{self._counts()}  {'; '.join(shown)}")

    def _table(self) -> Table:
        table = Table(box=None, title="running", title_justify="left")
        table.add_column("point", overflow="ellipsis", no_wrap=True)
        for name in ("step", "loss", "valid", "tokens/s"):
            table.add_column(name, justify="right")
        for point, record in self.at.items():
            loss, valid = record.get("loss"), record.get("eval_loss")
            rate = record.get("tokens_per_s")
            table.add_row(
                point,
                self._steps(point),
                "-" if loss is None else f"{loss:.4f}",
                "-" if valid is None else f"{valid:.4f}",
                "-" if rate is None else f"{rate:,.0f}",
            )
        return table

    def _steps(self, point: str) -> str:
        return f"{self.at[point].get('step', 0)}/{self.steps.get(point, 0)}"

    def _count(self) -> str:
        finished = sum(state in (DONE, ENDED, FAILED) for state in self.states.values())
        return f"[{finished}/{len(self.states)}]"

    def _counts(self) -> str:
        counts = Counter(self.states.values())
        order = (DONE, RUNNING, WAITING, STOPPED, ENDED, FAILED)
        parts = [f"{counts[state]} {state}" for state in order if counts[state]]
        return f"{', '.join(parts)} of {len(self.states)}, {time.monotonic() - self._begin:,.0f} s"
