"""What stops a run: each is one line for the user."""

import signal

from memjax.errors import Stopped, WorkError


class TrainingError(WorkError):
    """The run cannot go on; the message says why and what to do."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, or none can be read."""


class Diverged(TrainingError):
    """Too many steps in a row had a non-finite loss or gradient."""


class Interrupted(Stopped):
    """A signal ended the run after its state was saved; the same command goes on with it.

    The process should exit with `status`: 75 (try again) after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, received: signal.Signals, step: int):
        self.received, self.step = received, step
        message = f"{received.name}: saved at step {step}; run the same command to go on"
        super().__init__(received, message)
