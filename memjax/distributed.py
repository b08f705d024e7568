"""Several processes as one run, on JAX's distributed runtime.

Each process runs the same command; `connect` finds the others, before JAX is used. From then on a
`Watch` tells the others each second how far this process is, and ends this process, with one line
and status 76, when another has been silent for too long. If the first process is gone, JAX itself
aborts the others at once, and after several times that silence it aborts all; `explain_abort` turns
that into the same line and status. A launcher restarts all processes on it.
"""

import ctypes
import dataclasses
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from memjax.config import ConfigError
from memjax.errors import LOST

PREFIX = "memjax/beat/"
PATIENCE = 24 * 3600  # seconds to wait for processes that are alive
GRACE = 4  # JAX's own heartbeat waits so many times longer: it ends a process with a stack trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Where the processes of a run are.

    mode: "auto" connects within a Slurm step or an Open MPI job of more than one process; "on"
        connects by whatever JAX can detect (also TPU pods and Kubernetes), or fails; "off" never.
    coordinator, count, index: HOST:PORT of process 0, processes of the run, this one of them; all
        three or none. Given, they connect whatever the mode.
    lost_after: seconds of silence after which a process counts as lost.
    """

    mode: Literal["auto", "on", "off"] = "auto"
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    lost_after: int = 100

    def __post_init__(self):
        given = {
            "--coordinator": self.coordinator,
            "--processes": self.count,
            "--process": self.index,
        }
        missing = [name for name, value in given.items() if value is None]
        if missing and len(missing) < 3:
            there = ", ".join(f"{k}={v}" for k, v in given.items() if v is not None)
            raise ConfigError(f"{there}: needs {' and '.join(missing)} too")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit():
                raise ConfigError(
                    f"--coordinator={self.coordinator}: must be HOST:PORT, as in 10.0.0.1:9921"
                )
        if self.count is not None and self.index is not None:
            if self.count < 1:
                raise ConfigError(f"--processes={self.count}: must be at least 1")
            if not 0 <= self.index < self.count:
                raise ConfigError(
                    f"--process={self.index}: must be from 0 to {self.count - 1}, as --processes="
                    f"{self.count} says"
                )
        if self.lost_after < 2:
            raise ConfigError(f"--lost-after={self.lost_after}: must be at least 2 seconds")


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """coordinator, count and index as the variables say that JAX's users know."""

    def number(name: str) -> int | None:
        text = environment.get(name)
        if text is not None and not text.isdigit():
            raise ConfigError(f"{name}={text}: must be a whole number")
        return None if text is None else int(text)

    return {
        "coordinator": environment.get("JAX_COORDINATOR_ADDRESS"),
        "count": number("JAX_NUM_PROCESSES"),
        "index": number("JAX_PROCESS_ID"),
    }


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks that Slurm or Open MPI started together."""
    slurm = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    tasks = environment.get("SLURM_STEP_NUM_TASKS" if slurm else "OMPI_COMM_WORLD_SIZE", "1")
    return tasks.isdigit() and int(tasks) > 1


def connect(processes: Processes) -> "Watch | None":
    """Join the run; call it before JAX is used. None if this process is a run of its own.

    Raises ConfigError if the others cannot be found.
    """
    explicit = processes.coordinator is not None
    wanted = processes.mode == "on" or (processes.mode == "auto" and in_cluster(os.environ))
    if not explicit and not wanted:
        return None
    import jax

    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            cluster_detection_method="deactivate" if explicit else None,
            heartbeat_timeout_seconds=GRACE * processes.lost_after,
            initialization_timeout=max(30, processes.lost_after),
            shutdown_timeout_seconds=processes.lost_after,
        )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        where = f"--coordinator={processes.coordinator}" if explicit else "--distributed"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{where}: the processes did not find each other ({first}); start all of them, with "
            "one --coordinator that all can reach"
        ) from None
    if jax.process_count() == 1:
        return None
    from jax._src import distributed  # the key-value store has no public name

    watch = Watch(
        distributed.global_state.client,
        (jax.process_index(), jax.process_count()),
        processes.lost_after,
    )
    watch.start()
    explain_abort(distributed.global_state.coordinator_address or "", watch)
    return watch


def compiled(function: Any, *args: Any) -> Any:
    """A jitted function compiled for `args`, on every process before any of them calls it.

    Collectives give up on a process that comes half a minute late, as one does that compiles what
    another found in its cache.
    """
    program = function.lower(*args).compile()
    wait_for_all("compiled")
    return program


def wait_for_all(name: str) -> None:
    """Wait until every process is here, however long that takes; `Watch` ends it if one is lost."""
    import jax
    from jax._src import distributed  # as above

    client = distributed.global_state.client
    if jax.process_count() > 1 and client is not None:
        _BARRIERS[name] = _BARRIERS.get(name, 0) + 1
        key = f"memjax/{name}/{_BARRIERS[name]}"
        client.wait_at_barrier(key, timeout_in_ms=1000 * PATIENCE)


_BARRIERS: dict[str, int] = {}


class Watch:
    """Each process says how far it is, and hears the others.

    process: index of this one, and count. lost_after: seconds of silence.
    lost: what to do with the line that names the lost processes; ends this process by default.
    """

    def __init__(
        self,
        client: Any,
        process: tuple[int, int],
        lost_after: float,
        lost: Callable[[str], None] | None = None,
    ):
        self._client, (self._index, self._count), self._after = client, process, lost_after
        self._interval = min(1.0, lost_after / 4)
        self._end = lost or end
        self._report: dict[str, Any] = {}
        self._others: dict[int, dict[str, Any]] = {}
        self._stop = threading.Event()
        now = time.monotonic()
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(range(self._count), ("", now))
        self._thread = threading.Thread(target=self._run, name="memjax-watch", daemon=True)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes for all."""
        return self._index == 0

    def start(self) -> None:
        """Begin to say and to hear."""
        self._thread.start()

    def tell(self, **report: Any) -> None:
        """What the next beats say about this process."""
        self._report = report

    def others(self) -> dict[int, dict[str, Any]]:
        """What each process said last, this one included."""
        return dict(self._others)

    def confirm(self, error: Exception) -> None:
        """A collective failed: end this process if another proves to be lost; else return."""
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"memjax: a collective failed ({first[:200]})", file=sys.stderr, flush=True)
        # Silence is noticed up to two beats late, and process 0 waits three more.
        self._thread.join(self._after + 6 * self._interval)

    def loss(self) -> str | None:
        """A line that names the processes that have been silent for too long; None if none has."""
        silent = self._silent()
        return self.lost(silent, f"no sign of life for {self._after:g} s") if silent else None

    def lost(self, processes: list[int], why: str) -> str:
        """The line that says so of these processes."""
        return (
            f"process {', '.join(map(str, processes))} of {self._count} was lost ({why}); start "
            "all processes again to go on from the last checkpoint"
        )

    def finish(self) -> None:
        """Say goodbye: from here on silence is no loss."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(self._interval):
            beat += 1
            self._beat({"beat": beat, **self._report})
            line = self.loss()
            if line is not None:
                if self.first:  # as it ends JAX ends the others, who then would name process 0
                    time.sleep(3 * self._interval)
                self._end(line)
                return
        self._beat({"beat": "done"})

    def _beat(self, said: dict[str, Any]) -> None:
        try:
            text = json.dumps(said)
            self._client.key_value_set(f"{PREFIX}{self._index}", text, allow_overwrite=True)
            heard = self._client.key_value_dir_get(PREFIX)
        except Exception:  # the store is gone with process 0; its silence is noticed below
            return
        for key, text in heard:
            index = int(key.rpartition("/")[2])
            said = json.loads(text)
            if said["beat"] == "done":
                self._heard[index] = (text, float("inf"))
            elif self._heard[index][0] != text:
                self._heard[index] = (text, time.monotonic())
            self._others[index] = said

    def _silent(self) -> list[int]:
        now = time.monotonic()
        late = [i for i, (_, at) in self._heard.items() if now - at > self._after]
        return [0] if len(late) == self._count else [i for i in late if i != self._index]


def straggler(reports: Mapping[int, Mapping[str, Any]]) -> str | None:
    """A line on the process whose own work a step takes much longer than that of the others.

    A step ends on all processes together, so its time does not tell who is slow; the time that
    each spends on reading and placing its batch does. Much longer: twice the median of the others,
    and at least a tenth of the step.
    """
    hosts = {i: r["host_ms_p50"] for i, r in reports.items() if "host_ms_p50" in r}
    if len(hosts) < 2:
        return None
    slow = max(hosts, key=lambda i: hosts[i])
    usual = statistics.median(ms for i, ms in hosts.items() if i != slow)
    step = reports[slow]["step_ms_p50"]
    if hosts[slow] < max(2 * usual, 0.1 * step):
        return None
    return (
        f"process {slow} holds the others up: {hosts[slow]:.0f} ms a step for its batch, the "
        f"others {usual:.0f} ms, a step {step:.0f} ms"
    )


def end(line: str) -> None:
    """End this process now, with this line: its other threads wait for a process that is gone."""
    print(f"memjax: error: {line}", file=sys.stderr, flush=True)
    os._exit(LOST)


def explain_abort(coordinator: str, watch: Watch) -> None:
    """If JAX aborts this process because another is lost, end it as `Watch` would have.

    JAX's client takes no other callback from Python. Its thread aborts as soon as the connection to
    process 0 breaks, or when JAX's own heartbeats stop, which it may notice first on a machine that
    was held up. Any other abort stays what it is.
    """

    def aborted(_: int) -> None:
        if not watch.first and not answers(coordinator):
            line: str | None = watch.lost([0], f"{coordinator} does not answer")
        else:
            line = watch.loss()
        if line is not None:
            end(line)

    handler = _Handler(aborted)
    _HANDLERS.append(handler)  # C holds no reference
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, _Handler], ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_HANDLERS: list[Any] = []


def answers(address: str, seconds: float = 3.0) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds):
            return True
    except OSError:
        return False


def leave(status: int) -> None:
    """End the process at once if it fails alone: the others would wait for it in vain."""
    jax = sys.modules.get("jax")
    if status in (0, 75) or jax is None or not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
