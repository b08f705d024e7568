"""Points as a Slurm job array, submitted through submitit.

A task of the array runs one point in a child process. Some time before its limit, and when it is
preempted, the job saves at the end of a step and goes back into the queue; it goes on from there.
"""

import dataclasses
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from memjax.config import ConfigError, check, check_at_least
from memjax.errors import WorkError
from memjax.sweeps.curves import Curves
from memjax.sweeps.directory import RUNNING, STOPPED, WAITING, Directory
from memjax.sweeps.table import Live
from memjax.sweeps.worker import FAILURE, IDLE

LOOK_EVERY_S = 5.0
MARGIN_S = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """What each point asks of Slurm; None leaves a setting to the cluster.

    minutes: time limit of a job; a point that needs longer goes back into the queue by itself.
    save_before_s: seconds before the limit at which it saves. requeues: how often it may do so.
    nodes, tasks_per_node: processes of a point, joined by jax.distributed if there are several.
    at_once: points of the array that run side by side. setup: shell lines before the point, such
    as "module load cuda". options: further options of sbatch, by name. wait: stay until all points
    have ended; otherwise `memjax sweep --workdir=DIR --status` tells how far they are.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = 60
    save_before_s: int = 120
    requeues: int = 1000
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    memory_gb: int | None = None
    at_once: int = 256
    setup: tuple[str, ...] = ()
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    wait: bool = False

    def __post_init__(self):
        check_at_least(self, 1, "minutes", "nodes", "tasks_per_node", "cpus_per_task", "at_once")
        check_at_least(self, 0, "requeues", "gpus_per_node")
        fits = MARGIN_S < self.save_before_s < 60 * self.minutes
        check(self, "save_before_s", fits, f"must be above {MARGIN_S} and below the time limit")


class PointJob:
    """What a task of the array does: a picklable call, with submitit's way to go on later.

    The point trains in a child, which saves upon SIGTERM and never sees the signal by which Slurm
    warns of the limit: `checkpoint` hears of it, and stops the child.
    """

    def __init__(self, folder: str, retries: int, patience_s: int):
        self.folder, self.retries, self.patience_s = folder, retries, patience_s
        self._child: subprocess.Popen | None = None

    def __call__(self, point: str) -> str:
        """Train the point. Raises WorkError if it failed, or was stopped from outside."""
        command = [sys.executable, "-m", "memjax.sweeps.worker", self.folder, f"--point={point}"]
        for _ in range(self.retries + 1):
            with open(Directory(self.folder).log(point), "ab") as log:
                self._child = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_ignore_warning,
                )
                status = self._child.wait()
            if status != FAILURE:
                break
        if status == IDLE:  # preempted or cancelled: a job that ends by itself is not requeued
            time.sleep(self.patience_s)
        if status != 0:
            raise WorkError(f"{point} ended with exit status {status}; see its log")
        return point

    def checkpoint(self, point: str) -> Any:
        """Called by submitit, in a signal handler, before it requeues the job: save."""
        submitit = importlib.import_module("submitit")
        if self._child is not None:
            end = time.monotonic() + self.patience_s
            self._child.send_signal(signal.SIGTERM)
            while not _has_ended(self._child.pid) and time.monotonic() < end:
                time.sleep(0.1)
        again = PointJob(self.folder, self.retries, self.patience_s)
        return submitit.helpers.DelayedSubmission(again, point)


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended. Popen cannot tell while the handler interrupts its wait."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def submit(directory: Directory, todo: Sequence[str], settings: Slurm, retries: int = 0) -> None:
    """Queue the points that are not queued or running already. Raises ConfigError, WorkError."""
    submitit = _load_submitit()
    alive = queued()
    for name in todo:
        if str(directory.status(name).get("job")) in alive:
            print(f"{name}: in the queue as {directory.status(name)['job']}", file=sys.stderr)
    todo = [name for name in todo if str(directory.status(name).get("job")) not in alive]
    if todo:
        executor = submitit.SlurmExecutor(
            folder=directory.path.absolute() / "slurm", max_num_timeout=settings.requeues
        )
        executor.update_parameters(**_parameters(settings, directory))
        call = PointJob(str(directory.path.absolute()), retries, settings.save_before_s - MARGIN_S)
        try:
            jobs = executor.map_array(call, list(todo))
        except submitit.core.utils.FailedJobError as error:
            line = str(error).strip().splitlines()[-1]
            raise WorkError(f"sbatch refused the sweep: {line}") from None
        for name, job in zip(todo, jobs):
            directory.mark(name, state=WAITING, job=job.job_id, error=None)
        points = "1 point" if len(todo) == 1 else f"{len(todo)} points"
        print(f"{points} queued as job {jobs[0].job_id.split('_')[0]}", file=sys.stderr)
    if settings.wait:
        _wait(directory)


def _load_submitit() -> Any:
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("--executor=slurm needs the package submitit; install memjax[slurm]")
    if shutil.which("sbatch") is None:
        raise ConfigError("--executor=slurm: there is no sbatch here; run this on a login node")
    return importlib.import_module("submitit")


def _parameters(settings: Slurm, directory: Directory) -> dict[str, Any]:
    given = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node,
        "mem": None if settings.memory_gb is None else f"{settings.memory_gb}GB",
        "setup": list(settings.setup) or None,
    }
    return {
        "job_name": directory.path.name,
        "time": settings.minutes,
        "nodes": settings.nodes,
        "ntasks_per_node": settings.tasks_per_node,
        "array_parallelism": settings.at_once,
        "signal_delay_s": settings.save_before_s,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **settings.options},
        **{key: value for key, value in given.items() if value is not None},
    }


def queued() -> set[str]:
    """Numbers of this user's jobs that wait or run, as 12_3 or 12. Raises WorkError."""
    command = ["squeue", "--noheader", "--array", "--format=%F_%K", f"--user={os.getuid()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise WorkError(f"squeue failed: {done.stderr.strip().splitlines()[-1]}")
    return {job.removesuffix("_N/A") for job in done.stdout.split()}


def _wait(directory: Directory) -> None:
    """Show how far the points are until none is in the queue. Ctrl-C leaves them there."""
    names = directory.names()
    steps = {name: directory.experiment(name).train.steps for name in names}
    live = Live(directory, {name: directory.status(name)["state"] for name in names}, steps)
    curves = Curves(directory)
    jobs = {name: str(directory.status(name).get("job")) for name in names}
    with live:
        while True:
            alive = queued()
            for name in names:
                state = directory.status(name)["state"]
                if state in (RUNNING, WAITING) and jobs[name] not in alive:
                    state = STOPPED if state == RUNNING else state
                if state == RUNNING and live.states[name] != RUNNING:
                    live.running(name)
                if state == RUNNING:
                    live.progress(name, curves.last(name))
                elif state != live.states[name]:
                    live.settled(name, state, directory.status(name).get("error") or "unknown")
            live.refresh()
            if not alive & set(jobs.values()):
                return
            time.sleep(LOOK_EVERY_S)
