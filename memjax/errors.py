"""How a command can end other than well; `memjax.cli` turns each into an exit status.

A mistake of the user is a `memjax.config.ConfigError` (status 2).
"""

import signal

LOST = 76
"""Exit status of a process that lost another of its run: start all of them again."""


class WorkError(RuntimeError):
    """The work failed in a way that the message explains in one line (status 1)."""


class Stopped(Exception):
    """A signal asked the run to stop, and it saved first."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.status = 75 if signum == signal.SIGTERM else 130
