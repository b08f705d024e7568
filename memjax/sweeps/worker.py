"""The process that trains points: `python -m memjax.sweeps.worker DIR (--serve | --point=NAME)`.

With --serve it takes the names of points from standard input, one a line, and answers on standard
output with one JSON object a line, until its input ends. JAX is imported once; of a point nothing
stays behind but files. What a point prints goes to its log.

With --point (or --index, the number of a point; default $JOB_COMPLETION_INDEX or
$SLURM_ARRAY_TASK_ID) it trains one point, with every process of a job that has several, and exits
as `memjax train` does.
"""

import argparse
import contextlib
import gc
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from memjax.config import ConfigError
from memjax.errors import Stopped, WorkError

MISTAKE, FAILURE, IDLE = 2, 1, 75
GROWTH = 1 << 30  # bytes
EVALUATED = ("word_perplexity", "accuracy")


class Termination:
    """SIGTERM between points ends the worker; within one it stops the point.

    While a point trains, the training loop has its own handler, which saves first.
    """

    def __init__(self) -> None:
        self.busy = False
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.busy:
            os._exit(IDLE)
        raise Stopped(number, f"{signal.Signals(number).name}: nothing was in training")


def run_point(folder: Path, name: str, first: bool = True) -> tuple[str, int, str]:
    """Train a point and evaluate it: its state after, the exit status to go with it, and why.

    first: whether this process writes the status and evaluates. Raises Stopped where a signal comes
    before the point is under way, else nothing.
    """
    from memjax.sweeps.directory import DONE, FAILED, RUNNING, STOPPED, Directory
    from memjax.sweeps.plan import digest

    sweep, start = Directory(folder), time.time()
    error = ""
    try:
        experiment = sweep.experiment(name)
        before = sweep.status(name)
        if first:
            sweep.mark(
                name,
                state=RUNNING,
                attempts=before["attempts"] + 1,
                host=socket.gethostname(),
                pid=os.getpid(),
                cores=sorted(os.sched_getaffinity(0)),
                started=start,
                digest=digest(experiment),
                error=None,
            )
        result = _train_and_evaluate(sweep, name, experiment, first)
        state, status = DONE, 0
    except Stopped as stop:
        state, status, error, result = STOPPED, stop.status, str(stop), {}
    except WorkError as failure:
        state, status, error, result = FAILED, FAILURE, str(failure), {}
    except ConfigError as failure:
        state, status, error, result = FAILED, MISTAKE, str(failure), {}
    except Exception as failure:
        with contextlib.suppress(OSError):  # a full disk takes no log
            traceback.print_exc()
        state, status, result = FAILED, FAILURE, {}
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    if error:
        with contextlib.suppress(OSError):
            print(f"memjax: {'' if state == STOPPED else 'error: '}{error}", file=sys.stderr)
    if first:
        with contextlib.suppress(ConfigError):  # a full disk: the answer has the error
            seconds = sweep.status(name).get("seconds", 0.0) + time.time() - start
            sweep.mark(name, state=state, seconds=seconds, error=error or None, **result)
    return state, status, error


def _train_and_evaluate(sweep: Any, name: str, experiment: Any, first: bool) -> dict[str, Any]:
    from memjax.evals.run import run_eval
    from memjax.training.loop import train

    run = sweep.run(name)
    summary = train(experiment, run)
    kept = ("step", "loss", "eval_loss", "tokens", "parameters", "skipped")
    result = {key: summary.get(key) for key in kept}
    if first:
        found = sweep.status(name).get("evaluated") or [] if "already_finished" in summary else []
        known = {str(one["settings"]): one for one in found}
        result["evaluated"] = [
            known.get(str(settings)) or {"settings": settings, **_told(run_eval(run, **settings))}
            for settings in sweep.evaluations()
        ]
    return result


def _told(values: dict[str, Any]) -> dict[str, Any]:
    """Of an evaluation: the word perplexity, or the accuracy at a synthetic task."""
    return {key: values[key] for key in EVALUATED if key in values}


