"""A save that goes on in the background."""

import threading
from typing import Any


class Save:
    """The checkpoint of `step`, being written. response: what Orbax gave for it."""

    def __init__(self, step: int, response: Any):
        self.step, self._response = step, response
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, name="memjax-save", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        """Whether it is on the disk, or failed."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait for the end; raises what it failed with."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _wait(self) -> None:
        try:
            self._response.result()
        except BaseException as error:
            self._error = error
