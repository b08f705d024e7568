"""What goes wrong while a run goes on: what is saved, what is said, what is not lost."""

import contextlib
import dataclasses
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import numpy as np
import pytest
import test_training_loop as loops
from devices import run_on_virtual_devices

from memjax.config import ConfigError
from memjax.evals.config import Eval
from memjax.training import checkpoint, loop
from memjax.training.background import Save
from memjax.training.clock import Clock
from memjax.training.config import Checkpoint
from memjax.training.errors import CheckpointError, TrainingError
from memjax.training.loop import train
from memjax.training.metrics import read_records, run_id

ROOT = Path(__file__).parents[1]
compiled_programs, experiment = loops.compiled_programs, loops.experiment  # fixtures
with_train = loops.with_train


@pytest.fixture(scope="module")
def plain(experiment):
    """A run that saves every four steps and evaluates never."""
    every_four = Checkpoint(every=4, keep=1, keep_best=0)
    return dataclasses.replace(experiment, eval=Eval(every=None), checkpoint=every_four)


def at_step(monkeypatch, number, action):
    """Call `action` with the batch of step `number` before it is placed."""
    steps, put = [], loop.put_batch

    def placed(batch, mesh):
        steps.append(0)
        return put(action(batch) if len(steps) == number else batch, mesh)

    monkeypatch.setattr(loop, "put_batch", placed)


def kept(workdir):
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


def wait_for_checkpoint(workdir, step):
    while step not in kept(workdir):
        time.sleep(0.01)


def test_a_poisoned_batch_is_left_out_told_and_counted(plain, tmp_path, monkeypatch, capsys):
    def poison(batch):
        weight_BT = batch["weight_BT"].copy()
        weight_BT[1, 3] = np.nan
        return batch | {"weight_BT": weight_BT}

    at_step(monkeypatch, 3, poison)
    summary = train(with_train(plain, log_every=1), tmp_path / "run")
    assert "step 3 (batch 2) left out: loss nan" in capsys.readouterr().err
    assert summary["skipped"] == 1 and summary["step"] == 6
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["loss"] is None for r in records] == [False, False, True, False, False, False]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1]


