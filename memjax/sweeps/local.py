"""Run points on this machine, several at once, each in a worker process.

A worker trains one point after another, so that JAX starts once a worker, not once a point. A
worker that dies takes down the point it was at and no other; the next point gets a new worker.
"""

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from memjax.config import check, check_at_least
from memjax.errors import Stopped
from memjax.sweeps.curves import Curves
from memjax.sweeps.directory import ENDED, FAILED, STOPPED, Directory
from memjax.sweeps.stopping import Halving, Median
from memjax.sweeps.table import Live
from memjax.sweeps.worker import IDLE, MISTAKE

LOOK_EVERY_S = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """How many points run at once, and where.

    jobs: points at once; the cores of this machine are shared out among them. gpus: numbers of the
    GPUs to use, shared out among the points that run at once.
    """

    jobs: int = 1
    gpus: tuple[int, ...] = ()

    def __post_init__(self):
        check_at_least(self, 1, "jobs")
        even = len(self.gpus) % self.jobs == 0
        check(self, "gpus", even, f"cannot be shared out evenly among jobs={self.jobs}")


class Worker:
    """A process that trains points; `point` is the one it is at."""

    def __init__(self, sweep: Directory, slot: int, local: Local):
        self.point: str | None = None
        self.slot = slot
        command = [sys.executable, "-m", "memjax.sweeps.worker", str(sweep.path), "--serve"]
        cores = sorted(os.sched_getaffinity(0))
        if 1 < local.jobs <= len(cores):
            command.append(f"--cores={','.join(map(str, cores[slot :: local.jobs]))}")
        environment = dict(os.environ)
        if local.gpus:
            mine = local.gpus[slot :: local.jobs]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops its workers
        )

    def start(self, point: str) -> None:
        self.point = point
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{point}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died just now: its end of output says so

    def stop(self) -> None:
        """Ask the point to save and end; a worker without a point ends."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Scheduler:
    """Hands points to workers until none is left.

    next_points: called with nothing when a worker is idle and the queue is empty; more points, or
    none. settled: called with a point and its state when it has ended.
    """

    def __init__(
        self,
        sweep: Directory,
        points: Sequence[str],
        local: Local,
        live: Live,
        *,
        retries: int = 0,
        rule: Median | Halving | None = None,
        next_point: Callable[[], str | None] = lambda: None,
        ended: Callable[[str, str], None] = lambda point, state: None,
    ):
        self.sweep, self.local, self.live, self.rule = sweep, local, live, rule
        self.retries, self.next_point, self.ended = retries, next_point, ended
        self.queue = deque(points)
        self.workers: dict[int, Worker] = {}
        self.curves = Curves(sweep)
        self.failures: dict[str, int] = {}
        self.ending: set[str] = set()
        self.stopping: signal.Signals | None = None
        self.killing = False
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Run everything. Raises Stopped after a signal, when all points have saved."""
        with self._signals(), self.live:
            try:
                self._fill()
                while any(worker.point for worker in self.workers.values()):
                    for key, _ in self.selector.select(LOOK_EVERY_S):
                        self._read(key.data)
                    self._look()
                    self._fill()
            finally:
                for worker in self.workers.values():
                    worker.close(kill=worker.point is not None)
                self.workers.clear()
        if self.stopping is not None:
            raise Stopped(
                self.stopping, f"{self.stopping.name}: points saved; run the same command to go on"
            )

    def _fill(self) -> None:
        """Give every free slot a point."""
        if self.stopping is not None:
            return
        for slot in range(self.local.jobs):
            worker = self.workers.get(slot)
            if worker is not None and worker.point is not None:
                continue
            point = self.queue.popleft() if self.queue else self.next_point()
            if point is None:
                return
            if worker is None:
                worker = self.workers[slot] = Worker(self.sweep, slot, self.local)
                assert worker.process.stdout is not None
                self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            worker.start(point)
            self.live.running(point)

    def _read(self, worker: Worker) -> None:
        """An answer of a worker, or its death."""
        assert worker.process.stdout is not None
        line = worker.process.stdout.readline()
        if line:
            answer = json.loads(line)
            worker.point = None
            if answer["state"] == FAILED and answer["status"] != MISTAKE:
                self._drop(worker)  # the next point starts from a sound process
            self._settle(answer["point"], answer["state"], answer["status"], answer["error"])
            return
        point, code = worker.point, worker.process.wait()
        self._drop(worker)
        if point is None:
            return
        if code == IDLE and self.stopping is None:  # told to end a point that had ended by itself
            self.queue.appendleft(point)
            return
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        state = STOPPED if self.stopping is not None else FAILED
        error = f"its process died ({how})"
        self.sweep.mark(point, state=state, error=error)
        self._settle(point, state, code, error)

    def _drop(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        worker.close()
        del self.workers[worker.slot]

    def _settle(self, point: str, state: str, status: int, error: str) -> None:
        if state == STOPPED and point in self.ending:
            state = ENDED
            self.sweep.mark(point, state=ENDED, error=None)
        if state == FAILED and status != MISTAKE:
            self.failures[point] = self.failures.get(point, 0) + 1
            if self.failures[point] <= self.retries and self.stopping is None:
                self.live.note(f"{point}: failed, trying again")
                self.queue.appendleft(point)
                return
        self.live.settled(point, state, error)
        self.ended(point, state)

    def _look(self) -> None:
        """Note how far points are; end those that the rule gives up."""
        if self.killing:
            for worker in self.workers.values():
                worker.process.kill()
        running = [w for w in self.workers.values() if w.point is not None]
        for worker in running:
            assert worker.point is not None
            self.live.progress(worker.point, self.curves.last(worker.point))
        self.live.refresh()
        if self.rule is None or self.stopping is not None:
            return
        curves = self.curves.all(self.live.states, self.rule.metric)
        for worker in running:
            point = worker.point
            if point is None or point in self.ending or not curves.get(point):
                continue
            if self.rule.ends(curves, point):
                self.ending.add(point)
                self.live.note(f"{point}: ended early at step {curves[point][-1][0]}")
                worker.stop()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal lets points save; a second Ctrl-C kills them."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stopping is not None:
                self.killing = True
                return
            self.stopping = signal.Signals(number)
            self.live.note("stopping: points save and end (Ctrl-C again kills them)")
            for worker in self.workers.values():
                worker.stop()

        before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
