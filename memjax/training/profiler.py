"""A profiler capture of some steps."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Captures steps first to last into `folder`; nothing if `steps` is None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._on = steps, folder, False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Called before `step` is dispatched."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Called after `step` is dispatched; waits for its result if the capture ends here."""
        if self._on and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
