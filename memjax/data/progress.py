"""Progress of long work: a bar on a terminal, plain lines elsewhere, both on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


Advance = Callable[[int], None]  # called with the number of bytes read since the last call


@contextmanager
def reading(label: str, total: int) -> Iterator[Advance]:
    """Show how much of `total` bytes is read; yields the function that counts them."""
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        with _lines(label, total) as advance:
            yield advance


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda size: progress.advance(task, size)


@contextmanager
def _lines(label: str, total: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(size: int) -> None:
        nonlocal last, done
        done += size
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            share = 100 * done / max(total, 1)
            print(f"{label}: {share:.0f} % of {total / 1e6:.1f} MB", file=sys.stderr, flush=True)

    yield advance
    seconds = time.monotonic() - start
    print(f"{label}: {done / 1e6:.1f} MB in {seconds:.1f} s", file=sys.stderr, flush=True)
