"""Tokens, time and speed of a run, and where its time goes.

Time is counted by what it is spent on: "training" (steps that count, the first one after a start
left out, since it compiles), "evaluating" and "saving". Steps that a killed run made after its last
checkpoint are made again, so they do not count. goodput = training / wall time since the run was
first started, with everything that went wrong in between.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

KINDS = ("training", "evaluating", "saving")


class Clock:
    """Counts from where the run stood; pauses count as time but not against the speed.

    tokens, seconds, spent: of the run up to the checkpoint it goes on from. began: when it was
    first started, in seconds since 1970.
    """

    def __init__(
        self,
        tokens: int = 0,
        seconds: float = 0.0,
        spent: Mapping[str, float] | None = None,
        began: float | None = None,
    ):
        self.tokens = tokens
        self.spent = dict.fromkeys(KINDS, 0.0) | dict(spent or {})
        self._begin = time.monotonic() - seconds
        self._began = time.time() if began is None else began
        self._start, self._start_tokens, self._first = time.monotonic(), tokens, True
        self._mark, self._marked = self._start, tokens
        self._step_end = self._start
        self._steps: list[float] = []
        self._waits: list[float] = []

    def seconds(self) -> float:
        """Wall time of the run, all its sessions together."""
        return time.monotonic() - self._begin

    def goodput(self) -> float:
        """Share of the wall time since the first start that went into steps that count."""
        return self.spent["training"] / max(time.time() - self._began, 1e-9)

    def step(self, tokens: int) -> None:
        """A step with so many target tokens has ended."""
        now = time.monotonic()
        self.tokens += tokens
        if self._first:
            self._first = False
            self._mark, self._marked = now, self.tokens
        else:
            self._steps.append(now - self._step_end)
            self.spent["training"] += now - self._step_end
        self._step_end = now

    def rate(self) -> float:
        """Tokens a second since the last call, pauses and the first step (it compiles) left out."""
        now = time.monotonic()
        if self.tokens == self._marked:  # nothing but that first step
            return (self.tokens - self._start_tokens) / (now - self._start)
        rate = (self.tokens - self._marked) / max(now - self._mark, 1e-9)
        self._mark, self._marked = now, self.tokens
        return rate

    def pace(self) -> dict[str, Any]:
        """Milliseconds of the steps since the last call, and of the waits for their batches."""
        steps, waits = self._steps, self._waits
        self._steps, self._waits = [], []
        if not steps:
            return {}
        p50, p90 = np.percentile(steps, [50, 90])
        values = {"step_ms_p50": p50, "step_ms_p90": p90, "step_ms_max": max(steps)}
        values |= {"host_ms_p50": float(np.median(waits))} if waits else {}
        return {name: round(1e3 * float(value), 3) for name, value in values.items()}

    @contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Time within is not training, but spent on `kind`."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            self.spent[kind] += spent
            self._mark += spent
            self._step_end += spent

    @contextmanager
    def host(self) -> Iterator[None]:
        """Time within is this process's own work for a step: reading and placing its batch."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waits.append(time.monotonic() - start)
