"""A run that is killed at any moment and started again is the run that was never interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

SCRIPT = """
import sys
from memjax.config import parse
from memjax.experiment import Experiment
from memjax.training.errors import Interrupted
from memjax.training.loop import train
experiment, (workdir,) = parse(Experiment, sys.argv[1:], default=Experiment())
try:
    train(experiment, workdir)
except Interrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.status)
"""
STEPS = 40
ARGUMENTS = [
    "--config.model.d_model=8",
    "--config.model.pattern=lstm",
    "--config.model.repeat=2",
    "--config.model.dropout=0.1",
    "--config.data.source=text",
    "--config.data.sequence=16",
    "--config.data.batch=4",
    "--config.optimizer.warmup=5",
    "--config.optimizer.ema=0.9",
    "--config.train.accumulate=2",
    "--config.train.log_every=1",
    "--config.train.tensorboard=false",
    "--config.checkpoint.every=4",
    "--config.eval.every=10",
    "--config.eval.tokens=64",
    f"--config.train.steps={STEPS}",
]
STREAMS = {
    "packed": ["--config.data.stream=packed"],
    "documents": [
        "--config.data.stream=documents",
        "--config.train.carry=true",
        "--config.train.horizon=2",
    ],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    chosen = random.Random(0)
    for index in range(12):
        text = "".join(chosen.choices("abcdefgh \n", k=chosen.randint(150, 700)))
        (folder / f"{index}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "MEMJAX_CACHE": str(tmp_path_factory.mktemp("tokens")),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }


def start(stream, texts, workdir, environment):
    command = [sys.executable, "-c", SCRIPT, str(workdir), *ARGUMENTS, *STREAMS[stream]]
    return subprocess.Popen(
        [*command, f"--config.data.path={texts}"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, workdir, step):
    """Wait until the run has logged `step`, or has ended."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.002)


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def exact(record):
    """What does not depend on the clock."""
    timed = ("seconds", "tokens_per_s", "goodput", "host_ms_p50")
    return {k: v for k, v in record.items() if k not in timed and not k.startswith("step_ms_")}


def final_arrays(workdir):
    loaded = ocp.load_checkpointables(workdir.absolute() / "checkpoints" / str(STEPS))
    flat = jax.tree_util.tree_leaves_with_path(loaded)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same_run(workdir, expected):
    ours, theirs = records(workdir), records(expected)
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    assert [exact(record) for record in ours] == [exact(record) for record in theirs]
    arrays, wanted = final_arrays(workdir), final_arrays(expected)
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        assert array.tobytes() == wanted[name].tobytes(), name


@pytest.mark.parametrize("stream", STREAMS)
def test_killed_runs_equal_the_uninterrupted_run_bit_for_bit(stream, texts, tmp_path, environment):
    process = start(stream, texts, tmp_path / "whole", environment)
    assert process.wait() == 0, process.stderr.read()
    seed = int(os.environ.get("MEMJAX_KILL_SEED", time.time_ns() % 10**6))
    chosen = random.Random(seed)
    print(f"MEMJAX_KILL_SEED={seed}")
    workdir, killed = tmp_path / "killed", 0
    for step in sorted(chosen.sample(range(2, STEPS - 10), 2)):
        process = start(stream, texts, workdir, environment)
        wait_for_step(process, workdir, step)
        time.sleep(chosen.random() * 0.05)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    process = start(stream, texts, workdir, environment)
    assert process.wait() == 0, process.stderr.read()
    assert killed > 0
    assert_same_run(workdir, tmp_path / "whole")
    if stream == "documents":
        stop_and_go_on(stream, texts, tmp_path, environment)


def stop_and_go_on(stream, texts, tmp_path, environment):
    """SIGTERM saves and ends with status 75; the same command goes on to the same end."""
    process = start(stream, texts, tmp_path / "stopped", environment)
    wait_for_step(process, tmp_path / "stopped", 5)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate()
    assert process.returncode == 75, shown
    assert "SIGTERM: saved at step" in shown.splitlines()[-1]
    process = start(stream, texts, tmp_path / "stopped", environment)
    _, shown = process.communicate()
    assert process.returncode == 0 and "going on from step" in shown
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
