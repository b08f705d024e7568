"""What stops a run: each is one line for the user."""

import signal


class TrainingError(ValueError):
    """The run cannot go on; the message says why and what to do."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, or none can be read."""


class Diverged(TrainingError):
    """Too many steps in a row had a non-finite loss or gradient."""


class Interrupted(Exception):
    """A signal ended the run after its state was saved; the same command goes on with it.

    status: what the process should exit with: 75 (try again) after SIGTERM, 130 after SIGINT.
    """

    STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}

    def __init__(self, received: signal.Signals, step: int):
        self.received, self.step, self.status = received, step, self.STATUS[received]
        super().__init__(f"{received.name}: saved at step {step}; run the same command to go on")
