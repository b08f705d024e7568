"""Records of a run: metrics.jsonl, TensorBoard, and Weights & Biases if asked for."""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from memjax import config as configs
from memjax.config import ConfigError
from memjax.experiment import Experiment
from memjax.training.errors import TrainingError
from memjax.training.workdir import write_atomically

FILE = "metrics.jsonl"


class Sink(ABC):
    """Where records go."""

    @abstractmethod
    def write(self, record: dict[str, Any]) -> None:
        """Add the record of a step."""

    @abstractmethod
    def close(self) -> None:
        """Nothing more follows."""


@contextmanager
def one_line(path: str) -> Iterator[None]:
    """Make a failure to write into `path` a line for the user."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error.strerror}); make room or check the permissions, and "
            "run the same command again: it goes on from the last checkpoint"
        ) from None


class JsonLines(Sink):
    """metrics.jsonl: a line a record, on the disk as soon as it is written."""

    def __init__(self, path: Path, step: int):
        """Open to go on after `step`: what an interrupted run wrote of later steps is dropped."""
        if path.exists():
            kept = [r for r in read_records(path) if r["step"] <= step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        with one_line(self._file.name):
            self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was told by `write`
            self._file.close()


class TensorBoard(Sink):
    """Event files; those of an interrupted run show only up to the step resumed from."""

    def __init__(self, folder: Path, step: int):
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                group = "eval" if name.startswith("eval_") else "train"
                tag = f"{group}/{name.removeprefix('eval_')}"
                self._writer.add_scalar(tag, value, record["step"])
        with one_line(self._writer.logdir):
            self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


class WandB(Sink):
    """A Weights & Biases run, continued when the training is."""

    def __init__(self, project: str, workdir: Path, experiment: Experiment):
        check_wandb(project)
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project,
            dir=str(workdir),
            name=workdir.resolve().name,
            id=run_id(workdir),
            resume="allow",
            config=configs.to_dict(experiment),
        )

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def run_id(workdir: Path) -> str:
    """The folder's name, and a digest of its path: other folders may have the same name."""
    path = workdir.resolve()
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def check_wandb(project: str | None) -> None:
    """Raise ConfigError if logging to W&B is asked for and its package is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.train.wandb={project!r} needs the package wandb; install memjax[wandb], or "
            "set it to none"
        )


def open_sinks(experiment: Experiment, workdir: Path, step: int) -> list[Sink]:
    """The sinks of a run that goes on after `step`."""
    sinks: list[Sink] = [JsonLines(workdir / FILE, step)]
    if experiment.train.tensorboard:
        sinks.append(TensorBoard(workdir / "tensorboard", step))
    if experiment.train.wandb is not None:
        sinks.append(WandB(experiment.train.wandb, workdir, experiment))
    return sinks


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        records.append(record)
    return records


def _finite(value: Any) -> Any:
    """JSON has no word for infinity: null stands for it and for NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
