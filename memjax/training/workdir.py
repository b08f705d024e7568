"""The folder of a run: one config, one corpus, one live process.

config.json  tokenizer.json  sessions.jsonl  checkpoints/  metrics.jsonl  tensorboard/  eval/
profile/
"""

import contextlib
import fcntl
import fnmatch
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memjax import config as configs
from memjax.config import ConfigError
from memjax.data import Tokenizer
from memjax.experiment import Experiment

FREE = (  # fields that do not change what a step computes
    "config.checkpoint.*",
    "config.eval.*",
    "config.mesh.*",
    "config.train.steps",
    "config.train.log_every",
    "config.train.tensorboard",
    "config.train.wandb",
    "config.train.profile",
    "config.train.max_skipped",
    "config.data.cache",
    "config.data.threads",
    "config.model.layers",
    "config.model.remat",
)
CONFIG, TOKENIZER, LOCK = "config.json", "tokenizer.json", ".lock"
SESSIONS = "sessions.jsonl"  # a line a start of the run


def write_atomically(path: Path, text: str | bytes) -> None:
    """Replace `path` whole. Raises ConfigError, naming it, if it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); make room there, or "
            "choose another --workdir"
        ) from None


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make the folder and hold it for this process. Raises ConfigError if another holds it.

    A folder that was made here goes again if no run began in it.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        strangers = sorted(p.name for p in workdir.iterdir() if p.name != LOCK)
        if strangers and CONFIG not in strangers and not _only_ours(strangers):
            raise ConfigError(
                f"--workdir={workdir} holds other files ({', '.join(strangers[:3])}) but no run; "
                "choose a new or an empty folder"
            )
        lock = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be used ({error.strerror}); choose a folder you can "
            "write to"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"--workdir={workdir} is in use by another process; wait for it to end, or choose "
            "another --workdir"
        ) from None
    try:
        yield
    finally:
        if not (workdir / CONFIG).exists():
            (workdir / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()
        os.close(lock)


def _only_ours(names: list[str]) -> bool:
    """Whether these are what a start that was killed leaves."""
    return all(fnmatch.fnmatch(name, f".{CONFIG}.*") for name in names)


def load_experiment(workdir: Path) -> Experiment:
    """The config of the run in `workdir`. Raises ConfigError if there is none."""
    path = workdir / CONFIG
    if not path.is_file():
        raise ConfigError(f"--workdir={workdir} holds no run: there is no {CONFIG} in it")
    values = _read_json(path)
    try:
        return configs.build(Experiment, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer of the run in `workdir`. Raises DataError if it is missing or damaged."""
    return Tokenizer.load(workdir / TOKENIZER)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); restore it, or choose another --workdir"
        ) from None


def changes(workdir: Path, experiment: Experiment) -> dict[str, tuple[Any, Any]]:
    """Free fields that differ from those of the run: path -> (old, new); empty for a new run.

    A run that has neither checkpoints nor metrics yet is new: there is nothing to protect.
    Raises ConfigError if a field that is not free differs.
    """
    if not (workdir / CONFIG).is_file():
        return {}
    old = load_experiment(workdir)
    checkpoints = workdir / "checkpoints"
    if not (workdir / "metrics.jsonl").exists() and not any(checkpoints.glob("[0-9]*")):
        return {}
    differences = configs.diff(old, experiment)
    bound = {
        key: pair
        for key, pair in differences.items()
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE)
    }
    if bound:
        count = f"{len(bound)} field{'s' if len(bound) > 1 else ''}"
        shown = [f"{key}: {old} -> {new}" for key, (old, new) in bound.items()]
        more = f", and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise ConfigError(
            f"--workdir={workdir} holds a run with another config: {count} "
            f"differ{'s' if len(bound) == 1 else ''} ({', '.join(shown[:3])}{more}); choose "
            "another --workdir, or run with its config.json"
        )
    return differences


def write_run(workdir: Path, experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Save what is needed to run again and to evaluate; the config first: it marks a run."""
    path = workdir / TOKENIZER
    if path.is_file() and Tokenizer.load(path).digest != tokenizer.digest:
        raise ConfigError(
            f"{path} differs from the tokenizer of the data: the data changed since the run "
            "began; bring back the old data, or choose another --workdir"
        )
    write_atomically(workdir / CONFIG, configs.to_json(experiment))
    if not path.is_file():
        tokenizer.save(path)


def sessions(workdir: Path) -> list[dict[str, Any]]:
    """The starts of the run: time (seconds since 1970), step, processes; no torn lines."""
    path, found = workdir / SESSIONS, []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def begin_session(workdir: Path, step: int, processes: int) -> None:
    """Note that the run goes on from `step` now."""
    line = json.dumps({"time": time.time(), "step": step, "processes": processes})
    try:
        with open(workdir / SESSIONS, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise ConfigError(
            f"{workdir / SESSIONS} cannot be written ({error.strerror}); make room there, or "
            "choose another --workdir"
        ) from None