def test_a_second_ctrl_c_ends_at_once_unsaved(plain, tmp_path, monkeypatch):
    def twice(batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(plain, tmp_path / "run")
    assert kept(tmp_path / "run") == [] and signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert train(plain, tmp_path / "run")["step"] == 6


def test_a_nan_in_one_shard_leaves_the_step_out_on_all_devices():
    run_on_virtual_devices("training_step")


class Response:
    """What Orbax returns for a save: done at once, late, or never."""

    def __init__(self, real, seconds=0.0, error=None):
        self._real, self._seconds, self._error = real, seconds, error

    def result(self):
        self._real.result()
        time.sleep(self._seconds)
        if self._error is not None:
            raise self._error


def slow_saves(monkeypatch, seconds=0.0, error=None, first=1):
    """Saves from the `first` on take so long, or fail in the background."""
    saves, real = [], checkpoint.ocp.save_checkpointables_async

    def save(*args, **kwargs):
        saves.append(0)
        late = len(saves) >= first
        return Response(real(*args, **kwargs), seconds * late, error if late else None)

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", save)


def test_a_slow_disk_does_not_hold_up_the_steps(plain, tmp_path, monkeypatch):
    times, put = [], loop.put_batch

    def timed(batch, mesh):
        times.append(time.monotonic())
        return put(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", timed)
    slow_saves(monkeypatch, seconds=3.0)
    begin = time.monotonic()
    summary = train(plain, tmp_path / "run")  # saves at 4 and at 6, the end
    assert time.monotonic() - begin > 6.0
    assert times[5] - times[3] < 3.0  # steps 5 and 6 began while the save of 4 was being written
    assert summary["spent"]["saving"] > 2.0
    assert kept(tmp_path / "run") == [6]


def test_a_save_that_fails_in_the_background_ends_the_run_at_the_next_step(
    plain, tmp_path, monkeypatch
):
    train(with_train(plain, steps=4), tmp_path / "run")
    slow_saves(monkeypatch, error=OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError) as caught:
        train(with_train(plain, steps=4000), tmp_path / "run")
    text = str(caught.value)
    assert "the checkpoint of step 8 cannot be written" in text and "\n" not in text
    assert "No space left on device" in text and "make room" in text
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["step"] < 400  # not only when the next checkpoint was due, or at the end


def test_a_disk_that_fills_up_loses_nothing(plain, tmp_path, monkeypatch):
    """A limit on the size of files, set while the run goes on, stands for the full disk."""
    workdir, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(batch):
        wait_for_checkpoint(workdir, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
        return batch

    at_step(monkeypatch, 5, fill)
    try:
        with pytest.raises(TrainingError, match=r"cannot be written.*run the same command again"):
            train(with_train(plain, steps=40, log_every=1), workdir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept(workdir) == [4]
    monkeypatch.undo()
    train(with_train(plain, steps=40, log_every=1), workdir)
    train(with_train(plain, steps=40, log_every=1), tmp_path / "whole")
    ours, theirs = (read_records(d / "metrics.jsonl") for d in (workdir, tmp_path / "whole"))
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]


def test_goodput_counts_steps_once_and_all_wall_time(monkeypatch):
    now = {"monotonic": 100.0, "time": 5000.0}
    for name in now:
        monkeypatch.setattr(f"memjax.training.clock.time.{name}", lambda name=name: now[name])

    def passes(seconds):
        now["monotonic"] += seconds
        now["time"] += seconds

    clock = Clock(tokens=100, seconds=30.0, spent={"training": 20.0, "saving": 1.0}, began=4900.0)
    passes(10)  # compiling
    clock.step(10)
    for seconds in (2, 3, 4):
        with clock.host():
            passes(1)
        passes(seconds - 1)
        clock.step(10)
    with clock.paused("evaluating"):
        passes(7)
    passes(1)
    clock.step(10)
    assert clock.spent == {"training": 30.0, "evaluating": 7.0, "saving": 1.0}
    assert clock.goodput() == pytest.approx(30.0 / (100.0 + 27.0))
    pace = clock.pace()
    assert pace["step_ms_p50"] == 2500 and pace["step_ms_max"] == 4000
    assert pace["step_ms_p90"] == pytest.approx(3700) and pace["host_ms_p50"] == 1000
    assert clock.pace() == {}


def test_records_and_sessions_tell_where_the_time_went(experiment, tmp_path):
    workdir = tmp_path / "run"
    train(with_train(experiment, steps=4), workdir)
    summary = train(with_train(experiment, steps=8), workdir)
    assert summary["starts"] == 2
    lines = (workdir / "sessions.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 4]
    last = read_records(workdir / "metrics.jsonl")[-1]
    assert 0 < last["step_ms_p50"] <= last["step_ms_p90"] <= last["step_ms_max"]
    assert 0 < last["goodput"] < 1 and summary["spent"]["evaluating"] > 0
    assert sum(summary["spent"].values()) < time.time() - json.loads(lines[0])["time"]


def scalars(folder):
    """(tag, step, purge) of every scalar event, from the event files themselves."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == SessionLog.START:
                found = [item for item in found if item[1] < event.step]  # as TensorBoard does
            found += [(value.tag, event.step) for value in event.summary.value]
    return found


def test_tensorboard_shows_each_step_once_after_a_resume(plain, tmp_path, monkeypatch):
    config = with_train(plain, tensorboard=True, log_every=1)

    def fail(batch):
        wait_for_checkpoint(tmp_path / "run", 4)
        raise KeyboardInterrupt  # nothing is saved: steps 5 and 6 will be made again

    at_step(monkeypatch, 7, fail)
    with pytest.raises(KeyboardInterrupt):
        train(with_train(config, steps=10), tmp_path / "run")
    monkeypatch.undo()
    assert kept(tmp_path / "run") == [4]
    time.sleep(1.1)  # event files are named by the second
    train(with_train(config, steps=10), tmp_path / "run")
    losses = [
        step for tag, step in scalars(tmp_path / "run" / "tensorboard") if tag == "train/loss"
    ]
    assert losses == list(range(1, 11))


def test_a_profiler_capture_leaves_a_trace(plain, tmp_path):
    train(with_train(plain, steps=4, profile=(2, 3)), tmp_path / "run")
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


def test_wandb_gets_every_record_and_goes_on_with_the_run(plain, tmp_path, monkeypatch):
    calls = []
    stub = types.ModuleType("wandb")
    stub.__spec__ = types.SimpleNamespace(name="wandb")

    def init(**settings):
        calls.append(("init", settings))
        log = lambda record, step: calls.append(("log", step, record))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: calls.append(("finish",)))

    stub.init = init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    config = with_train(plain, wandb="project", log_every=2)
    train(with_train(config, steps=4), tmp_path / "run")
    train(config, tmp_path / "run")
    settings = [call[1] for call in calls if call[0] == "init"]
    assert [(s["project"], s["name"], s["resume"]) for s in settings] == [
        ("project", "run", "allow")
    ] * 2
    assert settings[0]["id"] == settings[1]["id"] == run_id(tmp_path / "run")
    assert run_id(tmp_path / "other" / "run") != run_id(tmp_path / "run")
    assert settings[0]["config"]["train"]["steps"] == 4
    logged = [(call[1], call[2]["loss"]) for call in calls if call[0] == "log"]
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert logged == [(r["step"], r["loss"]) for r in records]
    assert sum(call == ("finish",) for call in calls) == 2


def test_wandb_that_is_missing_is_refused_before_anything_is_written(plain, tmp_path):
    if "wandb" in sys.modules:
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=r"train.wandb='p' needs the package wandb"):
        train(with_train(plain, wandb="p"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


BAR = """
from memjax.training.progress import make_report
bar = make_report(100000, True)
bar.start(0)
record = {"loss": 4.43261, "tokens_per_s": 1234567.8, "skipped": 3, "eval_loss": 1.4733}
bar.step(12345)
bar.record(record)
bar.note("step 5 (batch 4) left out: loss nan, gradient norm nan")
bar.close()
"""


def test_the_progress_line_fits_a_terminal_of_eighty_columns():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", BAR],
        stderr=theirs,
        env=environment | {"TERM": "xterm", "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the other side was closed
        while piece := os.read(ours, 4096):
            shown += piece
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, lines)) <= 80 and "…" not in text
    last = lines[-1]
    assert "12345/100000 loss 4.4326  1.23M tok/s  skipped 3  valid 1.4733" in last
    assert "step 5 (batch 4) left out: loss nan, gradient norm nan" in lines


def launch(tmp_path, statuses, *arguments):
    """launch/local.sh with a command that ends with these statuses in turn: its own, and calls."""
    script = tmp_path / "memjax"
    (tmp_path / "next").write_text(" ".join(statuses))
    script.write_text(
        "#!/usr/bin/env bash\n"
        f'cd {tmp_path}; echo "$*" >> calls; set -- $(cat next); echo "${{@:2}}" > next\n'
        "[ $1 = KILL ] && kill -9 $$; exit $1\n"
    )
    script.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "local.sh"), "--pause=0", *arguments],
        env=os.environ | {"MEMJAX": str(script)},
        capture_output=True,
        text=True,
    )
    return done, (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("statuses", "status", "calls"),
    [
        (["0"], 0, 1),
        (["75", "76", "134", "KILL", "0"], 0, 5),
        (["1"], 1, 1),
        (["76", "2"], 2, 2),
        (["76"] * 9, 76, 5),
    ],
)
def test_the_launcher_starts_again_by_the_table_and_gives_up(tmp_path, statuses, status, calls):
    done, called = launch(tmp_path, statuses, "--restarts=4", "--workdir=a b")
    assert done.returncode == status and len(called) == calls, done.stderr
    assert set(called) == {"train --workdir=a b"}
    assert ("giving up" in done.stderr) == (calls == 5 and status == 76)


def test_the_launcher_connects_its_processes(tmp_path):
    _, called = launch(tmp_path, ["0", "0"], "--processes=2")
    ports = {call.split("--coordinator=127.0.0.1:")[1].split()[0] for call in called}
    assert len(ports) == 1
    assert sorted(call.split()[-2:] for call in called) == [
        ["--processes=2", "--process=0"],
        ["--processes=2", "--process=1"],
    ]


def test_a_save_tells_when_it_has_ended():
    late = Save(1, Response(types.SimpleNamespace(result=lambda: None), seconds=0.3))
    assert not late.ended()
    late.result()
    assert late.ended()
    failed = Save(2, Response(types.SimpleNamespace(result=lambda: None), error=ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        failed.result()
