"""Sweeps that really run: workers, failures, signals, early ends; a few seconds each."""

import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memjax.cli import main
from memjax.sweeps import load_sweep
from memjax.sweeps.directory import Directory
from memjax.sweeps.plan import Planner
from memjax.training.loop import train
from memjax.training.metrics import read_records
from memjax.training.workdir import locked

CARRY = Path(__file__).parent.parent / "experiments" / "carry" / "sweep.py"
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
    train=Train(steps=8, log_every=2, tensorboard=False, max_skipped=2, z_loss=1.0),
    checkpoint=Checkpoint(every=4, keep=1),
    eval=Eval(every=4, tokens=32),
)
LONG = {{"train.steps": 100_000, "checkpoint.every": 50, "eval.every": 8}}


def get_sweep(name):
    rates = axis("optimizer.learning_rate", {{"fine": 1e-3, "broken": 1e30, "last": 2e-3}})
    if name == "broken":
        return Sweep(base=BASE, points=rates, evaluate=(Evaluate(max_documents=1, split="valid"),))
    if name == "long":
        return Sweep(base=BASE, points=product((Point(LONG),), seeds(2)))
    if name in ("median", "halving"):
        rule = Median(start=4, least=2) if name == "median" else Halving(first=4, factor=3)
        rates = axis("optimizer.learning_rate", {{"good": 9e-3, "fair": 7e-3, "poor": 1e-9}})
        points = when(rates, {{"optimizer.learning_rate": 1e-9}}, (Point(LONG),))
        return Sweep(base=BASE, points=points, stop=rule)
    if name == "search":
        fields = {{"optimizer.learning_rate": Uniform(low=1e-4, high=1e-2, log=True),
                   "model.d_model": Choice((8, 12))}}
        return Sweep(base=BASE, search=Search(fields=fields, trials=3))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A sweep file with texts of its own; the variants are above."""
    folder, chosen = tmp_path_factory.mktemp("sweep"), random.Random(0)
    texts = folder / "texts"
    texts.mkdir()
    for index in range(12):
        text = "".join(chosen.choices("abcdefgh \n", k=chosen.randint(150, 700)))
        (texts / f"{index}.txt").write_text(text)
    (folder / "sweep.py").write_text(SWEEP.format(texts=str(texts)))
    os.environ["MEMJAX_CACHE"] = str(folder / "cache")
    return folder / "sweep.py"


@pytest.fixture(scope="module")
def finished(file, tmp_path_factory):
    """The sweep `broken`, run once: two points that train and one that diverges."""
    folder = tmp_path_factory.mktemp("runs") / "broken"
    assert main(["sweep", f"--sweep={file}:broken", f"--workdir={folder}", "--json"]) == 1
    return Directory(folder)


def states(directory):
    return {name: directory.status(name)["state"] for name in directory.names()}


NAMES = [f"learning_rate={label}" for label in ("fine", "broken", "last")]


def test_a_point_that_fails_does_not_stop_the_others(finished):
    assert states(finished) == dict(zip(NAMES, ("done", "failed", "done")))
    broken = finished.status(NAMES[1])
    assert "max_skipped=2" in broken["error"] and broken["attempts"] == 1
    assert any("left out" in line for line in finished.last_lines(NAMES[1]))


def test_a_point_of_a_sweep_is_the_run_that_train_would_have_made(finished, file, tmp_path):
    sweep = load_sweep(f"{file}:broken")
    point = Planner(sweep).plan(sweep.points)[2]
    train(point.experiment, tmp_path / "alone")
    alone = read_records(tmp_path / "alone" / "metrics.jsonl")
    swept = finished.records(NAMES[2])
    assert [r["step"] for r in swept] == [2, 4, 6, 8]
    for field in ("loss", "eval_loss", "grad_norm"):
        assert [r.get(field) for r in swept] == [r.get(field) for r in alone]


def test_finished_points_are_evaluated(finished):
    (result,) = (finished.run(NAMES[0]) / "eval").glob("*.json")
    value = json.loads(result.read_text())["word_perplexity"]
    (evaluated,) = finished.status(NAMES[0])["evaluated"]
    assert evaluated["word_perplexity"] == value


def test_an_evaluation_added_later_is_made_and_what_is_there_stays(finished, file, tmp_path, capfd):
    folder = shutil.copytree(finished.path, tmp_path / "copy")
    directory, more = Directory(folder), tmp_path / "more.py"
    old = 'evaluate=(Evaluate(max_documents=1, split="valid"),)'
    assert old in file.read_text()
    new = old.replace(",)", ', Evaluate(max_documents=1, split="valid", carry=False))')
    more.write_text(file.read_text().replace(old, new))
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*") if p.is_file()}
    (first,) = (directory.run(NAMES[0]) / "eval").glob("*.json")
    stamp = first.stat().st_mtime_ns
    argv = ["sweep", f"--sweep={more}:broken", f"--workdir={folder}", "--no-retry", "--json"]
    assert main(argv) == 1
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    row = next(row for row in told["rows"] if row["point"] == NAMES[0])
    assert set(row["evaluations"]) == {"", "carry=false"}
    assert len(list((directory.run(NAMES[0]) / "eval").glob("*.json"))) == 2
    assert first.stat().st_mtime_ns == stamp
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*") if p.is_file()}


def test_running_again_tries_what_failed_shows_why_and_leaves_the_rest(finished, file, capfd):
    def stamps():
        runs = [finished.run(name) for name in (NAMES[0], NAMES[2])]
        return {p: p.stat().st_mtime_ns for run in runs for p in run.rglob("*")}

    before = stamps()
    assert main(["sweep", f"--sweep={file}:broken", f"--workdir={finished.path}"]) == 1
    err = capfd.readouterr().err
    assert "2 of 3 points are done already" in err
    assert "learning_rate=broken: failed before" in err and "max_skipped=2" in err
    assert str(finished.log(NAMES[1])) in err
    assert stamps() == before
    assert finished.status(NAMES[1])["attempts"] == 2
    assert main(["sweep", f"--workdir={finished.path}", "--status", "--json"]) == 1
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (told["done"], told["failed"], told["points"]) == (2, 1, 3)


def test_a_dry_run_shows_the_costs_and_writes_nothing(file, tmp_path, capfd):
    folder = tmp_path / "dry"
    argv = ["sweep", f"--sweep={file}:broken", f"--workdir={folder}", "--dry-run", "--speed=1e9"]
    assert main([*argv, "--json"]) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [p["point"] for p in told["points"]] == NAMES and not folder.exists()
    assert told["hours"] == pytest.approx(sum(p["flops"] for p in told["points"]) / 1e9 / 3600)


def start(file, variant, folder):
    command = [sys.executable, "-m", "memjax", "sweep", f"--sweep={file}:{variant}"]
    return subprocess.Popen(
        [*command, f"--workdir={folder}"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def trains(directory, name):
    return directory.status(name)["state"] == "running" and len(directory.records(name)) > 2


def test_a_killed_process_costs_its_point_alone_and_a_stopped_sweep_saves(file, tmp_path):
    directory = Directory(tmp_path / "long")
    first, second = "seed=0", "seed=1"
    process = start(file, "long", directory.path)
    try:
        wait_until(lambda: trains(directory, first))
        os.kill(directory.status(first)["pid"], signal.SIGKILL)
        wait_until(lambda: trains(directory, second))
        assert directory.status(first)["state"] == "failed"
        assert "SIGKILL" in directory.status(first)["error"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert states(directory) == {first: "failed", second: "stopped"}
    step = directory.records(second)[-1]["step"]
    saved = [int(p.name) for p in (directory.run(second) / "checkpoints").iterdir()]
    assert max(saved) >= step


def test_a_point_that_cannot_write_says_so_and_harms_no_other(file, tmp_path, capfd):
    directory = Directory(tmp_path / "full")
    argv = ["sweep", f"--sweep={file}:broken", f"--workdir={directory.path}"]
    with directory.locked():
        directory.log(NAMES[0]).symlink_to("/dev/full")
    assert main(argv) == 1
    assert states(directory) == dict(zip(NAMES, ("failed", "failed", "done")))
    err = capfd.readouterr().err
    assert "error: OSError: [Errno 28] No space left on device" in err and "Traceback" not in err
    directory.log(NAMES[0]).unlink()
    assert main([*argv, "--json"]) == 1  # with room, all but the broken one are done
    assert states(directory) == dict(zip(NAMES, ("done", "failed", "done")))


def test_a_point_whose_process_is_gone_is_not_called_running(finished, tmp_path):
    directory = Directory(shutil.copytree(finished.path, tmp_path / "copy"))
    directory.mark(NAMES[0], state="running", host=socket.gethostname())
    assert directory.state(NAMES[0]) == "stopped"
    with locked(directory.run(NAMES[0])):
        assert directory.state(NAMES[0]) == "running"


@pytest.mark.parametrize("rule", ["median", "halving"])
def test_a_poor_point_ends_early_and_stays_ended(rule, file, tmp_path, capfd):
    argv = ["sweep", f"--sweep={file}:{rule}", f"--workdir={tmp_path / rule}", "--local.jobs=2"]
    assert main(argv) == 0
    directory = Directory(tmp_path / rule)
    ends = {name.rpartition("=")[2]: state for name, state in states(directory).items()}
    assert ends.pop("poor") == "ended early"
    assert set(ends.values()) <= ({"done"} if rule == "median" else {"done", "ended early"})
    assert directory.records("learning_rate=poor")[-1]["step"] < 100_000
    cores = {tuple(directory.status(name)["cores"]) for name in directory.names()}
    shares = sorted(os.sched_getaffinity(0))
    if len(shares) > 1:  # both workers had cores of their own
        assert cores <= {tuple(shares[::2]), tuple(shares[1::2])}
    capfd.readouterr()
    assert main(argv) == 0
    assert "3 of 3 points are done already" in capfd.readouterr().err


def test_a_search_goes_on_where_it_was(file, tmp_path, capfd):
    if importlib.util.find_spec("optuna") is None:
        assert main(["sweep", f"--sweep={file}:search", f"--workdir={tmp_path / 's'}"]) == 2
        assert "memjax[search]" in capfd.readouterr().err
        pytest.skip("optuna is not installed")
    argv = ["sweep", f"--sweep={file}:search", f"--workdir={tmp_path / 's'}"]
    assert main(argv) == 0
    directory = Directory(tmp_path / "s")
    assert states(directory) == {f"trial={n:04d}": "done" for n in range(3)}
    proposed = directory.plan()["settings"]["proposed"]
    rates = {n: directory.experiment(n).optimizer.learning_rate for n in directory.names()}
    assert rates == {n: p["optimizer.learning_rate"] for n, p in proposed.items()}
    assert len(set(rates.values())) == 3 and all(1e-4 <= r <= 1e-2 for r in rates.values())
    longer = file.read_text().replace("trials=3", "trials=4")
    (tmp_path / "longer.py").write_text(longer)
    assert main(["sweep", f"--sweep={tmp_path / 'longer.py'}:search", argv[2]]) == 0
    assert len(directory.names()) == 4
    after = directory.plan()["settings"]["proposed"]
    assert {n: after[n] for n in proposed} == proposed


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["--sweep", "missing"]),
        (["--sweep=nowhere.py"], ["nowhere.py", "get_sweep()"]),
        ([f"--sweep={CARRY.parent}"], ["did you mean", f"{CARRY}?"]),
        ([f"--sweep={CARRY.parent}/sweeep.py"], ["did you mean", f"{CARRY}?"]),
        (["--status"], ["--workdir"]),
        (["--status", "--workdir=nowhere"], ["nowhere", "no sweep"]),
        (["--sweep=x.py", "--local.jbos=2"], ["local.jbos", "did you mean jobs?"]),
        (["--sweep=x.py", "--local.jobs=0"], ["jobs=0", "at least 1"]),
        (["--sweep=x.py", "--local.jobs=2", "--local.gpus=0,1,2"], ["gpus=(0, 1, 2)", "evenly"]),
        (["--sweep=x.py", "--slurm.partition=gpu"], ["--executor=slurm"]),
        (["--sweep=x.py", "--config=y.py"], ["--config=y.py", "--config.PATH=VALUE"]),
        (["--sweep=x.py", "--jobs=2"], ["--jobs=2"]),
    ],
)
def test_a_wrong_argument_is_one_line(argv, parts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *argv]) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1 and all(part in err for part in parts), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["at once", "after its point"])
def test_a_worker_whose_sweep_is_gone_ends_without_a_traceback(tmp_path, when):
    (tmp_path / "logs").mkdir()
    worker = subprocess.Popen(
        [sys.executable, "-m", "memjax.sweeps.worker", str(tmp_path), "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    worker.stdout.close()
    worker.stdin.write("no-such-point\n")
    worker.stdin.flush()
    log = tmp_path / "logs" / "no-such-point.log"
    while when != "at once" and worker.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)  # until it has said what is wrong, and answers
    worker.stdin.close()
    worker.stdin = worker.stdout = None
    _, errors = worker.communicate(timeout=120)
    assert worker.returncode == 0, errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
