"""Checkpoints: the whole training state, written in the background, checked when read.

    checkpoints/<step>/   Orbax: params, ema (if any), rest, digests

A checkpoint appears whole (Orbax renames it) and goes whole (it is renamed before it is removed).
Each array has a digest that does not depend on the mesh, compared after reading, so a byte that
flipped on the disk is found. `restore` takes the newest checkpoint that is sound, and says which
were not; their folders are kept under another name. A config that does not fit is an error.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from memjax.config import ConfigError
from memjax.training.arrays import describe, flatten, groups, place, unflatten
from memjax.training.background import Save
from memjax.training.digest import digests
from memjax.training.errors import CheckpointError
from memjax.training.step import TrainState

TEMPORARY, DELETED, DAMAGED = ".orbax-checkpoint-tmp", ".deleted", ".damaged"


class Restored(NamedTuple):
    """A state, what was saved with it, and a line about each newer checkpoint that is damaged."""

    step: int
    state: TrainState
    meta: dict[str, Any]
    report: list[str]


class Damage(Exception):
    """A checkpoint is not what was written; the message is the reason."""


class Checkpoints:
    """The checkpoints of a run. Every process of a run calls the same methods alike.

    keep: latest to keep. keep_best: to keep of those with the lowest eval_loss.
    """

    def __init__(self, folder: Path, keep: int = 1, keep_best: int = 0):
        self.folder, self.keep, self.keep_best = folder.absolute(), keep, keep_best
        self._pending: Save | None = None
        self._losses: dict[int, float | None] = {}
        if _first():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _clean(self.folder)
            except OSError as error:
                raise self._unwritable(None, error) from error
        _barrier("checkpoints")

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, oldest first."""
        return list_steps(self.folder)

    def best_loss(self) -> float | None:
        """The lowest eval_loss among the checkpoints."""
        losses = [loss for step in self.steps() if (loss := self._loss(step)) is not None]
        return min(losses, default=None)

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Write `state` in the background; `state` may be donated at once.

        meta: JSON values; its `eval_loss`, if not None, decides which checkpoints are the best.
        Raises CheckpointError if this save, or the one before, cannot be written.
        """
        self.wait()
        flat = flatten(state)
        body = json.dumps({"arrays": describe(flat), "meta": dict(meta)})
        try:
            if _first() and (self.folder / str(step)).exists():
                _remove(self.folder / str(step))
            _barrier("save")
            response = ocp.save_checkpointables_async(
                self.folder / str(step),
                {**groups(flat), "digests": digests(flat)},
                custom_metadata={"body": body, "crc": zlib.crc32(body.encode())},
            )
        except Exception as error:
            raise self._unwritable(step, error) from error
        self._pending = Save(step, response)
        self._losses[step] = meta.get("eval_loss")

    def check(self) -> None:
        """What `wait` does, if the last save has ended; else nothing. Raises its failure."""
        if self._pending is not None and self._pending.ended():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk, and remove what need not be kept."""
        if self._pending is None:
            return
        save, self._pending = self._pending, None
        try:
            save.result()
            if _first():
                self._prune()
        except Exception as error:
            raise self._unwritable(save.step, error) from error

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest sound checkpoint, on the devices that `abstract` names; None if none is there.

        Raises ConfigError if a parameter has another shape or type, CheckpointError if there are
        checkpoints and all are damaged.
        """
        report: list[str] = []
        for step in reversed(self.steps()):
            reason, found = "another process could not read it", None
            try:
                found = _read(self.folder / str(step), flatten(abstract))
            except Damage as damage:
                reason = str(damage)
            if _all(found is not None) and found is not None:
                arrays, meta = found
                self._set_aside([int(line.split()[1]) for line in report])
                return Restored(step, unflatten(abstract, arrays), meta, report)
            report.append(f"checkpoint {step} is damaged and was left out: {reason}")
        if report:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read ({report[0]}); restore the folder "
                "from a copy, or choose another --workdir"
            )
        return None

    def _set_aside(self, damaged: list[int]) -> None:
        if _first():
            for step in damaged:
                os.replace(self.folder / str(step), _fresh(self.folder / f"{step}{DAMAGED}"))
        _barrier("set_aside")

    def _prune(self) -> None:
        steps = self.steps()
        scored = [(loss, step) for step in steps if (loss := self._loss(step)) is not None]
        best = [step for _, step in sorted(scored)[: self.keep_best]]
        for step in set(steps) - set(steps[-self.keep :]) - set(best):
            _remove(self.folder / str(step))

    def _loss(self, step: int) -> float | None:
        if step not in self._losses:
            try:
                self._losses[step] = read_body(self.folder / str(step))["meta"].get("eval_loss")
            except Damage:
                self._losses[step] = None
        return self._losses[step]

    def _unwritable(self, step: int | None, error: BaseException) -> CheckpointError:
        what = "checkpoints" if step is None else f"the checkpoint of step {step}"
        steps = ", ".join(map(str, self.steps()))
        kept = f"; those of steps {steps} are intact" if steps else ""
        return CheckpointError(
            f"{what} cannot be written to {self.folder}: {_cause(error)}{kept}; make room or "
            "check the permissions, and run the same command again"
        )


def list_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_params(
    folder: Path, params: dict, step: int | None = None, *, ema: bool = True
) -> tuple[int, dict]:
    """Step and parameters of the newest sound checkpoint, or of `step`.

    params: shapes (with shardings) in the layout wanted. ema: their moving average, if kept.
    Raises ConfigError if there is none, CheckpointError if none can be read.
    """
    steps = list_steps(folder)
    if not steps:
        raise ConfigError(f"{folder} has no checkpoint yet; train the run first")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise ConfigError(f"{folder} has no checkpoint of step {step}; choose from {there}")
    reasons = []
    for candidate in reversed(steps) if step is None else [step]:
        path = folder.absolute() / str(candidate)
        try:
            group = "ema" if ema and (path / "ema").is_dir() else "params"
            wanted = {group: params}
            arrays, _ = _read(path, flatten(wanted), partial=True)
            return candidate, unflatten(wanted, arrays)[group]
        except Damage as damage:
            reasons.append(f"checkpoint {candidate} is damaged: {damage}")
    raise CheckpointError(f"no checkpoint in {folder} can be read: {reasons[0]}")


def read_body(path: Path) -> dict[str, Any]:
    """What was saved beside the arrays: their types and shapes, and the run's own values."""
    try:
        body = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        if zlib.crc32(body["body"].encode()) != body["crc"]:
            raise Damage("its metadata does not match its checksum")
        return json.loads(body["body"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damage(f"its metadata cannot be read ({type(error).__name__})") from None


def read_meta(path: Path) -> dict[str, Any] | None:
    """The run's own values saved at `path`; None if they are damaged."""
    try:
        return read_body(path)["meta"]
    except Damage:
        return None


def _read(path: Path, wanted: dict[str, Any], partial: bool = False) -> tuple[dict, dict]:
    """The arrays of a checkpoint, checked, and its meta. Raises Damage, ConfigError."""
    body = read_body(path)
    _check_shapes(path, body["arrays"], describe(wanted), partial)
    count = len(body["arrays"])
    expected = {"digests": jax.ShapeDtypeStruct((count,), np.uint32, sharding=place(wanted))}
    try:
        loaded = ocp.load_checkpointables(path, {**groups(wanted), **expected})
    except Exception as error:
        raise Damage(_cause(error)) from None
    stored = dict(zip(sorted(body["arrays"]), np.asarray(loaded.pop("digests"))))
    arrays = {name: leaf for group in loaded.values() for name, leaf in group.items()}
    for name, digest in zip(sorted(arrays), np.asarray(digests(arrays))):
        if stored[name] != digest:
            raise Damage(f"{name} does not match its digest")
    return arrays, body["meta"]


def _check_shapes(path: Path, stored: dict, wanted: dict, partial: bool) -> None:
    names = set(wanted) if partial else set(wanted) | set(stored)
    for name in sorted(names):
        old, new = stored.get(name), wanted.get(name)
        if old != new:
            raise ConfigError(
                f"{path}: {name} is {_show(old)} in the checkpoint but {_show(new)} in this model; "
                "use the config of the run, or another --workdir"
            )


def _show(description: list | None) -> str:
    return "absent" if description is None else f"{description[0]}{description[1]}"


def _cause(error: BaseException) -> str:
    """The first line of the error that began it: Orbax wraps some in misleading ones."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _clean(folder: Path) -> None:
    """Remove what killed saves and removals left."""
    for path in folder.iterdir():
        if TEMPORARY in path.name or DELETED in path.name:
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    gone = _fresh(path.with_name(f"{path.name}{DELETED}"))
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _fresh(path: Path) -> Path:
    """`path`, or the first `path-n` that does not exist."""
    names = (path.with_name(f"{path.name}-{n}") for n in range(1, 10**6))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _first() -> bool:
    return jax.process_index() == 0


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"memjax_{name}")


def _all(ok: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))
