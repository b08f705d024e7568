"""The command line: parse, call, print.

Exit status: 0 done; 1 the work failed; 2 a mistake in the config, the arguments or the files, in
one line; 75 stopped by SIGTERM after saving (run the same command again); 130 stopped by Ctrl-C.
"""

import argparse
import dataclasses
import difflib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memjax import __version__
from memjax.config import ConfigError, parse
from memjax.platform import enable_compilation_cache, restart_with_fast_allocator

CONFIG_HELP = """\
config:
  --config=FILE[:variant]      a Python file with get_config(), or a .json file; without it the
                               defaults are used
  --config.PATH=VALUE          override one field, as in --config.model.d_model=512
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


def _experiment(rest: list[str], workdir: str | None = None):
    """The experiment of --config arguments, or the one saved in `workdir`."""
    from memjax.experiment import Experiment

    if workdir is not None and not any(a.split("=")[0] == "--config" for a in rest):
        saved = Path(workdir) / "config.json"
        if not saved.is_file():
            raise ConfigError(f"--workdir={workdir}: holds no config.json; give a run directory")
        rest = [f"--config={saved}", *rest]
    experiment, unknown = parse(Experiment, rest, Experiment())
    _refuse(unknown)
    return experiment


def _refuse(unknown: list[str], known: tuple[str, ...] = ()) -> None:
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        raise ConfigError(f"{unknown[0]}: no such argument{hint}")


def _is_config(argument: str, command: str) -> bool:
    flag = argument.partition("=")[0]
    return COMMANDS[command].takes_config and (flag == "--config" or flag[:9] == "--config.")


def _default_workdir(rest: list[str]) -> str:
    named = [a.partition("=")[2] for a in rest if a.startswith("--config=")]
    stem, _, variant = named[-1].partition(":") if named else ("default", "", "")
    return str(Path("runs") / "-".join(filter(None, (Path(stem).stem, variant))))


def _workdir(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--workdir", metavar="RUN", required=required, help="the run's directory")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    text = "where the run lives; default runs/<name of the config>; an existing run is resumed"
    parser.add_argument("--workdir", metavar="RUN", help=text)


def _train(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.training.loop import train

    workdir = args.workdir or _default_workdir(rest)
    experiment = _experiment(rest)
    summary = train(experiment, workdir)
    if not args.json:
        quoted = f"--workdir={shlex.quote(workdir)}"
        print(f"run       {workdir}: config.json, metrics.jsonl, checkpoints/, tensorboard/")
        print(f"evaluate  memjax eval {quoted}")
        print(f"sample    memjax generate {quoted} --prompt='def '")
    return summary


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir(parser)
    add = parser.add_argument
    tasks = ("wikitext", "pg19", "text", "stdlib")
    add("--task", choices=tasks, help="default: the run's own data")
    add("--data", metavar="PATH", help="folder (or file, for text) to evaluate on")
    splits = ("train", "valid", "test", "all")
    add("--split", choices=splits, default="test", help="default test; all is text, uncut")
    add("--protocol", choices=("stream", "windows", "sliding"), help="default: the run's config")
    add("--context", type=int, metavar="N", help="tokens a segment or window")
    add("--stride", type=int, metavar="N", help="tokens a sliding window moves by")
    add("--carry", choices=("true", "false"), help="whether stream carries the memory state")
    add("--batch", type=int, metavar="N", help="documents or windows side by side")
    add("--max-documents", type=int, metavar="N", help="score the first N documents only")
    add("--step", type=int, metavar="N", help="checkpoint to evaluate; default the newest")


def _eval(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.evals.run import run_eval

    _refuse(rest)
    carry = None if args.carry is None else args.carry == "true"
    return run_eval(
        args.workdir,
        task=args.task,
        data=args.data,
        split=args.split,
        protocol=args.protocol,
        context=args.context,
        stride=args.stride,
        carry=carry,
        batch=args.batch,
        max_documents=args.max_documents,
        step=args.step,
    )


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir(parser)
    add = parser.add_argument
    add("--prompt", default="", metavar="TEXT", help="text to go on from")
    add("--prompt-file", metavar="FILE", help="read the prompt from a file")
    add("--tokens", type=int, default=200, metavar="N", help="tokens to make; default 200")
    add("--temperature", type=float, default=1.0, metavar="X", help="0 takes the likeliest token")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample among tokens that make up P")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same text")
    add("--step", type=int, metavar="N", help="checkpoint to use; default the newest")


def _generate(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.evals.run import run_generate

    _refuse(rest)
    if args.prompt_file is not None and args.prompt:
        raise ConfigError("--prompt-file: cannot be given together with --prompt; give one")
    return run_generate(
        args.workdir,
        prompt=args.prompt,
        prompt_file=args.prompt_file,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        step=args.step,
        echo=not args.json,
    )


def _config_or_workdir(parser: argparse.ArgumentParser) -> None:
    _workdir(parser, required=False)


def _data(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.data import describe

    return describe(_experiment(rest, args.workdir).data)


def _describe(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.data import load_tokenizer
    from memjax.describe import describe

    experiment = _experiment(rest, args.workdir)
    return describe(experiment, load_tokenizer(experiment.data).vocab_size)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    _workdir(parser, required=False)
    add = parser.add_argument
    add("--seconds", type=float, default=20.0, metavar="S", help="time the step for so long")
    add("--lengths", metavar="T,T", help="also time segments of these lengths")
    add("--positions", metavar="P,P", help="also time decoding at these positions")
    add("--depths", metavar="R,R", help="also compile with these repeats of the layer pattern")


def _bench(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.bench import bench

    def numbers(name: str) -> list[int]:
        text = getattr(args, name)
        try:
            values = [int(part) for part in text.split(",")] if text else []
        except ValueError:
            raise ConfigError(f"--{name}={text}: must be whole numbers and commas") from None
        if any(value < 1 for value in values):
            raise ConfigError(f"--{name}={text}: each must be at least 1")
        return values

    return bench(
        _experiment(rest, args.workdir),
        seconds=args.seconds,
        lengths=numbers("lengths"),
        positions=numbers("positions"),
        depths=numbers("depths"),
    )


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", help="where runs are; default runs")


def _list(args: argparse.Namespace, rest: list[str]) -> list[dict[str, Any]]:
    from memjax.runs import list_runs

    _refuse(rest)
    return list_runs(args.folder)


COMMANDS = {
    "train": Command(
        "train a model, or go on with a run that was stopped",
        _train_arguments,
        _train,
        examples="memjax train --config=configs/quickstart.py --workdir=runs/first\n"
        "  memjax train --config=configs/quickstart.py --config.train.steps=50",
    ),
    "eval": Command(
        "measure perplexity of a run",
        _eval_arguments,
        _eval,
        takes_config=False,
        examples="memjax eval --workdir=runs/first --split=valid\n"
        "  memjax eval --workdir=runs/first --task=wikitext --data=wikitext-2 --carry=false",
    ),
    "generate": Command(
        "sample text from a run",
        _generate_arguments,
        _generate,
        takes_config=False,
        examples="memjax generate --workdir=runs/first --prompt='import ' --temperature=0.8",
    ),
    "data": Command(
        "read, tokenize and cache the data of a config, and count it",
        _config_or_workdir,
        _data,
        examples="memjax data --config.data.source=wikitext --config.data.path=wikitext-2",
    ),
    "describe": Command(
        "parameters, state bytes, FLOPs and memory of a config",
        _config_or_workdir,
        _describe,
        examples="memjax describe --config=configs/quickstart.py",
    ),
    "bench": Command(
        "time training and decoding against the matrix-product roof of this machine",
        _bench_arguments,
        _bench,
        examples="memjax bench --config=configs/bench.py:transformer",
    ),
    "list": Command("list runs and how far they are", _list_arguments, _list, takes_config=False),
}


def _overview() -> str:
    lines = [f"memjax {__version__}: train, stress and compare memory architectures", ""]
    lines += ["usage: memjax COMMAND [arguments]; memjax COMMAND --help tells more", ""]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _parser(name: str, command: Command) -> Parser:
    epilog = CONFIG_HELP if command.takes_config else ""
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


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if argv[0] in ("--version", "version"):
        print(f"memjax {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise ConfigError(f"{name}: no such command; {hint}")
    parser = _parser(name, COMMANDS[name])
    args, unknown = parser.parse_known_args(rest)
    known = tuple(flag for action in parser._actions for flag in action.option_strings)
    _refuse([a for a in unknown if a.startswith("-") and not _is_config(a, name)], known)
    enable_compilation_cache()
    result = COMMANDS[name].run(args, unknown)
    if args.json:
        print(json.dumps(result))
    else:
        from memjax.tables import show

        show(name, result)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; mistakes of the user become one line."""
    from memjax.errors import Stopped, WorkError

    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except Stopped as stop:
        print(f"memjax: {stop}", file=sys.stderr)
        return stop.status
    except WorkError as error:
        print(f"memjax: error: {error}", file=sys.stderr)
        return 1
    except ConfigError as error:
        print(f"memjax: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("memjax: interrupted", file=sys.stderr)
        return 130


def entry() -> None:
    """The console script."""
    restart_with_fast_allocator()
    # Orbax logs the traceback of an error that it also raises, and that `main` tells in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.exit(main())
