"""The folder of a sweep.

sweep.json            the points, as planned
configs/<point>.json  the resolved config that a point runs
runs/<point>/         its run directory, as `memjax train` leaves it
status/<point>.json   how far it is, written by whoever runs it
logs/<point>.log      what it printed, all attempts
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memjax import config as configs
from memjax.config import ConfigError
from memjax.experiment import Experiment
from memjax.sweeps.plan import Planned, digest
from memjax.training.metrics import FILE, read_records
from memjax.training.workdir import LOCK as RUN_LOCK
from memjax.training.workdir import changes, write_atomically

PLAN, LOCK = "sweep.json", ".sweep-lock"
FOLDERS = ("configs", "runs", "status", "logs")
WAITING, RUNNING, DONE, FAILED, STOPPED, ENDED = (
    "waiting",
    "running",
    "done",
    "failed",
    "stopped",  # by a signal: goes on where it was
    "ended early",  # by a rule of the sweep
)
LOG_TAIL, LOG_BYTES = 12, 16_384


class Directory:
    """A sweep on disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def config(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the sweep for this process. Raises ConfigError if another holds it."""
        self._make()
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise ConfigError(
                f"--workdir={self.path} is a sweep in progress in another process; wait for it to "
                "end, or choose another --workdir"
            ) from None
        finally:
            os.close(lock)

    def _make(self) -> None:
        try:
            strangers = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
            if strangers and PLAN not in strangers and LOCK not in strangers:
                raise ConfigError(
                    f"--workdir={self.path} holds other files ({', '.join(strangers[:3])}) but no "
                    "sweep; choose a new or an empty folder"
                )
            for folder in FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--workdir={self.path} cannot be used ({error.strerror}); choose a folder you can "
                "write to"
            ) from None

    def names(self) -> list[str]:
        """The points of the sweep as it was last planned. Raises ConfigError if there is none."""
        return [point["name"] for point in self.plan()["points"]]

    def plan(self) -> dict[str, Any]:
        """sweep.json. Raises ConfigError."""
        try:
            return json.loads((self.path / PLAN).read_text())
        except FileNotFoundError:
            raise ConfigError(f"--workdir={self.path} holds no sweep: no {PLAN} in it") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path / PLAN} cannot be read ({error})") from None

    def evaluations(self) -> list[dict[str, Any]]:
        """Settings of the evaluations that the sweep wants of every point."""
        return self.plan()["settings"].get("evaluate", [])

    def adopt(self, points: Sequence[Planned]) -> list[Planned]:
        """The points under the names they have here already, if their configs are here.

        Raises ConfigError if a run that began has another config under the name of a point.
        """
        known = {}
        if (self.path / PLAN).is_file():
            known = {point["digest"]: point["name"] for point in self.plan()["points"]}
        taken = {known[p.digest] for p in points if p.digest in known}
        named = [_named(p, known, taken) for p in points]
        for point in named:
            try:
                changes(self.run(point.name), point.experiment)
            except ConfigError as error:
                raise ConfigError(f"sweep point {point.name}: {error}") from None
        return named

    def write(self, points: Sequence[Planned], source: str, settings: dict[str, Any]) -> None:
        """Record the points and their configs."""
        self._make()
        rows = [
            {
                "name": point.name,
                "digest": point.digest,
                "labels": point.labels,
                "matched": {key: list(pair) for key, pair in point.matched.items()},
                **point.costs._asdict(),
            }
            for point in points
        ]
        for point in points:
            text = configs.to_json(point.experiment)
            if not self.config(point.name).is_file() or self.config(point.name).read_text() != text:
                write_atomically(self.config(point.name), text)
        plan = {"sweep": source, "settings": settings, "points": rows}
        write_atomically(self.path / PLAN, json.dumps(plan, indent=1) + "\n")

    def experiment(self, name: str) -> Experiment:
        """The config of a point. Raises ConfigError."""
        path = self.config(name)
        if not path.is_file():
            raise ConfigError(f"--workdir={self.path}: the sweep has no point {name}")
        return configs.build(Experiment, json.loads(path.read_text()))

    def status(self, name: str) -> dict[str, Any]:
        """What was last written about a point; `state` is "waiting" if nothing was."""
        try:
            return json.loads((self.path / "status" / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {"state": WAITING, "attempts": 0, "seconds": 0.0}

    def state(self, name: str) -> str:
        """The state of a point, "stopped" if it was running here and its process is gone."""
        status = self.status(name)
        if status["state"] != RUNNING or status.get("host") != socket.gethostname():
            return status["state"]
        return RUNNING if is_locked(self.run(name)) else STOPPED

    def settled(
        self, name: str, ended_count: bool, evaluations: Sequence[dict[str, Any]] = ()
    ) -> bool:
        """Whether nothing is left to do: done with the config it has now, or ended early.

        evaluations: the settings of those that the sweep wants now.
        """
        status = self.status(name)
        if status["state"] == ENDED:
            return ended_count
        found = [done["settings"] for done in status.get("evaluated") or []]
        missing = any(wanted not in found for wanted in evaluations)
        same = status.get("digest") == digest(self.experiment(name))
        return status["state"] == DONE and same and not missing

    def mark(self, name: str, **fields: Any) -> dict[str, Any]:
        """Change the status of a point."""
        status = {**self.status(name), **fields, "updated": time.time()}
        write_atomically(self.path / "status" / f"{name}.json", json.dumps(status) + "\n")
        return status

    def last_lines(self, name: str, count: int = LOG_TAIL) -> list[str]:
        """The end of a point's log."""
        try:
            with open(self.log(name), "rb") as file:
                file.seek(max(0, os.path.getsize(self.log(name)) - LOG_BYTES))
                text = file.read(LOG_BYTES).decode(errors="replace")
        except OSError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]

    def records(self, name: str) -> list[dict[str, Any]]:
        """The metrics of a point."""
        path = self.run(name) / FILE
        return read_records(path) if path.is_file() else []


def is_locked(run: Path) -> bool:
    """Whether a process on this machine is training in a run directory."""
    try:
        lock = os.open(run / RUN_LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _named(point: Planned, known: dict[str, str], taken: set[str]) -> Planned:
    """The point under the name its config has here, or under one that no other config has."""
    if point.digest in known:
        return dataclasses.replace(point, name=known[point.digest])
    if point.name in taken:
        return dataclasses.replace(point, name=f"{point.name}-{point.digest[:6]}")
    return point
