"""SIGTERM and SIGINT end a run after the step at hand; a second SIGINT ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether the run should end, and why."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None

    def after(self, step: int) -> signal.Signals | None:
        """The signal that ends the run after `step`; the same on every process."""
        if jax.process_count() == 1:
            return self._received
        # Only the coordinator's notice reaches all processes at one step.
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)


@contextmanager
def caught() -> Iterator[Stop]:
    """Catch both signals; what handled them before does so again afterwards.

    With several processes SIGTERM is left to JAX's coordinator, and SIGINT ends at once. Outside
    the main thread Python can catch none.
    """
    stop = Stop()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, stop.handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
