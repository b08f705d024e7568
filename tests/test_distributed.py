"""Several processes as one run: the same losses, stopped together, restarted, and one lost."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memjax.config import ConfigError
from memjax.distributed import Processes, Watch, from_environment, in_cluster, straggler

ROOT = Path(__file__).parents[1]
WITHOUT_END, LOST_AFTER = 10**6, 8
ARGUMENTS = [
    "--config.model.d_model=8",
    "--config.model.pattern=lstm",
    "--config.model.repeat=1",
    "--config.data.source=text",
    "--config.data.sequence=8",
    "--config.data.batch=4",
    "--config.data.threads=0",
    "--config.data.stream=documents",
    "--config.train.carry=true",
    "--config.optimizer.warmup=2",
    "--config.optimizer.schedule=constant",
    "--config.train.log_every=1",
    "--config.train.tensorboard=false",
    "--config.checkpoint.every=1000000",
    "--config.checkpoint.keep_best=0",
    "--config.eval.every=none",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, chosen = tmp_path_factory.mktemp("texts"), random.Random(0)
    for index in range(12):
        text = "".join(chosen.choices("abcdefgh \n", k=chosen.randint(150, 700)))
        (folder / f"{index}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "MEMJAX_ALLOCATOR": "default",
        "MEMJAX_CACHE": str(tmp_path_factory.mktemp("tokens")),
        "PYTHONPATH": str(ROOT),
    }


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """Processes of one run, and what each has written to stderr."""

    def __init__(self, workdir, texts, environment, count=1, devices=1, steps=WITHOUT_END, mesh=()):
        where, self.workdir, self.logs = f"127.0.0.1:{free_port()}", workdir, []
        self.processes = []
        for index in range(count):
            several = [f"--coordinator={where}", f"--processes={count}", f"--process={index}"]
            command = [sys.executable, "-m", "memjax", "train", f"--workdir={workdir}", *ARGUMENTS]
            command += [f"--config.data.path={texts}", f"--config.train.steps={steps}", *mesh]
            command += [*several, f"--lost-after={LOST_AFTER}"] if count > 1 else []
            log = workdir.parent / f"{workdir.name}-{index}-{time.time_ns()}.log"
            self.logs.append(log)
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=environment | {"JAX_NUM_CPU_DEVICES": str(devices)},
                    stdout=subprocess.DEVNULL,
                    stderr=open(log, "w"),  # noqa: SIM115
                )
            )

    def shown(self, index=0):
        return self.logs[index].read_text()

    def wait_for_step(self, step):
        while all(process.poll() is None for process in self.processes):
            if last_step(self.workdir) >= step:
                return
            time.sleep(0.01)
        raise AssertionError(self.shown())

    def statuses(self):
        return [process.wait(timeout=300) for process in self.processes]


def records(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def last_step(workdir):
    return max((record["step"] for record in records(workdir)), default=0)


def checkpoints(workdir):
    found = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in found if name.isdigit())


def assert_same_losses(workdir, expected):
    for ours, theirs in zip(records(workdir), records(expected), strict=True):
        assert ours["step"] == theirs["step"] and ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_two_processes_stop_together_lose_one_and_end_as_one_process_would(
    texts, environment, tmp_path
):
    workdir = tmp_path / "two"
    run = Run(workdir, texts, environment, count=2)
    run.wait_for_step(2)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.statuses() == [75, 75], run.shown()
    (stopped,) = checkpoints(workdir)
    assert stopped >= 2
    for index in range(2):
        assert f"SIGTERM: saved at step {stopped}" in run.shown(index)

    run = Run(workdir, texts, environment, count=2)
    run.wait_for_step(stopped + 1)
    assert f"going on from step {stopped}" in run.shown()
    run.processes[1].kill()
    begin = time.monotonic()
    assert run.statuses() == [76, -signal.SIGKILL], run.shown()
    assert time.monotonic() - begin < 3 * LOST_AFTER
    assert "process 1 of 2 was lost" in run.shown() and "start all processes again" in run.shown()

    end = stopped + 4
    run = Run(workdir, texts, environment, count=2, steps=end)
    assert run.statuses() == [0, 0], run.shown()
    single = Run(tmp_path / "single", texts, environment, devices=2, steps=end)
    assert single.statuses() == [0], single.shown()
    assert_same_losses(workdir, tmp_path / "single")
    starts = [json.loads(line) for line in (workdir / "sessions.jsonl").read_text().splitlines()]
    assert len(starts) == 3 and all(start["processes"] == 2 for start in starts)

    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    on_four = Run(workdir, texts, environment, devices=4, steps=end + 2, mesh=mesh)
    assert on_four.statuses() == [0], on_four.shown()
    assert f"going on from step {end}" in on_four.shown()
    assert last_step(workdir) == end + 2


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_processes_that_share_rows_read_the_same_ones(axis, texts, environment, tmp_path):
    """Two processes split a sequence, or parameters, and no batch."""
    single, mesh = (
        Run(tmp_path / "single", texts, environment, steps=4),
        [f"--config.mesh.{axis}=2"],
    )
    assert single.statuses() == [0], single.shown()
    both = Run(tmp_path / "both", texts, environment, count=2, steps=4, mesh=mesh)
    assert both.statuses() == [0, 0], both.shown()
    assert_same_losses(tmp_path / "both", tmp_path / "single")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_four_processes_go_on_from_two_and_the_loss_of_any_ends_all(
    victim, texts, environment, tmp_path
):
    """If process 0 is gone, JAX aborts the others."""
    workdir = tmp_path / "run"
    assert Run(workdir, texts, environment, count=2, steps=4).statuses() == [0, 0]
    run = Run(workdir, texts, environment, count=4)
    run.wait_for_step(6)
    assert "going on from step 4" in run.shown()
    run.processes[victim].kill()
    statuses = run.statuses()
    assert statuses.pop(victim) == -signal.SIGKILL
    assert set(statuses) == {76}, (statuses, [run.shown(i) for i in range(4)])
    for index in {*range(4)} - {victim}:
        assert f"process {victim} of 4 was lost" in run.shown(index)


JOINED = """
import os, sys, time
from memjax.distributed import Processes, connect
index = int(sys.argv[2])
connect(Processes(coordinator=sys.argv[1], count=2, index=index, lost_after=60))
print("joined", flush=True)
if index == 0:
    sys.stdin.readline()
    os._exit(1)
