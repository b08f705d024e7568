"""Commands about many runs: sweep, match, report, completion."""

import argparse
from pathlib import Path
from typing import Any

from memjax.commands.base import Command, add_workdir, make_parser, read_experiment, refuse_unknown
from memjax.config import ConfigError, parse


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sweep", metavar="FILE", help="a Python file with get_sweep(); FILE:variant passes one")
    text = "where the sweep lives; default runs/<name of the sweep>; an existing sweep is finished"
    add("--workdir", metavar="DIR", help=text)
    add("--executor", choices=("local", "slurm", "kubernetes"), default="local", help="who runs it")
    add("--dry-run", action="store_true", help="show the points and what they cost; run nothing")
    add("--status", action="store_true", help="show how far the sweep in --workdir is")
    add("--speed", type=float, metavar="F", help="operations a second of a run, to estimate hours")
    add("--no-retry", action="store_true", help="leave points alone that failed before")


SWEEP_HELP = """\
settings (docs/sweeps.md lists all fields):
  --config.PATH=VALUE      override one field of every point
  --local.jobs=N           points at once here; --local.gpus=0,1 shares out GPUs
  --slurm.FIELD=VALUE      partition, minutes, nodes, gpus_per_node, wait, ...
  --kubernetes.FIELD=VALUE image, claim, mount, gpus, tpu, topology, hosts, ...
"""


def _sweep(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    _use_cpu()
    from memjax.sweeps import kubernetes, local, run, slurm
    from memjax.sweeps.directory import Directory
    from memjax.sweeps.dry_run import dry_run

    kinds: dict[str, type] = {
        "local": local.Local,
        "slurm": slurm.Slurm,
        "kubernetes": kubernetes.Kubernetes,
    }
    settings: dict[str, Any] = {}
    for name, kind in kinds.items():
        given = [a for a in rest if a.startswith(f"--{name}")]
        if given and name != args.executor:
            raise ConfigError(f"{given[0]}: needs --executor={name}, not {args.executor}")
        settings[name], rest = parse(kind, rest, kind(), name)
    overrides = []
    for argument in rest:
        path, equals, text = argument.partition("=")
        if not path.startswith("--config.") or not equals:
            raise ConfigError(f"{argument}: a sweep takes --config.PATH=VALUE; see --help")
        overrides.append((path.removeprefix("--config."), text))
    if args.status:
        if args.workdir is None and args.sweep is None:
            raise ConfigError("--status: which sweep? give --workdir=DIR")
        return run.summary(Directory(args.workdir or run.default_workdir(args.sweep)))
    if args.sweep is None:
        raise ConfigError("--sweep: missing; give a Python file with get_sweep()")
    if args.dry_run:
        return dry_run(args.sweep, args.workdir, overrides, args.speed, args.executor)
    workdir = args.workdir or run.default_workdir(args.sweep)
    executor = settings[args.executor]
    return run.run_sweep(args.sweep, workdir, executor, overrides, not args.no_retry)


def _use_cpu() -> None:
    """Keep this process off the accelerators: it only counts, and those it starts need them."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _match_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, required=False)
    add = parser.add_argument
    add("--to", metavar="OTHER", required=True, help="a number, a config file, or a run directory")
    by = ("params", "non_embedding", "state", "flops")
    add("--by", choices=by, default="params", help="what is to agree; default params")
    add("--change", metavar="PATH,PATH", help="fields to solve for, as in model.d_model")
    add("--tolerance", type=float, default=0.01, metavar="X", help="default 0.01: within 1 %%")
    add("--save", metavar="FILE", help="write the matched config here, as JSON")


def _match(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    _use_cpu()
    from memjax.match import run_match

    def load(name: str):
        return (
            read_experiment([], name)
            if Path(name).is_dir()
            else read_experiment([f"--config={name}"])
        )

    try:
        target: Any = float(args.to)
    except ValueError:
        target = load(args.to)
    return run_match(
        read_experiment(rest, args.workdir),
        target,
        by=args.by,
        change=tuple(filter(None, (args.change or "").split(","))),
        tolerance=args.tolerance,
        save=args.save,
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folder", nargs="?", default="runs", help="a run, a sweep or a folder of them; default runs"
    )
    add(
        "--out",
        metavar="FOLDER",
        help="where report.html and the figures go; default FOLDER/report",
    )
    add("--title", metavar="TEXT", help="heading of the report")


def _report(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.report import make_report

    refuse_unknown(rest)
    return make_report(args.folder, args.out, args.title)


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")


def _completion(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.commands import COMMANDS
    from memjax.completion import script

    refuse_unknown(rest)
    parsers = {name: make_parser(name, command) for name, command in COMMANDS.items()}
    text = script(args.shell, parsers)
    if not args.json:
        print(text)
    return {"shell": args.shell, "script": text}


SWEEPS = {
    "sweep": Command(
        "run many configs to the end, here, on Slurm or on Kubernetes",
        _sweep_arguments,
        _sweep,
        examples="memjax sweep --sweep=experiments/carry/sweep.py --dry-run\n"
        "  memjax sweep --sweep=experiments/carry/sweep.py --local.jobs=2\n"
        "  memjax sweep --sweep=experiments/carry/sweep.py --executor=slurm",
        settings=("local", "slurm", "kubernetes"),
        help=SWEEP_HELP,
        failed=lambda result: result.get("failed", 0) > 0,
    ),
    "match": Command(
        "solve a width so that two configs agree in size, state or FLOPs",
        _match_arguments,
        _match,
        examples="memjax match --config=configs/bench.py:delta --to=configs/bench.py:transformer",
    ),
    "report": Command(
        "make one HTML page of runs: table, curves, failures",
        _report_arguments,
        _report,
        takes_config=False,
        examples="memjax report runs/carry",
    ),
    "completion": Command(
        "print a script that completes commands and fields in your shell",
        _completion_arguments,
        _completion,
        takes_config=False,
        examples='eval "$(memjax completion bash)"  # in ~/.bashrc\n'
        "  memjax completion fish > ~/.config/fish/completions/memjax.fish",
    ),
}
