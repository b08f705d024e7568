"""Completion in the shell: commands, options, their choices, and every field of a config.

The script holds all words, so that pressing Tab starts no Python. Print it anew after an update.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from memjax.config import OneOf
from memjax.experiment import Experiment
from memjax.mixers import MIXERS
from memjax.sweeps.kubernetes import Kubernetes
from memjax.sweeps.local import Local
from memjax.sweeps.slurm import Slurm

SETTINGS: dict[str, type] = {"local": Local, "slurm": Slurm, "kubernetes": Kubernetes}

BASH = """\
# Completion of memjax for bash.
_memjax() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" words current command choices cut
  read -r -a words <<< "$line"
  [[ "$line" == *[[:space:]] ]] && words+=("")
  current="${{words[-1]}}"
  command="${{words[1]}}"
  if (( ${{#words[@]}} <= 2 )); then
    COMPREPLY=($(compgen -W "{commands}" -- "$current"))
    return
  fi
  case "$command:$current" in
{values}
    *:--*=*)
      COMPREPLY=($(compgen -f -- "${{current#*=}}"))
      compopt -o filenames 2> /dev/null
      return ;;
  esac
  case "$command" in
{options}
  esac
  COMPREPLY=($(compgen -W "$choices" -- "$current"))
  # What readline puts in goes behind the last word break, which may be an = or a :.
  cut="${{current%"${{current##*[=:]}}"}}"
  COMPREPLY=("${{COMPREPLY[@]#"$cut"}}")
  [[ ${{#COMPREPLY[@]}} == 1 && "${{COMPREPLY[0]}}" == *= ]] && compopt -o nospace 2> /dev/null
}}
complete -o nospace -F _memjax memjax"""

ZSH = """\
#compdef memjax
# Completion of memjax for zsh.
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
_memjax() {{
  local current="${{words[CURRENT]}}" command="${{words[2]}}"
  local -a choices
  if (( CURRENT == 2 )); then
    compadd -- {commands}
    return
  fi
  case "$command:$current" in
{values}
    *:--*=*)
      compset -P '*='
      _files
      return ;;
  esac
  case "$command" in
{options}
  esac
  compadd -S '' -- ${{(M)choices:#*=}}
  compadd -- ${{choices:#*=}}
}}
compdef _memjax memjax"""


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script for a shell: "bash", "zsh" or "fish"."""
    if shell == "fish":
        return _fish(parsers)
    return _bash(parsers) if shell == "bash" else _zsh(parsers)


def _bash(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    take = 'COMPREPLY=($(compgen -W "{}" -- "${{current#*=}}")); return ;;'
    options = [f'    {name}) choices="{_all_words(name, p)}" ;;' for name, p in parsers.items()]
    return BASH.format(
        commands=" ".join(parsers),
        options="\n".join(options),
        values="\n".join(_values(parsers, take)),
    )


def _zsh(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    take = "compset -P '*='; compadd -- {}; return ;;"
    options = [f"    {name}) choices=({_all_words(name, p)}) ;;" for name, p in parsers.items()]
    return ZSH.format(
        commands=" ".join(parsers),
        options="\n".join(options),
        values="\n".join(_values(parsers, take)),
    )


def _values(parsers: Mapping[str, argparse.ArgumentParser], take: str) -> Iterator[str]:
    """A branch for each option with choices; `take` says what the shell does with them."""
    for command, parser in parsers.items():
        for flag, choices in _choices(parser).items():
            yield f"    {command}:{flag}=*) {take.format(' '.join(choices))}"


def _all_words(command: str, parser: argparse.ArgumentParser) -> str:
    words = _words(command, parser)
    for action in parser._actions:
        if not action.option_strings and action.choices:
            words = [*action.choices, *words]
    return " ".join(words)


def _fish(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    lines = ["# Completion of memjax for fish.", "complete -c memjax -f"]
    for command, parser in parsers.items():
        here = f'-n "__fish_seen_subcommand_from {command}"'
        about = (parser.description or "").replace("'", "")
        lines.append(f"complete -c memjax -n __fish_use_subcommand -a {command} -d '{about}'")
        words = _words(command, parser)
        lines.append(f"complete -c memjax {here} -a '{' '.join(words)}'")
        for flag, choices in _choices(parser).items():
            pairs = " ".join(f"{flag}={choice}" for choice in choices)
            lines.append(f"complete -c memjax {here} -a '{pairs}'")
    return "\n".join(lines)


def _words(command: str, parser: argparse.ArgumentParser) -> list[str]:
    words = []
    for action in parser._actions:
        for flag in action.option_strings:
            if flag.startswith("--"):
                words.append(flag if action.nargs == 0 else f"{flag}=")
    epilog = parser.epilog or ""
    if "--config.PATH" in epilog:
        words += [] if command == "sweep" else ["--config="]
        words += [f"--config.{path}=" for path in field_paths(Experiment)]
    for name, kind in SETTINGS.items():
        if f"--{name}." in epilog:
            words += [f"--{name}.{path}=" for path in field_paths(kind)]
    return words


def _choices(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    return {
        flag: [str(choice) for choice in action.choices]
        for action in parser._actions
        for flag in action.option_strings
        if action.choices is not None
    }


def field_paths(config: type) -> list[str]:
    """The paths of all fields, those of every mixer under the name of its kind included."""
    return list(_paths(config, ""))


def _paths(config: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        path = f"{prefix}{field.name}"
        if path == "model.mixers":
            for kind, (mixer, _) in MIXERS.items():
                yield from _paths(mixer, f"{path}.{kind}.")
            continue
        parts = list(dict.fromkeys(_dataclasses(hints[field.name])))
        if not parts:
            yield path
        if len(parts) > 1:
            yield f"{path}.kind"
        inner = [p for part in parts for p in _paths(part, f"{path}.")]
        yield from dict.fromkeys(inner)


def _dataclasses(hint: Any) -> Iterator[type]:
    """The config classes that a field may hold."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        marks = [mark for mark in args[1:] if isinstance(mark, OneOf)]
        if marks:
            yield from marks[0].kinds().values()
        else:
            yield from _dataclasses(args[0])
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            yield from _dataclasses(arg)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