if sys.argv[3] == "itself":
    os.abort()
time.sleep(60)
"""


@pytest.mark.parametrize(("cause", "status"), [("coordinator", 76), ("itself", -signal.SIGABRT)])
def test_an_abort_is_explained_if_process_0_is_gone(cause, status, environment):
    where = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, where, str(index), cause],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == "joined\n"
    if cause == "coordinator":
        both[0].stdin.write("\n")
        both[0].stdin.flush()
    _, shown = both[1].communicate(timeout=50)
    both[0].kill()
    both[0].communicate()
    assert both[1].returncode == status, shown
    assert (f"process 0 of 2 was lost ({where} does not answer)" in shown) == (status == 76)


SILENT = """
import os, sys, time
from memjax.distributed import Watch, explain_abort
watch = Watch(None, (0, 3), 60)  # not started: only the abort can end this process
watch._heard[2] = ("", time.monotonic() - float(sys.argv[1]))
explain_abort("", watch)
os.abort()
"""


@pytest.mark.parametrize(("silent", "status"), [(61, 76), (59, -signal.SIGABRT)])
def test_an_abort_is_explained_if_another_has_been_silent(silent, status, environment):
    """JAX's heartbeats may notice a loss before ours do, on a machine that was held up."""
    command = [sys.executable, "-c", SILENT, str(silent)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == status, ended.stderr
    assert ("process 2 of 3 was lost (no sign of life" in ended.stderr) == (status == 76)


class Store:
    """The key-value store of JAX's coordinator, as far as `Watch` uses it."""

    def __init__(self):
        self.values, self.gone = {}, False

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite and not self.gone
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


def watch(store, index, lost, count=3, after=0.4):
    return Watch(store, (index, count), after, lost.append)


def wait_until(true, seconds=20):
    begin = time.monotonic()
    while not true() and time.monotonic() - begin < seconds:
        time.sleep(0.01)
    assert true()


def test_silence_is_a_loss_and_a_goodbye_is_none():
    store, lost = Store(), [[], [], []]
    watches = [watch(store, index, lost[index]) for index in range(3)]
    for one in watches:
        one.start()
    watches[1].tell(step=7, host_ms_p50=3.0)
    wait_until(lambda: watches[0].others().get(1, {}).get("step") == 7)
    watches[1].finish()
    time.sleep(1.0)
    assert lost == [[], [], []]
    watches[2]._beat = lambda said: None  # a process that hangs whole, its threads included
    watches[2]._silent = list
    wait_until(lambda: lost[0])
    assert lost[0][0].startswith("process 2 of 3 was lost (no sign of life for 0.4 s)")
    watches[2].finish()


def test_if_the_store_is_gone_process_0_is_lost():
    store, lost = Store(), []
    one = watch(store, 1, lost, count=2)
    store.gone = True
    one.start()
    wait_until(lambda: lost)
    assert lost[0].startswith("process 0 of 2 was lost")


@pytest.mark.parametrize(
    ("host", "slow"),
    [([5, 6, 5, 30], 3), ([5, 6, 5, 9], None), ([1, 1, 1, 4], None), ([30, 5], 0), ([30], None)],
)
def test_a_straggler_is_named_if_it_costs_a_tenth_of_the_step(host, slow):
    reports = {i: {"host_ms_p50": ms, "step_ms_p50": 100.0} for i, ms in enumerate(host)}
    line = straggler(reports)
    assert (line is None) == (slow is None)
    assert slow is None or line.startswith(f"process {slow} holds the others up: 30 ms")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1", "count": 2}, "--coordinator=a:1, --processes=2: needs --process"),
        ({"coordinator": "a", "count": 2, "index": 0}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "--process=2: must be from 0 to 1"),
        ({"coordinator": "a:1", "count": 0, "index": 0}, "--processes=0: must be at least 1"),
        ({"lost_after": 1}, "--lost-after=1: must be at least 2"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError) as caught:
        Processes(**given)
    assert message in str(caught.value)


def test_the_environment_says_where_the_processes_are():
    names = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert from_environment(names) == {"coordinator": "h:1", "count": 4, "index": 3}
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID=x"):
        from_environment({"JAX_PROCESS_ID": "x"})
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"}
    assert in_cluster(step)
    assert not in_cluster(step | {"SLURM_STEP_NUM_TASKS": "1"})
    assert not in_cluster({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"})  # a batch script, no step
    assert in_cluster({"OMPI_COMM_WORLD_SIZE": "2"}) and not in_cluster({})
