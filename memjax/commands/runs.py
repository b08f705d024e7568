"""Commands about one run: train, eval, generate, inspect, data, describe, bench, list."""

import argparse
import dataclasses
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memjax.commands.base import (
    Command,
    add_workdir,
    config_or_workdir,
    read_experiment,
    refuse_unknown,
)
from memjax.config import ConfigError
from memjax.errors import Stopped

if TYPE_CHECKING:  # every command would pay for its import
    from memjax.distributed import Processes
    from memjax.sharding import Mesh


def _default_workdir(rest: list[str]) -> str:
    named = [a.partition("=")[2] for a in rest if a.startswith("--config=")]
    stem, _, variant = named[-1].partition(":") if named else ("default", "", "")
    return str(Path("runs") / "-".join(filter(None, (Path(stem).stem, variant))))


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    text = "where the run lives; default runs/<name of the config>; an existing run is resumed"
    parser.add_argument("--workdir", metavar="RUN", help=text)
    several = parser.add_argument_group("one run on several processes (docs/distributed.md)")
    add = several.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which one this is, from 0")
    auto = "find them by the cluster; default auto: within Slurm or Open MPI"
    add("--distributed", choices=("auto", "on", "off"), default="auto", help=auto)
    text = "silence after which a process counts as lost; default 100"
    add("--lost-after", type=int, default=100, metavar="S", help=text)


def _train(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.distributed import connect
    from memjax.training.loop import train

    workdir = args.workdir or _default_workdir(rest)
    experiment = read_experiment(rest)
    watch = connect(_processes(args))
    if not rest:
        what = f"{'+'.join(experiment.model.pattern)} on {experiment.data.source}"
        print(
            f"training the defaults, {what}, in {workdir}: Ctrl-C saves, --help tells more",
            file=sys.stderr,
        )
    try:
        summary = train(experiment, workdir, watch)
    except Stopped:  # every process stops at the same step, and none of them is lost
        if watch is not None:
            watch.finish()
        raise
    if watch is not None:
        watch.finish()
    if not args.json and (watch is None or watch.first):
        quoted = f"--workdir={shlex.quote(workdir)}"
        print(f"run       {workdir}: config.json, metrics.jsonl, checkpoints/, tensorboard/")
        print(f"evaluate  memjax eval {quoted}")
        print(f"sample    memjax generate {quoted} --prompt='def '")
    return summary


def _processes(args: argparse.Namespace) -> "Processes":
    """The other processes of the run, by flags or else by the variables of JAX."""
    from memjax.distributed import Processes, from_environment

    given = {"coordinator": args.coordinator, "count": args.processes, "index": args.process}
    if all(value is None for value in given.values()) and args.distributed != "off":
        given = from_environment(os.environ)
    return Processes(mode=args.distributed, lost_after=args.lost_after, **given)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
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

    refuse_unknown(rest)
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
    add_workdir(parser)
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

    refuse_unknown(rest)
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


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add = parser.add_argument
    add("--text", metavar="FILE", required=True, help="the text to read, one document")
    add("--stride", type=int, metavar="N", help="tokens a measurement; default: 64 measurements")
    add("--tokens", type=int, default=4096, metavar="N", help="read so many at most; default 4096")
    add("--step", type=int, metavar="N", help="checkpoint to use; default the newest")


def _inspect(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.report.inspection import run_inspect

    refuse_unknown(rest)
    return run_inspect(
        args.workdir, args.text, stride=args.stride, tokens=args.tokens, step=args.step
    )


def _data(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    from memjax.data import describe

    return describe(read_experiment(rest, args.workdir).data)


def _describe_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, required=False)
    text = "compile the step for this mesh, on virtual devices, and count what devices exchange"
    parser.add_argument("--mesh", metavar="AXIS=N,..", help=text)


def _simulate(mesh: "Mesh") -> None:
    """Virtual devices for a mesh given in numbers: to describe it takes none of its machines."""
    import jax

    sizes = [getattr(mesh, field.name) for field in dataclasses.fields(mesh)]
    devices = math.prod(size for size in sizes if size != "auto")
    if devices > 1:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)


def _describe(args: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    if args.mesh is not None:
        from memjax.sharding import virtual_devices

        sizes = [f"--config.mesh.{pair}" for pair in args.mesh.split(",") if pair]
        rest = [*rest, "--config.mesh.data=1", *sizes]
        virtual_devices(read_experiment(rest, args.workdir).mesh)
    from memjax.data import load_tokenizer
    from memjax.describe import describe
    from memjax.footprint import footprint

    experiment = read_experiment(rest, args.workdir)
    if args.mesh is None:
        _simulate(experiment.mesh)
    vocab_size = load_tokenizer(experiment.data).vocab_size
    described = describe(experiment, vocab_size)
    described |= {"memory_bytes": footprint(experiment, vocab_size)}
    if args.mesh is None:
        return described
    from memjax.collectives import report

    return described | {"mesh": report(experiment, vocab_size)}


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser, required=False)
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
        read_experiment(rest, args.workdir),
        seconds=args.seconds,
        lengths=numbers("lengths"),
        positions=numbers("positions"),
        depths=numbers("depths"),
    )


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", help="where runs are; default runs")


def _list(args: argparse.Namespace, rest: list[str]) -> list[dict[str, Any]]:
    from memjax.runs import list_runs

    refuse_unknown(rest)
    return list_runs(args.folder)


RUNS = {
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
        "  memjax eval --workdir=runs/first --task=wikitext --data=wikitext-2",
    ),
    "generate": Command(
        "sample text from a run",
        _generate_arguments,
        _generate,
        takes_config=False,
        examples="memjax generate --workdir=runs/first --prompt='import ' --temperature=0.8",
    ),
    "inspect": Command(
        "draw what a run's memories wrote, kept and read along a text",
        _inspect_arguments,
        _inspect,
        takes_config=False,
        examples="memjax inspect --workdir=runs/first --text=README.md",
    ),
    "data": Command(
        "read, tokenize and cache the data of a config, and count it",
        config_or_workdir,
        _data,
        examples="memjax data --config.data.source=wikitext --config.data.path=wikitext-2",
    ),
    "describe": Command(
        "parameters, state bytes, FLOPs and memory of a config",
        _describe_arguments,
        _describe,
        examples="memjax describe --config=configs/quickstart.py\n"
        "  memjax describe --config=configs/quickstart.py --mesh=data=2,fsdp=2,context=2",
    ),
    "bench": Command(
        "time training and decoding against the roof of this machine",
        _bench_arguments,
        _bench,
        examples="memjax bench --config=configs/bench.py:transformer",
    ),
    "list": Command("list runs and how far they are", _list_arguments, _list, takes_config=False),
}
