"""SIGTERM and SIGINT end a run after the step at hand; a second SIGINT ends it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

NOTICE = "memjax: stopping: saves after this step (Ctrl-C again ends it at once)\n"
PATIENCE_S = 2.0
SHOW_CURSOR = "\033[?25h"


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

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Of several processes: Ctrl-C is made a SIGTERM, which JAX tells to all; a second ends."""
        if self._received is not None:
            os._exit(130)  # an orderly end would wait for the others
        self._received = signal.Signals(number)
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def caught(notice: str = NOTICE) -> Iterator[Stop]:
    """Catch both signals; what handled them before does so again afterwards.

    notice: what is said when the first one comes.

    With several processes SIGTERM is left to JAX's coordinator. Outside the main thread Python can
    catch none.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    if jax.process_count() > 1:
        before = {signal.SIGINT: signal.signal(signal.SIGINT, stop.pass_on)}
    else:
        before = {n: signal.signal(n, stop.handle) for n in (signal.SIGTERM, signal.SIGINT)}
    ended, (reader, writer) = threading.Event(), os.pipe()
    os.set_blocking(writer, False)
    other = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, ended, notice), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        ended.set()
        signal.set_wakeup_fd(other)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, ended: threading.Event, notice: str) -> None:
    """Say what a signal does when it comes: its handler waits while XLA compiles, or a step runs.

    A second SIGINT ends the process if its handler has not done so soon.
    """
    interrupts = 0
    while number := os.read(reader, 1):
        interrupts += number[0] == signal.SIGINT
        if interrupts < 2:
            line = ("\n" if os.isatty(2) else "") + notice
            os.write(2, line.encode())
        elif not ended.wait(PATIENCE_S):
            os.write(2, (SHOW_CURSOR if os.isatty(2) else "").encode())
            os._exit(128 + signal.SIGINT)
