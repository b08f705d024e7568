"""Tokens, time and speed of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Counts from where the run stood; pauses count as time but not against the speed."""

    def __init__(self, tokens: int = 0, seconds: float = 0.0):
        self.tokens = tokens
        self._begin = time.monotonic() - seconds
        self._start, self._start_tokens, self._first = time.monotonic(), tokens, True
        self._mark, self._marked = self._start, tokens

    def seconds(self) -> float:
        """Wall time of the run, all its sessions together."""
        return time.monotonic() - self._begin

    def step(self, tokens: int) -> None:
        """A step with so many target tokens has ended."""
        self.tokens += tokens
        if self._first:
            self._first = False
            self._mark, self._marked = time.monotonic(), self.tokens

    def rate(self) -> float:
        """Tokens a second since the last call, pauses and the first step (it compiles) left out."""
        now = time.monotonic()
        if self.tokens == self._marked:  # nothing but that first step
            return (self.tokens - self._start_tokens) / (now - self._start)
        rate = (self.tokens - self._marked) / max(now - self._mark, 1e-9)
        self._mark, self._marked = now, self.tokens
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within is not training."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._mark += time.monotonic() - start
