"""What every command is made of, and how it finds its config."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memjax.config import ConfigError, parse

CONFIG_HELP = """\
config:
  --config=FILE[:variant]  a Python file with get_config(), or a .json file;
                           without it the defaults are used
  --config.PATH=VALUE      override one field, as in --config.model.d_model=512
"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str):
        raise ConfigError(f"{message}; see {self.prog} --help")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its arguments, and the function that carries it out and returns its result."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], Any]
    takes_config: bool = True
    examples: str = ""
    settings: tuple[str, ...] = ()
    """Further settings with fields, given as --NAME.FIELD=VALUE."""
    help: str = ""
    """What --help says of them, instead of what it says of configs."""
    failed: Callable[[Any], bool] = lambda result: False
    """Whether the result, printed as it is, means exit status 1."""

    def takes(self, argument: str) -> bool:
        """Whether an argument sets a config or a setting of this command."""
        flag = argument.partition("=")[0].partition(".")[0]
        known = ("config", *self.settings) if self.takes_config else self.settings
        return flag.removeprefix("--") in known


def read_experiment(rest: list[str], workdir: str | None = None):
    """The experiment of --config arguments, or the one saved in `workdir`."""
    from memjax.experiment import Experiment

    if workdir is not None and not any(a.split("=")[0] == "--config" for a in rest):
        saved = Path(workdir) / "config.json"
        if not saved.is_file():
            raise ConfigError(f"--workdir={workdir}: holds no config.json; give a run directory")
        rest = [f"--config={saved}", *rest]
    experiment, unknown = parse(Experiment, rest, Experiment())
    refuse_unknown(unknown)
    return experiment


def refuse_unknown(unknown: list[str], known: tuple[str, ...] = ()) -> None:
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        raise ConfigError(f"{unknown[0]}: no such argument{hint}")


def add_workdir(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--workdir", metavar="RUN", required=required, help="the run's directory")


def config_or_workdir(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, required=False)


def make_parser(name: str, command: Command) -> Parser:
    """The parser of a command, with its settings and examples at the end of its help."""
    epilog = command.help or (CONFIG_HELP if command.takes_config else "")
    epilog += f"\nexamples:\n  {command.examples}\n" if command.examples else ""
    parser = Parser(
        prog=f"memjax {name}",
        description=command.summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    return parser
