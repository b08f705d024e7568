"""The commands of memjax, by name."""

from memjax.commands.base import Command
from memjax.commands.runs import RUNS
from memjax.commands.sweeps import SWEEPS

COMMANDS: dict[str, Command] = {**RUNS, **SWEEPS}