class _Memory:
    """What points leave behind. Compiled functions stay until the process has grown by GROWTH.

    Many serve the next point too, and to drop and compile them took as long as a tiny point.
    """

    def __init__(self) -> None:
        self._first: int | None = None

    def tidy(self) -> None:
        """Call it after each point."""
        import jax

        gc.collect()
        if self._first is None:
            gc.freeze()  # modules are there to stay: later points need not look through them
            self._first = self._resident()
        elif self._resident() - self._first > GROWTH:
            jax.clear_caches()
            gc.collect()

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def serve(folder: Path, termination: Termination) -> int:
    """Train the points that standard input names; see the module."""
    replies = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    names: queue.Queue[str | None] = queue.Queue()
    gone = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            names.put(line.strip())
        names.put(None)
        gone.set()
        if termination.busy:  # the sweep is gone: save and end
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    memory = _Memory()
    while (name := names.get()) is not None:
        try:
            termination.busy = True
            if gone.is_set():  # after busy, as the reader asks in the other order
                return 0
            with _output_to(folder / "logs" / f"{name}.log"):
                state, status, error = run_point(folder, name)
            termination.busy = False
        except Stopped:  # before the point was under way: it is as it was
            return 0 if gone.is_set() else IDLE
        answer = {"point": name, "state": state, "status": status, "error": error}
        with contextlib.suppress(BrokenPipeError):  # how the point ended is in its folder, too
            os.write(replies, f"{json.dumps(answer)}\n".encode())
        memory.tidy()
    return 0


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Standard output and error, of this process and of what it starts, added to a file."""
    kept = os.dup(1), os.dup(2)
    with open(path, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            for number, old in zip((1, 2), kept):
                os.dup2(old, number)
                os.close(old)


def run_alone(folder: Path, name: str) -> int:
    """Train one point with all processes of this job, unless it is done; the exit status."""
    import jax

    from memjax.platform import enable_compilation_cache
    from memjax.sweeps.directory import Directory

    sweep = Directory(folder)
    if sweep.settled(name, ended_count=True, evaluations=sweep.evaluations()):
        print(f"{name} is done already", file=sys.stderr)
        return 0
    join_processes()
    enable_compilation_cache()
    return run_point(folder, name, first=jax.process_index() == 0)[1]


def join_processes() -> None:
    """Join the other processes of this job, if Slurm, GKE or our manifests say there are any."""
    import jax

    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        count, mine = (environment[k] for k in ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"))
        jax.distributed.initialize(num_processes=int(count), process_id=int(mine))
        return
    slurm = int(environment.get("SLURM_NTASKS", "1")) > 1
    if slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def main(argv: list[str] | None = None) -> int:
    """Serve, or train one point."""
    parser = argparse.ArgumentParser(prog="memjax.sweeps.worker", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--serve", action="store_true")
    what.add_argument("--point")
    what.add_argument("--index", nargs="?", type=int, const=-1)
    parser.add_argument("--cores", help="numbers of the cores to run on, with commas")
    args = parser.parse_args(argv)
    if args.cores:
        os.sched_setaffinity(0, {int(core) for core in args.cores.split(",")})
    termination = Termination()
    if args.serve:
        from memjax.platform import enable_compilation_cache

        enable_compilation_cache()
        return serve(args.folder, termination)
    termination.busy = True
    name = args.point or _by_index(args.folder, args.index)
    return run_alone(args.folder, name)


def _by_index(folder: Path, index: int) -> str:
    from memjax.sweeps.directory import Directory

    if index < 0:
        given = os.environ.get("JOB_COMPLETION_INDEX") or os.environ.get("SLURM_ARRAY_TASK_ID")
        if given is None:
            raise SystemExit(
                "memjax.sweeps.worker: --index: no number, and none in the environment"
            )
        index = int(given)
    return Directory(folder).names()[index]


if __name__ == "__main__":
    import logging

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.exit(main())
