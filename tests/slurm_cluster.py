"""A real Slurm of one node, started by a test in a folder of its own and stopped after it."""

import contextlib
import os
import shutil
import socket
import subprocess
import time

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "squeue", "scontrol")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=2,requeue_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing():
    """What keeps a Slurm from being started here; empty if nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "a Slurm for tests needs root"


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def cluster(folder):
    """The environment in which sbatch and the others talk to a Slurm that lives in `folder`."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = CONF.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        ports=(_port(), _port()),
        cpus=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(conf)
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    key = folder / "munge.key"
    subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, env=environment)
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file")]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    processes = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "wb")  # noqa: SIM115
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)
        _wait_until_idle(environment)
        yield environment
    finally:
        _cancel_all(environment)
        for process in reversed(processes):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _cancel_all(environment, seconds=60):
    """End all jobs: what they started would outlive the daemons."""
    command = {"env": environment, "capture_output": True, "text": True}
    subprocess.run(["scancel", "--user=root"], **command)
    end = time.monotonic() + seconds
    while subprocess.run(["squeue", "--noheader"], **command).stdout and time.monotonic() < end:
        time.sleep(0.5)


def _wait_until_idle(environment, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True
        )
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    raise RuntimeError(f"no node of the Slurm for tests came up: {done.stdout}{done.stderr}")
