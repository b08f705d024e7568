"""A sweep on a real Slurm that the test starts: queue, preempt, time limit, collect.

    pytest -m slow tests/test_sweeps_slurm.py       # four minutes

Needs Slurm and munge on this machine, root, and submitit; nothing is changed outside the
folder of the test.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest
from slurm_cluster import cluster, missing

from memjax.sweeps import load_sweep
from memjax.sweeps.directory import Directory
from memjax.sweeps.plan import Planner
from memjax.training.loop import train
from memjax.training.metrics import read_records

WHY_NOT = missing() or (
    "submitit is not installed" if importlib.util.find_spec("submitit") is None else ""
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")]

SWEEP = """
from memjax.data import Data
from memjax.evals.config import Eval
from memjax.experiment import Experiment
from memjax.mixers import LSTM
from memjax.model import Model
from memjax.sweeps import *
from memjax.training.config import Checkpoint, Optimizer, Train

BASE = Experiment(
    model=Model(
        d_model=8, pattern=("lstm",), repeat=1, mixers={{"lstm": LSTM(unroll=1)}}, mlp=None
    ),
    data=Data(source="text", path={texts!r}, sequence=8, batch=2, threads=0),
    optimizer=Optimizer(warmup=0, schedule="constant", weight_decay=0.0),
    train=Train(steps=400, log_every=1, tensorboard=False, max_skipped=2, z_loss=1.0),
    checkpoint=Checkpoint(every=20, keep=1),
    eval=Eval(every=1, tokens=32),
)


def get_sweep(name):
    if name == "queue":
        rates = axis("optimizer.learning_rate", {{"long": 1e-3, "broken": 1e30, "short": 2e-3}})
        short = axis("train.steps", 5)
        points = when(rates, lambda c: c["optimizer.learning_rate"] != 1e-3, short)
        return Sweep(base=BASE, points=points)
    if name == "limit":
        return Sweep(base=BASE, points=axis("train.steps", 1_000_000))
    if name == "several":
        return Sweep(base=BASE, points=axis("train.steps", 20))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    texts = folder / "texts"
    texts.mkdir()
    for index in range(12):
        (texts / f"{index}.txt").write_text(f"text number {index} of the corpus. " * (6 + index))
    (folder / "sweep.py").write_text(SWEEP.format(texts=str(texts)))
    os.environ["MEMJAX_CACHE"] = str(folder / "cache")
    return folder / "sweep.py"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, file):
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def sweep(slurm, file, variant, folder, *arguments):
    command = [sys.executable, "-m", "memjax", "sweep", f"--sweep={file}:{variant}"]
    command += [f"--workdir={folder}", "--executor=slurm", "--json", *arguments]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def run(slurm, *command):
    done = subprocess.run(command, env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)


def hurry(slurm, directory, name):
    """Slurm lets a requeued job wait for two minutes: let it start now. Returns false.

    Not at once: a node refuses a job that it is still clearing away, and the job would be lost.
    """
    job = directory.status(name)["job"]
    state = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    if "PENDING" in subprocess.run(state, env=slurm, capture_output=True, text=True).stdout:
        time.sleep(5)
        update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        subprocess.run(update, env=slurm, capture_output=True)
    time.sleep(1)
    return False


def starts(directory, name):
    """The steps from which a point went on, in order."""
    text = directory.log(name).read_text() if directory.log(name).exists() else ""
    return [int(step) for step in re.findall(r"going on from step (\d+)", text)]


def saves(directory, name):
    return [int(s) for s in re.findall(r"saved at step (\d+)", directory.log(name).read_text())]


def test_a_preempted_point_goes_on_exactly_and_a_broken_one_harms_no_other(slurm, file, tmp_path):
    directory = Directory(tmp_path / "queue")
    told, err = sweep(slurm, file, "queue", directory.path)
    long, broken, short = names = directory.names()
    assert "3 points queued" in err and told["points"] == 3
    wait_until(lambda: len(directory.records(long)) > 5)
    _, err = sweep(slurm, file, "queue", directory.path, "--no-retry")
    assert f"{long}: in the queue as" in err  # submitted once only
    run(slurm, "scontrol", "requeue", directory.status(long)["job"])
    wait_until(lambda: starts(directory, long) or hurry(slurm, directory, long))
    assert starts(directory, long) == saves(directory, long)  # no step was lost
    wait_until(lambda: len(directory.records(long)) > starts(directory, long)[0] + 5)
    run(slurm, "scancel", "--signal=USR2", directory.status(long)["job"])  # as before the limit
    wait_until(lambda: len(starts(directory, long)) == 2 or hurry(slurm, directory, long))
    assert starts(directory, long) == saves(directory, long)
    told, _ = sweep(slurm, file, "queue", directory.path, "--slurm.wait=true", "--no-retry")
    assert {name: directory.status(name)["state"] for name in names} == {
        long: "done",
        broken: "failed",
        short: "done",
    }
    assert (told["done"], told["failed"]) == (2, 1)
    assert "max_skipped=2" in directory.status(broken)["error"]
    points = load_sweep(f"{file}:queue")
    (planned,) = [p for p in Planner(points).plan(points.points) if p.name == long]
    train(planned.experiment, tmp_path / "alone")
    alone = read_records(tmp_path / "alone" / "metrics.jsonl")
    assert [r["loss"] for r in directory.records(long)] == [r["loss"] for r in alone]


def test_a_point_saves_before_its_limit_and_one_that_is_killed_loses_what_it_had_not_saved(
    slurm, file, tmp_path
):
    directory = Directory(tmp_path / "limit")
    sweep(slurm, file, "limit", directory.path, "--slurm.minutes=2", "--slurm.save_before_s=25")
    (name,) = directory.names()
    try:
        wait_until(lambda: starts(directory, name) or hurry(slurm, directory, name))
        assert starts(directory, name) == saves(directory, name)
        assert directory.status(name)["attempts"] == 2
        wait_until(lambda: len(directory.records(name)) > starts(directory, name)[0] + 50)
        job = directory.status(name)["job"]
        run(slurm, "scancel", "--signal=KILL", "--full", job)  # as if the node had died
        wait_until(lambda: not run(slurm, "squeue", "--noheader", f"--jobs={job}"))
        kept = max(int(p.name) for p in directory.run(name).glob("checkpoints/*[0-9]"))
        assert kept > starts(directory, name)[0]
        _, err = sweep(slurm, file, "limit", directory.path)
        assert "1 point queued" in err
        wait_until(lambda: len(starts(directory, name)) == 2)
        assert starts(directory, name)[1] == kept  # lost: the steps since the last checkpoint
    finally:
        run(slurm, "scancel", directory.status(name)["job"].split("_")[0])
    wait_until(lambda: directory.state(name) == "stopped")


def test_processes_of_one_point_join_and_train_as_one(slurm, file, tmp_path):
    directory = Directory(tmp_path / "several")
    told, _ = sweep(
        slurm, file, "several", directory.path, "--slurm.tasks_per_node=2", "--slurm.wait=true"
    )
    (name,) = directory.names()
    assert told["done"] == 1, directory.last_lines(name)
    assert "2 cpu devices" in directory.log(name).read_text()
    points = load_sweep(f"{file}:several")
    (planned,) = Planner(points).plan(points.points)
    alone = dataclasses.replace(planned.experiment)
    train(alone, tmp_path / "alone")
    expected = [r["loss"] for r in read_records(tmp_path / "alone" / "metrics.jsonl")]
    assert [r["loss"] for r in directory.records(name)] == pytest.approx(expected, rel=1e-4)
