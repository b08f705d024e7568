"""Progress of an evaluation: a bar on a terminal, plain lines elsewhere, both on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


@contextmanager
def scoring(label: str, total: int, before: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` tokens are scored; yields the function that counts them.

    before: tokens that an earlier call scored.
    """
    if before:
        print(f"{label}: going on from {before:,} of {total:,} tokens", file=sys.stderr, flush=True)
    show = _bar if sys.stderr.isatty() else _lines
    with show(label, total, before) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int, before: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, completed=before)
        yield lambda tokens: progress.advance(task, tokens)


@contextmanager
def _lines(label: str, total: int, before: int) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = before

    def advance(tokens: int) -> None:
        nonlocal last, done
        done += tokens
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            rate = (done - before) / (last - start)
            print(
                f"{label}: {100 * done / max(total, 1):.0f} % of {total:,} tokens, "
                f"{rate:,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )

    yield advance
    seconds = time.monotonic() - start
    print(f"{label}: {done - before:,} tokens in {seconds:.1f} s", file=sys.stderr, flush=True)
